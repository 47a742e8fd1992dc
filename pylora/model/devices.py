"""Which accelerator there is."""

from __future__ import annotations

import torch

# In the order of preference. The last three are there when a vendor's extension of torch is.
_ACCELERATORS = ("cuda", "mps", "mlu", "xpu", "npu")


def infer_device() -> str:
    """The type of the device to use when nobody chose one: an accelerator that is available, else "cpu"."""
    for name in _ACCELERATORS:
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return name
    return "cpu"

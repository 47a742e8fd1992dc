"""Which optional packages are installed, by PEFT's names; nothing is imported where looking is enough."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import lru_cache

import torch

_TRANSFORMERS_FLAGS = {
    "is_transformers_ge_v5": (5, 0, 0),
    "is_transformers_ge_v5_1_0": (5, 1, 0),
    "is_transformers_ge_v5_4_0": (5, 4, 0),
    "is_transformers_ge_v5_6_0": (5, 6, 0),
    "is_transformers_ge_v5_13_0": (5, 13, 0),
    "is_transformers_ge_v5_17_0": (5, 17, 0),
}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> tuple[int, ...]:
    """The leading numbers of the installed version, (0,) where there is none."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return (0,)
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _require_version(package: str, minimum: tuple[int, ...]) -> None:
    found = _version(package)
    if found < minimum:
        wanted, got = (".".join(map(str, version)) for version in (minimum, found))
        raise ImportError(f"{package}: expected version {wanted} or later, found an incompatible version: {got}")


def __getattr__(name: str) -> bool:
    if name in _TRANSFORMERS_FLAGS:
        return _version("transformers") >= _TRANSFORMERS_FLAGS[name]
    if name == "is_transformers_le_4_53":
        return _version("transformers") < (4, 54)
    if name == "is_transformers_dtensor_tp":
        return _has_dtensor_tensor_parallelism()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache
def _has_dtensor_tensor_parallelism() -> bool:
    try:
        module = importlib.import_module("transformers.distributed.tensor_parallel")
    except ImportError:
        return False
    return hasattr(module, "apply_tensor_parallelism")


@lru_cache
def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _is_installed("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has 4-bit layers."""
    return is_bnb_available() and hasattr(importlib.import_module("bitsandbytes").nn, "Linear4bit")


@lru_cache
def is_gptqmodel_available() -> bool:
    """Whether gptqmodel and optimum are installed.

    Raises:
        ImportError: gptqmodel is installed, but it or optimum is too old or missing.
    """
    if not _is_installed("gptqmodel"):
        return False
    _require_version("gptqmodel", (7, 0, 0))
    _require_version("optimum", (1, 24, 0))
    return True


@lru_cache
def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _is_installed("optimum")


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed and, if `check_device`, finds a device."""
    if not _is_installed("torch_xla"):
        return False
    if check_device:
        try:
            importlib.import_module("torch_xla.core.xla_model").xla_device()
        except RuntimeError:
            return False
    return True


@lru_cache
def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _is_installed("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _is_installed("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _is_installed("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Whether Intel's neural_compressor is installed."""
    return _is_installed("neural_compressor")


@lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is installed.

    Raises:
        ImportError: it is, but too old.
    """
    if not _is_installed("torchao") or _version("torchao") == (0,):
        return False
    _require_version("torchao", (0, 16, 0))
    return True


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed with the tensor types of its version 0.18."""
    return is_torchao_available() and _version("torchao") >= (0, 18, 0)


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch has Intel GPUs. `check_device` is accepted for PEFT's sake: torch always looks for a device."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


@lru_cache
def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_installed("diffusers")


@lru_cache
def is_te_available() -> bool:
    """Whether Transformer Engine is installed."""
    return _is_installed("transformer_engine")


@lru_cache
def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine is installed with its part for torch."""
    return is_te_available() and hasattr(importlib.import_module("transformer_engine"), "pytorch")

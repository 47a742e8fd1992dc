"""When DoRA's row norms are reused: while the base weight, the factors and the scaling are known unchanged.

`KeptNorms` (csrc/dora/kept_norms.h) compares the tensors themselves: storage, layout and torch's count of writes. What
it cannot see is decided here. Tensors that inference mode made have no count, and are trusted within one
`DoraCaching`. Optimizers that write through raw pointers are not counted: a step of any torch optimizer ends what was
kept of trained tensors. In a process group (FSDP gathers parameters into one memory again and again, uncounted) norms
are kept within `DoraCaching` only.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class _State:
    # 0, or within `DoraCaching` a number of its own.
    trust: int = 0
    switches: int = 0
    steps: int = 0


def _count_step(*args: Any) -> None:
    _State.steps += 1


register_optimizer_step_post_hook(_count_step)


def _in_process_group() -> bool:
    return False


if torch.distributed.is_available():
    _in_process_group = torch.distributed.is_initialized


def caching_enabled() -> bool:
    """Whether a `DoraCaching` is in effect."""
    return _State.trust != 0


def writes_and_trust() -> tuple[int, int]:
    """The arguments of `KeptNorms`' methods of these names, as they are now."""
    trust = _State.trust
    return _State.steps, -1 if trust == 0 and _in_process_group() else trust


def invalidate(model: nn.Module) -> None:
    """Forget what was computed from the weights of `model`: to be called after edits that torch does not count.

    DoRA layers keep the norms of their weight's rows, and compute them anew when torch counts a write to the weight or
    a factor, or one of them is replaced. Not counted are writes through `.data` (`weight.data.add_(...)`), numpy, a raw
    pointer or a CUDA graph. A step of a torch optimizer is always noticed, however it writes.

    Args:
        model: A model, or any part of one.
    """
    for module in model.modules():
        kept = module.__dict__.get("_kept_norms")
        if kept is not None:
            kept.clear()


class DoraCaching:
    """Lets DoRA layers trust weights whose writes torch does not count while their norms are kept.

    Norms are kept and reused outside of it as well, as long as torch counts no write to the base weight or a factor.
    Inside, this also holds for weights that were made in inference mode, and in a process group (FSDP, DDP): nothing of
    the model may be written there, in ways that are not counted, before the context is left or
    `pylora.invalidate(model)` called.

    Args:
        enabled: What the context switches this to.

    Example:
        >>> with DoraCaching():
        ...     output = model(inputs)
        >>> DoraCaching()(enabled=True)  # from here on
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    def __enter__(self) -> None:
        self.prev_value = caching_enabled()
        _switch(self.enabled)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _switch(bool(self.prev_value))
        self.prev_value = None

    def __call__(self, enabled: bool = True) -> None:
        """Switch it on or off from here on."""
        _switch(enabled)


def _switch(enabled: bool) -> None:
    if bool(enabled) != caching_enabled():
        _State.switches += 1
        _State.trust = _State.switches if enabled else 0

"""An adapter that belongs to a changed base weight (PiSSA, OLoRA, ...), rewritten for the original one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


def relative_to_initial(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's change since its start, as factors of twice the rank.

    The base weight was W - s·B₀·A₀ during training, so what is added to W is s·(B·A - B₀·A₀) = s·[B, -B₀]·[A; A₀].

    Args:
        tensors: The trained adapter by checkpoint key.
        initial: The same adapter as it was before training, with the same keys.

    Returns:
        A new dictionary: A, stacked on A₀, and B beside -B₀; what is no factor, such as trained heads and DoRA's
        magnitudes, as it is.

    Raises:
        ValueError: `initial` lacks a factor, or has it in a shape that does not fit.
    """
    import torch

    result = dict(tensors)
    for key, tensor in tensors.items():
        factor = _FACTOR.search(key)
        if factor is None:
            continue
        start = initial.get(key)
        axis = 0 if factor[1] == "A" else 1
        if start is None or _without(tensor.shape, axis) != _without(start.shape, axis):
            found = "nothing" if start is None else f"shape {tuple(start.shape)}"
            raise ValueError(
                f"path_initial_model_for_weight_conversion: {key}: expected the initial factor of an adapter of shape "
                f"{tuple(tensor.shape)}, got {found}"
            )
        start = start.to(tensor.device)
        result[key] = torch.cat([tensor, start if axis == 0 else -start], dim=axis)
    return result


def _without(shape: Any, axis: int) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def check_convertible(config: Any) -> None:
    """Raise ValueError where no rank and alpha give every layer the scaling that it was trained with."""
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )


def config_of_converted(config: Any) -> Any:
    """A copy of `config` for factors of twice the rank and unchanged scaling, on an unchanged base weight."""
    converted = copy.deepcopy(config)
    converted.init_lora_weights = True
    converted.r *= 2
    converted.lora_alpha *= 2**0.5 if converted.use_rslora else 2
    for pattern in (converted.rank_pattern, converted.alpha_pattern):
        if pattern:
            pattern.update({key: 2 * value for key, value in pattern.items()})
    return converted

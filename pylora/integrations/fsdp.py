"""Fully sharded data parallelism: which modules of an adapted model become units."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn


def no_split_modules(model: nn.Module) -> set[str]:
    """Class names of the blocks that a transformers model says must stay whole; empty for other models."""
    names: set[str] = set()
    pending: list[nn.Module] = [model]
    while pending:
        module = pending.pop()
        names.update(getattr(module, "_no_split_modules", None) or ())
        if type(module).__name__ not in names:
            pending.extend(module.children())
    return names


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A wrap policy for adapted models: a unit for each transformer block and for each trainable leaf.

    Trainable leaves get units of their own, since FSDP with the original flat parameters cannot mix frozen and
    trainable ones in a unit.

    Args:
        model: the model. Its blocks are those it names in `_no_split_modules`; the environment variable
            FSDP_TRANSFORMER_CLS_TO_WRAP, class names with commas between, overrides that.

    Returns:
        a policy for `auto_wrap_policy` of `FullyShardedDataParallel`.

    Raises:
        TypeError: a class name that no module of the model has.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    default = ",".join(no_split_modules(model))
    wanted = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", default).split(",") if name]
    classes = {type(module).__name__: type(module) for module in model.modules()}
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise TypeError(f"fsdp_auto_wrap_policy: Could not find the transformer layer class to wrap: {unknown}")
    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in wanted})
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _is_trainable_leaf(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.requires_grad and next(module.children(), None) is None

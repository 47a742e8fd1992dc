"""Take down the directions that an adapter added and the base weight knows nothing of.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", https://arxiv.org/abs/2410.21228.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from pylora.combine import triplets_of_product
from pylora.config import PeftType
from pylora.init import top_singular_triplets
from pylora.layers import LoraLayer, walk
from pylora.model.factor_access import factors_of, set_factors


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a copy of an adapter with less of its intruder dimensions, and make it the active one.

    A direction of the merged weight's `top_k` first left singular vectors is an intruder if none of the base weight's
    has a cosine of at least `threshold_epsilon` with it. It costs task accuracy and gives earlier knowledge back.

    Args:
        peft_model: A `PeftModel`.
        old_adapter_name: The adapter, which stays as it is.
        new_adapter_name: The new one.
        top_k: How many of the merged weight's directions to look at.
        threshold_epsilon: See above; larger finds more.
        mitigation_lambda: What factor intruders keep; 1 changes nothing.
        logging_sink: Called with a line for each layer; None is silent.

    Raises:
        ValueError: The model's adapters are not LoRA, or there is an adapter of the new name.
        KeyError: There is no such adapter.
    """
    log = logging_sink or (lambda line: None)
    if peft_model.peft_type != PeftType.LORA:
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    config = peft_model.peft_config[old_adapter_name]
    scheme = config.init_lora_weights
    # Only its shapes are needed, and a scheme that changes the base weight has done that already.
    own_config = dataclasses.replace(config, init_lora_weights=scheme if isinstance(scheme, bool) else False)
    peft_model.add_adapter(new_adapter_name, own_config)
    try:
        for name, layer, *_ in walk(peft_model):
            if isinstance(layer, LoraLayer) and layer._has_adapter(old_adapter_name):
                a, b = factors_of(layer, old_adapter_name)
                reduced = _reduced(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
                if reduced is None:
                    log(f"{name}: No intruders")
                    a_new, b_new = a.clone(), b.clone()
                else:
                    count, a_new, b_new = reduced
                    log(f"{name}: Intruders: {count}")
                set_factors(layer, new_adapter_name, a_new.view_as(a).to(a.dtype), b_new.view_as(b).to(b.dtype))
    except BaseException:
        peft_model.delete_adapter(new_adapter_name)
        raise
    own_config.init_lora_weights = scheme
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _reduced(
    layer: Any, name: str, top_k: int, epsilon: float, share: float
) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """How many intruders there are, and A and B as matrices without `1 - share` of them; None where there is none.

    With intruders Σ σuvᵀ the new delta is s·B·A - (1 - share)·Σ σuvᵀ, which is decomposed as a product of stacks.
    """
    weight = layer._base_weight().read()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    a, b = (factor.to(weight) for factor in layer._factors(name))
    scaling = float(layer.scaling[name])
    known = torch.linalg.svd(weight, full_matrices=False).U
    merged = top_singular_triplets(torch.addmm(weight, b, a, alpha=scaling), top_k)
    strange = (merged.u.t() @ known).abs().amax(dim=1) < epsilon
    count = int(strange.sum())
    if count == 0:
        return None
    left = merged.u[:, strange] * (merged.s[strange] * (share - 1) / scaling)
    u, s, vh = triplets_of_product(torch.cat([b, left], dim=1), torch.cat([a, merged.vh[strange]]))
    rank = a.shape[0]
    root = s[:rank].sqrt()
    new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
    new_a[: root.shape[0]] = root[:, None] * vh[:rank]
    new_b[:, : root.shape[0]] = u[:, :rank] * root
    return count, new_a, new_b

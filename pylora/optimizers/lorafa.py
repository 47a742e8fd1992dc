"""LoRA-FA: A is frozen, and B follows the gradient of the full weight as closely as that allows.

Source: https://arxiv.org/abs/2308.03303; the projection of B's gradient is that of PEFT's implementation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

# Added to the diagonal of A·Aᵀ before it is inverted.
_DAMPING = 1e-8


class _Update(NamedTuple):
    """One parameter to step: the key of its state, and for a B its A and the adapter's scaling."""

    state_key: str
    suffix: str
    param: torch.Tensor
    a: torch.Tensor | None = None
    scaling: float = 1.0


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradient of each B is projected: g_B = g_B (A·Aᵀ)⁻¹ / scaling², and A is left as it is.

    Made by `create_lorafa_optimizer`. Each parameter group has, beside `params`, the lists `names` and
    `scaling_factors` of the same length; a scaling factor is None where the parameter belongs to no adapter.

    Args:
        params: parameter groups as above.
        lr: learning rate, at least 0.
        betas: decay of the two running averages, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled weight decay.
        correct_bias: whether to correct the running averages for their start at zero.

    Numerics: the projection runs in f32, or in the parameters' dtype if that is wider.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: lr: expected at least 0, got {lr}")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: betas: expected each in [0, 1), got {beta}")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: eps: expected at least 0, got {eps}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._legacy_scaling_factor_warned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`, when given, computes the loss anew; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for update in _updates(group, self._scaling_factors(group)):
                if update.param.grad is not None:
                    self._step_param(group, update)
        return loss

    def _scaling_factors(self, group: dict[str, Any]) -> list[float | None]:
        if "scaling_factors" in group:
            factors: list[float | None] = group["scaling_factors"]
            return factors
        if "scaling_factor" not in group:
            raise KeyError("step: expected each parameter group to have `scaling_factors`")
        if not self._legacy_scaling_factor_warned:
            warnings.warn(
                "`scaling_factor` is deprecated: give each parameter its own in `scaling_factors`",
                FutureWarning,
                stacklevel=4,
            )
            self._legacy_scaling_factor_warned = True
        return [group["scaling_factor"]] * len(group["params"])

    def _step_param(self, group: dict[str, Any], update: _Update) -> None:
        param = update.param
        grad: Any = param.grad
        if update.a is not None:
            grad = _projected(grad, update.a, update.scaling)
        state: dict[str, Any] = self.state[update.state_key]  # type: ignore[index]  # keyed by name, as PEFT's
        average, average_sq = f"exp_avg{update.suffix}", f"exp_avg_sq{update.suffix}"
        if average not in state:
            state.setdefault("step", 0)
            state[average], state[average_sq] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state[average].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state[average_sq].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        param.addcdiv_(state[average], state[average_sq].sqrt().add_(group["eps"]), value=-step_size)
        if group["weight_decay"] > 0.0:
            param.mul_(1.0 - group["lr"] * group["weight_decay"])


def _updates(group: dict[str, Any], scaling_factors: list[float | None]) -> Iterator[_Update]:
    """What a step changes: each B with its A, and each parameter that is no factor. An A is never changed."""
    params = dict(zip(group["names"], group["params"], strict=True))
    taken: set[str] = set()
    for (name, param), scaling in zip(params.items(), scaling_factors, strict=True):
        module, factor, adapter = _split_factor_name(name)
        if factor.endswith("A"):
            continue
        a = params.get(f"{module}.{factor[:-1]}A.{adapter}") if factor else None
        if a is None or scaling is None:
            yield _Update(name, "", param)
            continue
        # The key under which PEFT keeps a pair's state; a second adapter of a layer gets one of its own.
        key = f"{module}.lora" if f"{module}.lora" not in taken else f"{module}.lora.{adapter.partition('.')[0]}"
        taken.add(key)
        yield _Update(key, "_B", param, a, float(scaling))


def _split_factor_name(name: str) -> tuple[str, str, str]:
    """(module, "lora_A" and the like, adapter and rest), of which the last two are empty where `name` is no factor."""
    for factor in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        module, separator, adapter = name.rpartition(f".{factor}.")
        if separator and not adapter.endswith(".bias"):
            return module, factor, adapter
    return name, "", ""


def _projected(grad: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """g_B (A·Aᵀ)⁻¹ / scaling², shaped and typed as g_B [out, r, ...]; block by block for a grouped convolution."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    rank = grad.shape[1]
    num_groups = a.shape[0] // rank
    blocks = a.to(dtype).reshape(num_groups, rank, -1)
    gram = blocks @ blocks.mT
    gram += _DAMPING * torch.eye(rank, dtype=dtype, device=a.device)
    inverse = torch.linalg.pinv(gram)
    wide_grad = grad.to(dtype).reshape(num_groups, -1, rank)
    return (wide_grad @ inverse / scaling**2).reshape(grad.shape).to(grad.dtype)


def create_lorafa_optimizer(
    model: Any,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freezes the factor A of every adapter of a model and makes the optimizer that trains the rest by LoRA-FA.

    Args:
        model: a `PeftModel`.
        r: rank of the adapter.
        lora_alpha: alpha of the adapter. Together with `r` it only gives the group's legacy `scaling_factor`; each
            layer's own scaling is used for its projection.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        use_rslora: deprecated; must agree with the configuration of all active adapters when given.

    Returns:
        a `LoraFAOptimizer` over all parameters of the model, in one group.

    Raises:
        ValueError: `use_rslora` disagrees with an active adapter's configuration. Nothing is frozen then.
    """
    rslora_of = {name: bool(config.use_rslora) for name, config in _active_configs(model).items()}
    if use_rslora is not None:
        differing = [name for name, own in rslora_of.items() if own != use_rslora]
        if differing:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but these active adapters are "
                f"configured otherwise: {differing}; set it in LoraConfig only"
            )
        warnings.warn(
            "create_lorafa_optimizer: `use_rslora` is deprecated: set it in LoraConfig", FutureWarning, stacklevel=2
        )
    rank_stabilised = use_rslora if use_rslora is not None else bool(rslora_of) and all(rslora_of.values())
    named = list(model.named_parameters())
    group = {
        "params": [param for _, param in named],
        "names": [name for name, _ in named],
        "scaling_factors": [_scaling_of(model, name) for name, _ in named],
        "scaling_factor": lora_alpha / (math.sqrt(r) if rank_stabilised else r),
        "lr": lr,
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    optimizer = LoraFAOptimizer([group])
    for name, param in named:
        if "lora_A" in name or "lora_embedding_A" in name:
            param.requires_grad_(False)
    return optimizer


def _active_configs(model: Any) -> dict[str, Any]:
    return {name: model.peft_config[name] for name in model.active_adapters if name in model.peft_config}


def _scaling_of(model: nn.Module, parameter_name: str) -> float | None:
    """The scaling of the adapter that a parameter belongs to, None where it belongs to none."""
    module_name, separator, rest = parameter_name.rpartition(".lora_")
    parts = rest.split(".")
    if not separator or len(parts) < 2:
        return None
    scaling: Any = getattr(model.get_submodule(module_name), "scaling", {})
    return scaling.get(parts[1])

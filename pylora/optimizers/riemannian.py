"""Riemannian preconditioning of LoRA's gradients (https://arxiv.org/abs/2402.02347, equation 5)."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer


class _LoraPair(NamedTuple):
    """The two factors of one adapter on one layer: a is [r, in_features], b is [out_features, r]."""

    a: nn.Parameter
    b: nn.Parameter


def _collect_lora_pairs(model: nn.Module) -> list[_LoraPair]:
    """The trainable pairs of matrices `lora_A`, `lora_B` of a model. Factors of convolutions are not matrices."""
    params = dict(model.named_parameters())
    pairs = []
    for name, a in params.items():
        b = params.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
        if b is not None and a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad:
            pairs.append(_LoraPair(a, b))
    return pairs


class _RiemannianPreconditioner:
    """Replaces the gradients of pairs by those of the Riemannian metric.

    Semantics: grad_A = (BᵀB + reg·I)⁻¹ grad_A, grad_B = grad_B (AAᵀ + reg·I)⁻¹. The matrices inverted are [r, r].

    Numerics: products and inverse in f32, or in the parameters' dtype if that is wider; rounded to the gradient's dtype
    at the end.
    """

    def __init__(self, lora_pairs: list[_LoraPair], reg: float) -> None:
        self.lora_pairs = lora_pairs
        self.reg = reg

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients that are there, in place."""
        for a, b in self.lora_pairs:
            dtype = torch.promote_types(a.dtype, torch.float32)
            if a.grad is not None:
                wide_b = b.detach().to(dtype)
                a.grad.copy_(self._damped_inverse(wide_b.T @ wide_b) @ a.grad.to(dtype))
            if b.grad is not None:
                wide_a = a.detach().to(dtype)
                b.grad.copy_(b.grad.to(dtype) @ self._damped_inverse(wide_a @ wide_a.T))

    def _damped_inverse(self, gram: torch.Tensor) -> torch.Tensor:
        # A pseudo-inverse, since B is zero at the start and reg may be as well.
        damped = gram + self.reg * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        return torch.linalg.pinv(damped)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer that preconditions the gradients of LoRA's factors before each step of `optimizer_cls`.

    Other trainable parameters, DoRA's magnitudes and the factors of embeddings and convolutions among them, are updated
    as `optimizer_cls` does it.

    Args:
        model: a model with LoRA adapters.
        optimizer_cls: the optimizer, for instance `torch.optim.AdamW`.
        lr: learning rate.
        reg: damping, added to the diagonal of the matrices that are inverted.
        **kwargs: further arguments of `optimizer_cls`.

    Returns:
        an instance of a subclass of `optimizer_cls`. Its `step` takes no closure: one would write the gradients anew
        after they were preconditioned.

    Raises:
        TypeError: `optimizer_cls` is not an optimizer class.
        ValueError: the model has no trainable pair, or `optimizer_cls` cannot do without a closure.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer_cls: {optimizer_cls.__name__} requires a closure, which would overwrite the preconditioned "
            "gradients; choose an optimizer that steps without one"
        )
    lora_pairs = _collect_lora_pairs(model)
    if not lora_pairs:
        raise ValueError("model: found no trainable lora_A/lora_B parameter pairs to precondition")
    preconditioner = _RiemannianPreconditioner(lora_pairs, reg)
    base: Any = optimizer_cls

    class RiemannianPreconditionedOptimizer(base):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "step: the Riemannian optimizer does not support closures: expected None, got a closure, which "
                    "would overwrite the preconditioned gradients"
                )
            preconditioner.step()
            return super().step()

    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer: Optimizer = RiemannianPreconditionedOptimizer(trainable, lr=lr, **kwargs)
    return optimizer

"""Optimizers made for LoRA's two factors, on top of `torch.optim`."""

from pylora.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from pylora.optimizers.loraplus import create_loraplus_optimizer
from pylora.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]

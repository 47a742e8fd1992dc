"""The ops: public functions over the native kernels, one file an op, each with its definition in `reference/`."""

from pylora.ops.lora import draw_rng, lora_add, lora_dropout, lora_linear

__all__ = ["draw_rng", "lora_add", "lora_dropout", "lora_linear"]

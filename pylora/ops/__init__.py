"""The ops: public functions over the native kernels, one file an op, each with its definition in `reference/`."""

from pylora.ops.bgmv import bgmv_, bgmv_expand_, bgmv_shrink
from pylora.ops.dense_layer import dense_forward, dense_mixed_forward, register_dora
from pylora.ops.devices import kernels_serve
from pylora.ops.dora import KeptNorms, dora_linear, dora_linear_norms, dora_row_norms, dora_row_squares
from pylora.ops.lanczos import bidiagonalise_, gram_product, ritz_residuals
from pylora.ops.lora import draw_rng, lora_add, lora_dropout, lora_linear
from pylora.ops.merge import merge_, merge_is_finite, swap_, unmerge_
from pylora.ops.multi_lora import AdapterPools, multi_lora_conv_, multi_lora_embedding_, multi_lora_linear
from pylora.ops.plan import BatchPlan
from pylora.ops.select import keep_largest
from pylora.ops.sgmv import sgmv_, sgmv_expand_, sgmv_shrink
from pylora.ops.uniform import uniform_

__all__ = [
    "AdapterPools",
    "BatchPlan",
    "KeptNorms",
    "bgmv_",
    "bgmv_expand_",
    "bgmv_shrink",
    "bidiagonalise_",
    "dense_forward",
    "dense_mixed_forward",
    "dora_linear",
    "dora_linear_norms",
    "dora_row_norms",
    "dora_row_squares",
    "draw_rng",
    "gram_product",
    "keep_largest",
    "kernels_serve",
    "lora_add",
    "lora_dropout",
    "lora_linear",
    "merge_",
    "merge_is_finite",
    "multi_lora_conv_",
    "multi_lora_embedding_",
    "multi_lora_linear",
    "register_dora",
    "ritz_residuals",
    "sgmv_",
    "sgmv_expand_",
    "sgmv_shrink",
    "swap_",
    "uniform_",
    "unmerge_",
]

"""LoRA layers, the registry that chooses one for a module, and the traversal that finds them in a model."""

from pylora.layers.attention import MultiheadAttention
from pylora.layers.base import BaseTunerLayer, LoraLayer
from pylora.layers.conv import Conv1d, Conv2d, Conv3d
from pylora.layers.embedding import Embedding
from pylora.layers.linear import Linear
from pylora.layers.merging import check_adapters_to_merge
from pylora.layers.parameter import ParamWrapper
from pylora.layers.registry import create_layer, find_factory, register_layer
from pylora.layers.walk import Visit, tuner_layers, walk

__all__ = [
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "MultiheadAttention",
    "ParamWrapper",
    "Visit",
    "check_adapters_to_merge",
    "create_layer",
    "find_factory",
    "register_layer",
    "tuner_layers",
    "walk",
]

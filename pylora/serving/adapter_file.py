"""One adapter as its files give it, checked against the layers of a pool."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from pylora.checkpoint.keys import MODEL_PREFIX
from pylora.checkpoint.read import start_loading
from pylora.config import PeftConfig, pattern_value, require_supported, scaling_for
from pylora.config.support import as_trained, belongs_to_changed_base
from pylora.errors import UnsupportedFeatureError
from pylora.serving.errors import AdapterFileError, AdapterMismatchError
from pylora.serving.spec import LayerShape

if TYPE_CHECKING:
    from torch import Tensor

    from pylora.checkpoint.safetensors_file import ReadingMemory

_A, _B = ".lora_A.weight", ".lora_B.weight"

_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)

# What a slot has no place for: it holds the two factors of dense layers. (field, why)
_NO_PLACE = {
    "use_dora": "DoRA scales whole rows of the base weight, which its other users share",
    "alora_invocation_tokens": "aLoRA switches within a sequence",
    "lora_bias": "a slot holds no biases",
    "modules_to_save": "a slot holds no whole modules",
    "trainable_token_indices": "a slot holds no embedding rows",
    "target_parameters": "a slot holds adapters of dense layers",
    "layer_replication": "the base model has other layers than the adapter",
}


class LayerFactors(NamedTuple):
    """The adapter of one layer.

    Attributes:
        a: `[rank, in_features]`, as stored.
        b: `[out_features, rank]`, as stored.
        scaling: factor on the product.
    """

    a: Tensor
    b: Tensor
    scaling: float


def read_adapter(
    folder: str | os.PathLike[str],
    layers: Mapping[str, LayerShape],
    max_rank: int,
    memory: ReadingMemory | None = None,
) -> dict[str, LayerFactors]:
    """Read and check an adapter.

    Args:
        folder: a local folder with an adapter in PEFT's format.
        layers: the layers it may have factors for.
        max_rank: the largest rank it may have.
        memory: where to read it to. The factors last until the next adapter is read there.

    Returns:
        the factors by layer, of the layers that it adapts.

    Raises:
        AdapterFileError: no such folder, or its files cannot be read.
        AdapterMismatchError: it is for another model, or its rank is too large, or the files contradict one another.
        UnsupportedFeatureError: it uses a mechanism that a pool does not serve, such as DoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterFileError(f"{os.fspath(folder)!r}: expected a local folder with an adapter, found none")
    try:
        config = PeftConfig.from_pretrained(folder)
        require_servable(config)
        weights = start_loading(folder, memory=memory)
    except UnsupportedFeatureError:
        raise
    except _READ_ERRORS as error:
        raise _unreadable(folder, error) from error
    try:
        return _factors(config, weights.tensors, layers, max_rank)  # names and shapes, while the data comes
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"{os.fspath(folder)!r}: {error}") from None
    finally:
        try:
            weights.wait()
        except _READ_ERRORS as error:
            raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{os.fspath(folder)!r}: cannot read the adapter: {error}")


def require_servable(config: Any) -> None:
    """Check that a pool can serve what `config` asks for.

    Raises:
        UnsupportedFeatureError: it cannot; the message names the field.
    """
    with as_trained(config):
        require_supported(config)
    for field, why in _NO_PLACE.items():
        if value := getattr(config, field, None):
            raise UnsupportedFeatureError(f"{field}={value!r}: an adapter pool cannot serve this: {why}")
    if getattr(config, "bias", "none") != "none":
        raise UnsupportedFeatureError(
            f"bias={config.bias!r}: an adapter pool cannot serve this: a slot holds no biases"
        )
    if belongs_to_changed_base(config):
        raise UnsupportedFeatureError(
            f"init_lora_weights={config.init_lora_weights!r}: an adapter pool cannot serve this: the adapter changes "
            "the base weight. Save it with `path_initial_model_for_weight_conversion`"
        )


def _factors(
    config: Any, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerShape], max_rank: int
) -> dict[str, LayerFactors]:
    found = {}
    for key in tensors:
        if not key.endswith(_A):
            if not key.endswith(_B):
                raise AdapterMismatchError(f"{key}: expected only lora_A and lora_B weights")
            if key.removesuffix(_B) + _A not in tensors:
                raise AdapterMismatchError(f"{key}: expected a lora_A beside it")
            continue
        stem = key.removesuffix(_A)
        name = stem.removeprefix(MODEL_PREFIX)
        if name not in layers:
            raise AdapterMismatchError(f"{key}: the pool has no layer {name!r}")
        if stem + _B not in tensors:
            raise AdapterMismatchError(f"{key}: expected a lora_B beside it")
        a, b = tensors[key], tensors[stem + _B]
        rank = pattern_value(config.rank_pattern, name, config.r)
        _check_shapes(name, a, b, rank, layers[name], max_rank)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        found[name] = LayerFactors(a, b, scaling_for(rank, alpha, config.use_rslora))
    if not found:
        raise AdapterMismatchError("expected lora_A and lora_B weights, found none")
    return found


def _check_shapes(name: str, a: Tensor, b: Tensor, rank: int, layer: LayerShape, max_rank: int) -> None:
    expected = ((rank, layer.in_features), (layer.out_features, rank))
    for which, tensor, shape in (("lora_A", a, expected[0]), ("lora_B", b, expected[1])):
        if tuple(tensor.shape) != shape:
            raise AdapterMismatchError(f"{name}.{which}: expected shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise AdapterMismatchError(f"{name}.{which}: expected floating point numbers, got {tensor.dtype}")
    if rank > max_rank:
        raise AdapterMismatchError(f"{name}: rank {rank}: the pool's max_rank is {max_rank}")

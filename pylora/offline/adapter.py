"""An adapter's files as layers: factors, rank, alpha and scaling by the name of the layer they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pylora.checkpoint import load_peft_weights
from pylora.checkpoint.files import StrPath, find_weights
from pylora.checkpoint.keys import MODEL_PREFIX
from pylora.config import PeftConfig, pattern_value, require_supported, scaling_for
from pylora.config.support import as_trained
from pylora.errors import UnsupportedFeatureError
from pylora.offline.errors import OfflineError
from pylora.offline.folders import local_folder

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "conv"]

_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "bias",
}
_FILES = ("adapter_config.json", "adapter_model.*")
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError)


@dataclass
class LayerWeights:
    """An adapter on one layer.

    Attributes:
        kind: Of layer.
        a: [rank, in], of an embedding [rank, entries], of a convolution [rank, in, kernel...].
        b: [out, rank], of an embedding [dim, rank], of a convolution [out, rank, 1...].
        alpha: Its alpha.
        scaling: Factor on B·A.
        magnitude: DoRA's; None without.
        bias: Of B, with `lora_bias`; None without.
    """

    kind: Kind
    a: Tensor
    b: Tensor
    alpha: float
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A as [rank, columns] and B as [rows, rank], whose product has the shape of the flattened weight; an
        embedding's is transposed."""
        return self.a.flatten(1), self.b.flatten(1)


@dataclass
class Adapter:
    """An adapter read from its files.

    Attributes:
        place: Where it came from, for messages.
        config: Its LoraConfig.
        layers: Its layers by name, without `base_model.model.`.
        others: Tensors that replace the base model's, by their names there: `modules_to_save`, trained biases.
    """

    place: str
    config: Any
    layers: dict[str, LayerWeights]
    others: dict[str, Tensor] = field(default_factory=dict)

    def parameters(self) -> int:
        """How many numbers the files hold."""
        tensors = [t for layer in self.layers.values() for t in (layer.a, layer.b, layer.magnitude, layer.bias)]
        return sum(t.numel() for t in (*tensors, *self.others.values()) if t is not None)


def read_adapter(place: StrPath) -> Adapter:
    """Read an adapter in PEFT's format.

    Args:
        place: A folder, or a hub id.

    Raises:
        OfflineError: no adapter there, broken files, or files that contradict one another.
        UnsupportedFeatureError: it is no LoRA adapter, or uses a mechanism that pylora does not have.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    folder = local_folder(str(place), "an adapter", _FILES)
    try:
        config: Any = PeftConfig.from_pretrained(folder)
        if not hasattr(config, "lora_alpha"):
            raise UnsupportedFeatureError(f"{place}: expected a LoRA adapter, got peft_type {config.peft_type}")
        with as_trained(config):
            require_supported(config)
        find_weights(folder)
        tensors = load_peft_weights(folder, device="cpu")
    except UnsupportedFeatureError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        EOFError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise OfflineError(f"{place}: cannot read the adapter: {error}") from error
    return adapter_of(str(place), config, tensors)


def adapter_of(place: str, config: Any, tensors: dict[str, Tensor]) -> Adapter:
    """Sort the tensors of a checkpoint into layers.

    Raises:
        OfflineError: they do not fit one another or the configuration.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), {}
    for key, tensor in tensors.items():
        name = key.removeprefix(MODEL_PREFIX)
        suffix = next((each for each in _PARTS if name.endswith(each)), None)
        if suffix is None:
            others[name] = tensor
            continue
        layer = name.removesuffix(suffix)
        parts.setdefault(layer, {})[_PARTS[suffix]] = tensor
        if "embedding" in suffix:
            embeddings.add(layer)
    layers = {
        name: _layer(place, config, name, parts[name], name in embeddings) for name in sorted(parts, key=_in_order)
    }
    if not layers and not others:
        raise OfflineError(f"{place}: expected lora_A and lora_B weights, found no tensors")
    return Adapter(place, config, layers, others)


def _in_order(name: str) -> list[tuple[int, int | str]]:
    """Sorts layer 10 behind layer 2."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _layer(place: str, config: Any, name: str, parts: dict[str, Tensor], is_embedding: bool) -> LayerWeights:
    missing = [f"lora_{part.upper()}" for part in ("a", "b") if part not in parts]
    if missing:
        raise OfflineError(f"{place}: {name}: expected lora_A and lora_B, found no {missing[0]}")
    a, b = parts["a"], parts["b"]
    kind: Kind = "embedding" if is_embedding else "linear" if a.dim() == 2 else "conv"
    rank = pattern_value(config.rank_pattern, name, config.r)
    if min(a.dim(), b.dim()) < 2 or a.shape[0] != b.shape[1]:
        raise OfflineError(
            f"{place}: {name}: expected A [rank, ...] and B [out, rank, ...], got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.shape[0] != rank:
        raise OfflineError(f"{place}: {name}: its configuration says rank {rank}, its tensors have {a.shape[0]}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise OfflineError(f"{place}: {name}: expected floating point numbers, got {a.dtype} and {b.dtype}")
    if ("magnitude" in parts) != bool(config.use_dora):
        raise OfflineError(f"{place}: {name}: use_dora={config.use_dora}, and a magnitude is {_there(parts)}")
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    scaling = scaling_for(rank, alpha, config.use_rslora)
    return LayerWeights(kind, a, b, alpha, scaling, parts.get("magnitude"), parts.get("bias"))


def _there(parts: dict[str, Tensor]) -> str:
    return "there" if "magnitude" in parts else "missing"


def checkpoint_tensors(layers: dict[str, LayerWeights], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that a checkpoint gives them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stem = f"{MODEL_PREFIX}{name}"
        factor = "lora_embedding_{}" if layer.kind == "embedding" else "lora_{}.weight"
        tensors[f"{stem}.{factor.format('A')}"] = layer.a
        tensors[f"{stem}.{factor.format('B')}"] = layer.b
        if layer.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = layer.magnitude
        if layer.bias is not None:
            tensors[f"{stem}.lora_B.bias"] = layer.bias
    return tensors | {MODEL_PREFIX + name: tensor for name, tensor in others.items()}


def write_adapter(folder: Path, config: Any, layers: dict[str, LayerWeights], others: dict[str, Tensor]) -> None:
    """Write an adapter's two files into a folder that nobody reads yet."""
    from pylora.checkpoint.save import write_weights

    write_weights(checkpoint_tensors(layers, others), folder)
    config.save_pretrained(folder)

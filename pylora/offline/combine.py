"""Several adapters' files combined into one adapter's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pylora.combine import Combination, Term, check_combination, combine_terms, combined_config, combined_rank
from pylora.errors import UnsupportedFeatureError
from pylora.offline.adapter import Adapter, LayerWeights, write_adapter
from pylora.offline.errors import OfflineError
from pylora.offline.folders import check_output, new_folder


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: Combination,
    folder: Path,
    progress: Callable[[int], Any] | None = None,
) -> Any:
    """Write an adapter that is the weighted combination of others, as `add_weighted_adapter` makes it of a model's.

    Args:
        adapters: At least one, of one base model.
        weights: One for each.
        how: The combination; its `rank` is the one wished for where the kind has a choice, 0 for none.
        folder: New or empty. It is there when all is written, or not at all.
        progress: Called with 1 after each layer.

    Returns:
        the new adapter's configuration.

    Raises:
        OfflineError: the adapters do not go together, or the options do not.
        UnsupportedFeatureError: DoRA, whose magnitudes no kind combines, or tensors beside the factors.
        OSError: the files cannot be written.
    """
    for adapter in adapters:
        if adapter.config.use_dora:
            raise UnsupportedFeatureError(f"{adapter.place}: use_dora: magnitudes of DoRA cannot be combined")
        if adapter.others:
            name = next(iter(adapter.others))
            raise UnsupportedFeatureError(f"{adapter.place}: {name}: whole tensors cannot be combined, only factors")
    check_output(folder, tuple(Path(adapter.place) for adapter in adapters if Path(adapter.place).is_dir()))
    if len(adapters) == 1:
        how = dataclasses.replace(how, kind="linear")
    configs = [adapter.config for adapter in adapters]
    try:
        check_combination(how)
        how = dataclasses.replace(how, rank=combined_rank(configs, how))
        config = combined_config(configs, how.rank)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OfflineError(str(error)) from None
    layers = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        layers[name] = _combined(name, adapters, weights, how)
        if progress is not None:
            progress(1)
    config.init_lora_weights = True
    config.inference_mode = True
    with new_folder(folder) as staging:
        write_adapter(staging, config, layers, {})
    return config


def _combined(name: str, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> LayerWeights:
    present = [
        (adapter.layers[name], weight, adapter.config.fan_in_fan_out)
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter.layers
    ]
    first = present[0][0]
    shapes = {(layer.kind, layer.a.shape[1:], layer.b.shape[0]) for layer, *_ in present}
    if len(shapes) > 1:
        found = ", ".join(f"[{rows}, {', '.join(map(str, columns))}]" for _, columns, rows in sorted(shapes, key=str))
        raise OfflineError(f"{name}: expected adapters of one model, got deltas of shapes {found}")
    terms = [
        Term(layer.a, layer.b, layer.scaling, weight, transposed=layer.kind == "embedding" or transposed)
        for layer, weight, transposed in present
    ]
    try:
        a, b = combine_terms(terms, how)
    except RuntimeError as error:
        raise OfflineError(f"{name}: {error}") from None
    biases = [layer.scaling * weight * layer.bias for layer, weight, _ in present if layer.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return LayerWeights(first.kind, a, b, how.rank, 1.0, bias=bias)

"""Merging into a model whose input and output embeddings share one weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from pylora.targeting.defaults import EMBEDDING_LAYER_NAMES

_UNTIE_HINT = """\
Both embeddings would hold the merged values. To merge into one of them only, save the model untied and wrap that one:

```python
model = AutoModelForCausalLM.from_pretrained(model_id, tie_word_embeddings=False)
model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
model.save_pretrained(untied_model_dir)
model.config.save_pretrained(untied_model_dir)

# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


def tied_target_modules(model_config: dict[str, Any], targeted_names: Iterable[str]) -> list[str]:
    """The targeted modules that are embeddings by name, in a model whose configuration ties them."""
    if not model_config.get("tie_word_embeddings"):
        return []
    return [name for name in targeted_names if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]


def warn_tied_merge(tied_target_modules: list[str]) -> None:
    """Warn that a merge changes the tied partner of these modules as well."""
    if tied_target_modules:
        warnings.warn(
            f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the adapter. "
            "This can lead to complications. " + _UNTIE_HINT,
            stacklevel=3,
        )


def record_broken_tie(model: Any, model_config: dict[str, Any]) -> None:
    """Set `tie_word_embeddings=False` in the model's config, with a warning, if its embeddings are no longer tied."""
    if not model_config.get("tie_word_embeddings"):
        return
    try:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        return
    weights = [embedding.weight for embedding in embeddings if hasattr(embedding, "weight")]
    if len(weights) < 2 or weights[0].data_ptr() == weights[1].data_ptr():
        return
    model.config.tie_word_embeddings = False
    warnings.warn(
        "Input and output embeddings are no longer tied after merging. "
        "Setting `tie_word_embeddings=False` in the model config.",
        stacklevel=3,
    )

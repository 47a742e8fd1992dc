"""The README.md that is saved beside an adapter, so that the Hugging Face Hub can list and run it."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.config.base import PEFT_FORMAT_VERSION

if TYPE_CHECKING:
    from pylora.model.peft_model import PeftModel

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
_VERSIONS_HEADING = "### Framework versions"
_QUANTIZATION_HEADING = "### Quantization of the base model"
_LISTED_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "task_type",
)

# The front matter is filled in by the hub's own class. What only the author knows is asked for in brackets.
_BODY = """---
{{}}
---

# LoRA adapter for {name}

Weights and configuration of a LoRA adapter in the format of PEFT. They change nothing by themselves: they are loaded
onto their base model, {name}.

| setting | value |
| --- | --- |
{settings}
## Use

```python
from pylora import PeftModel  # or: from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

`model.merge_and_unload()` adds the adapter to the weights and gives the base model back. To go on training, load with
`is_trainable=True`.

## About this adapter

- **Made by:** [who trained it]
- **Purpose:** [what it should make the model better at, in which languages]
- **Training data:** [source, size, licence, how it was cleaned]
- **Training:** [loss, optimizer, learning rate, steps, batch size, dtype, hardware]
- **Evaluation:** [on what, with which result; the base model's result beside it]
- **Limits and risks:** [where it fails, what it should not be used for]
- **Licence:** [that of the base model applies as well]
"""


def model_card_text(model: PeftModel, existing: Path | None = None) -> str | None:
    """The card's text: YAML front matter that the hub reads, and a body.

    Args:
        model: the adapted model; its active adapter gives the tags.
        existing: a card to bring up to date. Its body and its other front matter are kept.

    Returns:
        the text, or None without `huggingface_hub`, which reads and writes the front matter.
    """
    if find_spec("huggingface_hub") is None:
        logger.info("no model card: huggingface_hub is not installed")
        return None
    from huggingface_hub import ModelCard

    from pylora.model.task_models import PeftModelForCausalLM

    # Bytes, not text mode: a card written on another system keeps its line ends.
    text = existing.read_bytes().decode("utf-8") if existing is not None and existing.exists() else _new_body(model)
    card = ModelCard(text, ignore_metadata_errors=True)
    # The name of the format's library: it tells the hub how to load the files.
    card.data["library_name"] = "peft"
    tags = set(card.data.get("tags") or []) | set(_tags(model))
    if tags:
        card.data["tags"] = sorted(tags)
    if not card.data.get("pipeline_tag") and isinstance(model, PeftModelForCausalLM):
        card.data["pipeline_tag"] = "text-generation"
    base_config = _base_config(model)
    if "_name_or_path" in base_config:
        card.data["base_model"] = base_config["_name_or_path"]
    card.text = _with_versions(_with_quantization(card.text, base_config.get("quantization_config")))
    return str(card)


def _new_body(model: PeftModel) -> str:
    name = _base_config(model).get("_name_or_path") or type(model.get_base_model()).__name__
    return _BODY.format(name=name, settings=_settings_table(model))


def _settings_table(model: PeftModel) -> str:
    """What is set to something, of the adapter that the folder itself is for, or else of the active one."""
    config = model.peft_config.get("default") or model.active_peft_config
    rows = []
    for name in _LISTED_SETTINGS:
        value = getattr(config, name, None)
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        if value not in (None, [], {}, False):
            text = str(value).replace("|", "\\|")  # a regular expression may hold what ends a table's cell
            rows.append(f"| `{name}` | `{text}` |\n")
    return "".join(rows)


def _tags(model: PeftModel) -> list[str]:
    base = model.get_base_model()
    tags = ["lora", *(getattr(base, "model_tags", None) or [])]
    if any(cls.__name__ == "PreTrainedModel" for cls in type(base).__mro__):
        tags.append("transformers")
    if name := getattr(base, "name_or_path", None):
        tags.append(f"base_model:adapter:{name}")
    return tags


def _base_config(model: PeftModel) -> dict[str, Any]:
    config: Any = getattr(model.get_base_model(), "config", None)
    if isinstance(config, dict):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _with_quantization(text: str, quantization: Any) -> str:
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if not quantization or _QUANTIZATION_HEADING in text.splitlines():
        return text
    lines = "\n".join(f"- {name}: {value}" for name, value in quantization.items())
    return f"{text.rstrip()}\n\n{_QUANTIZATION_HEADING}\n\n{lines}\n"


def _with_versions(text: str) -> str:
    line = f"- PEFT {PEFT_FORMAT_VERSION}"
    if line in text.splitlines():
        return text
    if _VERSIONS_HEADING in text.splitlines():
        return re.sub(rf"^{re.escape(_VERSIONS_HEADING)}\n+", rf"\g<0>{line}\n", text, count=1, flags=re.MULTILINE)
    return f"{text.rstrip()}\n\n{_VERSIONS_HEADING}\n\n{line}\n"

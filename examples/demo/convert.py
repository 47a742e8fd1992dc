"""From the 4-bit GGUF file to an ordinary float32 transformers folder, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cache

# Raise the number when this file writes something else than before: older conversions are then made again.
_RECIPE = "float32 safetensors 1"
STAGES = ("reading the tokenizer", "reading and dequantising the weights", "writing safetensors")


def convert(gguf: Path, gguf_sha256: str, folder: Path, on_stage: Callable[[str], None]) -> Path:
    """The folder with the float32 model and its tokenizer: the one there if it is intact, else converted afresh.

    Args:
        gguf: the GGUF file; read only when a conversion is needed.
        gguf_sha256: its SHA-256; a conversion of another file does not count.
        folder: where the conversion is kept, sealed (see ``cache``).
        on_stage: called at the start of each of ``STAGES``.
    """
    recipe = recipe_for(gguf_sha256)
    if cache.flaw(folder, recipe) is not None:
        with cache.building(folder, recipe) as scratch:
            _write_safetensors(gguf, scratch, on_stage)
    return folder


def recipe_for(gguf_sha256: str) -> str:
    """What a complete conversion of this GGUF file is sealed with."""
    return f"{_RECIPE} from {gguf_sha256}"


def _write_safetensors(gguf: Path, target: Path, on_stage: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    on_stage(STAGES[0])
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    on_stage(STAGES[1])
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # transformers refuses to save a model that it read from GGUF, although its weights are plain numbers by now.
    # A model whose configuration does not mention the quantisation adopts the tensors, and that one can be saved.
    on_stage(STAGES[2])
    settings = dequantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    plain.load_state_dict({name: tensor.float() for name, tensor in dequantised.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.generation_config = dequantised.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)

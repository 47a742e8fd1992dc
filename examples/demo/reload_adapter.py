"""A fresh process that knows nothing but the files: base model, saved adapter and one row of tokens, logits out.

The demo starts it to show that a saved adapter is complete. By hand:

    python examples/demo/reload_adapter.py BASE_FOLDER ADAPTER_FOLDER ROW.safetensors LOGITS.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluation import logits_of
from pylora import PeftModel


def main(base_folder: str, adapter_folder: str, row_file: str, logits_file: str, threads: str = "0") -> None:
    """Read ``row`` (int64 ``[row_tokens]``), write ``logits`` (float32 ``[row_tokens, vocabulary]``)."""
    if int(threads) > 0:
        torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(model, adapter_folder)
    save_file({"logits": logits_of(model, load_file(row_file)["row"])}, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])

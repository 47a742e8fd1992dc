"""Speed up a model of PEFT's by one line: `pylora.patch_peft()`.

python examples/patch_peft.py [--tokens 64] [--layers 4]

Times the same peft.PeftModel without and with it: a training step with dropout, generation, a batch in which every row
has an adapter of its own, and merging. The model is a small random Llama in bfloat16, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch

import pylora
from pylora.testing.llama import VOCABULARY, tiny_llama

ADAPTERS = [f"adapter{i}" for i in range(8)]


def make_model(layers: int) -> peft.PeftModel:
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(layers).bfloat16(), config, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.01)
    return model


def work(model: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    ids = torch.randint(0, VOCABULARY, (len(ADAPTERS), tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.train()
        model(input_ids=ids[:2], labels=ids[:2]).loss.backward()
        model.zero_grad()

    @torch.no_grad()
    def generate() -> Any:
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.eval().generate(input_ids=ids[:1, :8], **settings)

    @torch.no_grad()
    def mixed() -> Any:
        return model.eval()(input_ids=ids[:, :8], adapter_names=ADAPTERS).logits

    def merge() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return {"training step": step, "generation": generate, "mixed batch": mixed, "merge and unmerge": merge}


def milliseconds(function: Callable[[], Any], repeat: int = 3) -> float:
    """The least of some runs, after one that is not counted."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a model of PEFT's without and with pylora.patch_peft().")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*already.*merged")
    model = make_model(arguments.layers)
    tasks = work(model, arguments.tokens)
    weight = next(module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)).base_layer.weight
    before = weight.detach().clone()

    alone = {name: milliseconds(task) for name, task in tasks.items()}
    drift = (weight != before).float().mean().item()
    with torch.no_grad():
        weight.copy_(before)
    pylora.patch_peft()
    try:
        patched = {name: milliseconds(task) for name, task in tasks.items()}
    finally:
        pylora.unpatch_peft()
    for name in tasks:
        times = alone[name] / patched[name]
        print(f"{name:18} PEFT {alone[name]:8.1f} ms   patched {patched[name]:8.1f} ms   {times:.1f} times as fast")
    exact = (weight != before).float().mean().item()
    print(f"weights changed by merging and unmerging: PEFT {drift:.1%}, patched {exact:.1%}")


if __name__ == "__main__":
    main()

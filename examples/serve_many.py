"""Serve many adapters of one base model: every request of a batch with its own, base requests beside them.

python examples/serve_many.py [--adapters 200] [--slots 16] [--requests 64]

The model is a small random Llama and the adapters are random, so nothing is downloaded. Adapters lie on disk; the pool
keeps the ones in use in its slots. Popularity follows Zipf's law, as it does in practice.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pylora import LoraConfig
from pylora.serving import AdapterPool, Answer, ContinuousRuntime, PoolSpec, Request, ServingRuntime

TARGETS = ["q_proj", "v_proj"]
BATCH = 16


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # random weights have no end of text
    model.generation_config.pad_token_id = 0
    return model


def write_adapter(folder: Path, spec: PoolSpec, rank: int) -> None:
    """What training would leave: a configuration, and two factors for each layer."""
    LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS).save_pretrained(folder)
    tensors = {}
    for name, (in_features, out_features) in spec.layers.items():
        if name.endswith(tuple(TARGETS)):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, in_features) * 0.1
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out_features, rank) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")


def make_requests(count: int, num_adapters: int) -> list[Request]:
    """Adapter i is asked for 1 / i as often as the first one; every eighth request wants the base model."""
    rng = random.Random(0)
    popularity = [1 / (i + 1) for i in range(num_adapters)]
    requests = []
    for i in range(count):
        adapter = None if i % 8 == 7 else f"adapter-{rng.choices(range(num_adapters), popularity)[0]}"
        requests.append(Request([rng.randrange(1, 1000) for _ in range(rng.randrange(4, 16))], adapter, 12))
    return requests


def in_batches(runtime: ServingRuntime, requests: list[Request]) -> list[Answer]:
    return [each for first in range(0, len(requests), BATCH) for each in runtime.serve(requests[first : first + BATCH])]


def timed(serve: Callable[[list[Request]], list[Answer]], requests: list[Request]) -> float:
    """Tokens a second."""
    start, tokens = time.perf_counter(), 0
    for answer in serve(requests):
        if answer.error is not None:
            raise answer.error
        tokens += len(answer.tokens)
    return tokens / (time.perf_counter() - start)


def run(folder: Path, num_adapters: int, num_slots: int, num_requests: int) -> None:
    model = make_model()
    with AdapterPool(model, num_slots, max_rank=16) as pool:
        for i in range(num_adapters):
            path = folder / f"adapter-{i}"
            write_adapter(path, pool.spec, rank=(4, 8, 16)[i % 3])
            pool.register(path.name, path)
        runtime = ServingRuntime(model, pool)

        print("streaming two requests of one batch:")
        names = ["adapter-0", "base"]
        for event in runtime.stream([Request([5, 6, 7], "adapter-0", 4), Request([5, 6, 7], None, 4)]):
            print(f"  {names[event.request]}: {'end' if event.token is None else event.token}")

        print("a request for an adapter that nobody has, beside a good one:")
        for answer in runtime.serve([Request([1, 2], "adapter-x", 4), Request([1, 2], "adapter-1", 4)]):
            print(f"  {answer.error or answer.tokens}")

        requests = make_requests(num_requests, num_adapters)
        base_requests = [Request(each.prompt, None, each.max_new_tokens) for each in requests]
        serve = partial(in_batches, runtime)
        timed(serve, base_requests[:BATCH])  # the first batch is slower
        base = timed(serve, base_requests)
        mixed = timed(serve, requests)
        stats = pool.stats()
        runtime.detach()
        with ContinuousRuntime(model, pool) as continuous:
            joined = timed(continuous.serve, requests)
        print(f"{num_requests} requests over {num_adapters} adapters, {pool.num_slots} slots:")
        print(f"  {mixed:.0f} tokens/s, {mixed / base:.2f} of the base model's {base:.0f}")
        print(f"  {joined:.0f} tokens/s by continuous batching")
        print(
            f"  {stats.hits} hits, {stats.misses} misses, {stats.load_times.total * 1e3 / stats.misses:.2f} ms a load"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve many adapters in mixed batches.")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.adapters, arguments.slots, arguments.requests)


if __name__ == "__main__":
    main()

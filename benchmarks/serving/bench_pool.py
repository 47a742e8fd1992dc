"""What it costs that adapters have to be brought into slots, beside a pool that holds them all."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pylora import LoraConfig
from pylora.bench import Work, benchmark
from pylora.serving import AdapterPool, PoolSpec, Request, ServingRuntime

TARGETS = ["q_proj", "v_proj"]  # 8 layers of the model's 4 blocks
VOCABULARY = 2000
NUM_BATCHES = 64
WARM_BATCHES = 16  # after which the slots hold what the load asks for


@functools.cache
def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def make_adapters(count: int, rank: int) -> list[Path]:
    """Adapters on disk, deleted at the end of the process."""
    folder = tempfile.TemporaryDirectory(prefix="pylora-bench-")
    make_adapters.keep = folder  # type: ignore[attr-defined]
    spec = PoolSpec.from_model(make_model(), TARGETS)
    generator = torch.Generator().manual_seed(0)
    paths = [Path(folder.name) / str(i) for i in range(count)]
    config = Path(folder.name) / "config"
    LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS).save_pretrained(config)
    for path in paths:
        shutil.copytree(config, path)
        tensors = {}
        for name, (width, outputs) in spec.layers.items():
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * width**-0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.05
        save_file(tensors, path / "adapter_model.safetensors")
    return paths


def make_batches(adapters: int, requests: int, prompt: int, new: int, exponent: float) -> list[list[Request]]:
    """Adapter i is asked for (i + 1)^-exponent as often as the first."""
    rng = random.Random(0)
    weights = [(i + 1) ** -exponent for i in range(adapters)]
    return [
        [
            Request([rng.randrange(1, VOCABULARY) for _ in range(prompt)], str(i), new)
            for i in rng.choices(range(adapters), weights, k=requests)
        ]
        for _ in range(NUM_BATCHES)
    ]


class Served:
    """A pool, and batches for it one after the other."""

    def __init__(self, slots: int, paths: list[Path], batches: list[list[Request]]) -> None:
        self.pool = AdapterPool(PoolSpec.from_model(make_model(), TARGETS), slots, max_rank=4)
        for path in paths:
            self.pool.register(path.name, path)
        if slots >= len(paths):
            for path in paths:
                self.pool.load(path.name)
        for batch in batches[:WARM_BATCHES]:
            self.pool.release(self.pool.acquire([request.adapter for request in batch]))
        self._later = itertools.cycle(batches[WARM_BATCHES:])

    def next_batch(self) -> list[list[int]]:
        """Serve one batch: load what is missing, generate."""
        runtime = ServingRuntime(make_model(), self.pool)
        try:
            answers = runtime.serve(next(self._later))
        finally:
            runtime.detach()
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.tokens for answer in answers]


def hit_rate(slots: int, paths: list[Path], batches: list[list[Request]]) -> float:
    """Share of the requests behind the warm batches whose adapter was in a slot."""
    served = Served(slots, paths, batches)
    before = served.pool.stats()
    for batch in batches[WARM_BATCHES:]:
        served.pool.release(served.pool.acquire([request.adapter for request in batch]))
    stats = served.pool.stats()
    hits, misses = stats.hits - before.hits, stats.misses - before.misses
    return hits / (hits + misses)


@benchmark(base="all adapters in slots", table=({"prompt": 1}, {}, {"new": 16}))
def pool(
    adapters: int = 2000, slots: int = 64, requests: int = 32, prompt: int = 16, new: int = 1, exponent: float = 1.56
) -> Work:
    """A batch of a 4-block Llama of width 512 (rank 4) under a zipf load of 2,000 adapters, 90 % of them in slots."""
    paths = make_adapters(adapters, rank=4)
    batches = make_batches(adapters, requests, prompt, new, exponent)
    base, few = Served(adapters, paths, batches), Served(slots, paths, batches)

    def check() -> None:
        share = hit_rate(slots, paths, batches)
        assert 0.88 <= share <= 0.92, f"{share:.3f} of the requests are hits"
        for _ in range(2):
            assert base.next_batch() == few.next_batch(), "answers differ"

    return Work({"base": lambda: base.next_batch(), "pylora": lambda: few.next_batch()}, check, inner=1)

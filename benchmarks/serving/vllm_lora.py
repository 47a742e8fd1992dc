"""Tokens a second of vLLM on the CPU with adapters, as shares of the base model's in the same engine.

    python benchmarks/serving/vllm_lora.py [--turns 7]                      # in a venv with vLLM and pylora
    PYLORA_VLLM=0 python benchmarks/serving/vllm_lora.py                    # vLLM's own products

A Llama of 4 layers and width 512 in f32, 64 adapters of rank 16 on its 7 targets, 64 requests of 16 tokens that ask for
32 more; a prefill is 64 prompts of 256 tokens. `make test-vllm` makes such a venv. The cases take turns; shares of the
fastest runs and of the medians are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_ADAPTERS, NUM_REQUESTS, RANK, VOCABULARY = 64, 64, 16, 2000
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(folder: Path) -> Any:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, **sizes))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t3").save_pretrained(folder)
    return model


def write_adapter(folder: Path, model: Any, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    from pylora import LoraConfig

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            stem = f"base_model.model.{name}"
            a = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            tensors[f"{stem}.lora_A.weight"] = a
            tensors[f"{stem}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 0.05
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class Engine:
    """vLLM's engine with LoRA enabled, and the batches that are timed."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._llm = LLM(
            model=str(folder / "model"),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=NUM_REQUESTS,
            max_num_batched_tokens=2048,
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=NUM_ADAPTERS,
            max_lora_rank=RANK,
        )
        self._adapters = [LoRARequest(f"a{i}", i + 1, str(folder / str(i))) for i in range(NUM_ADAPTERS)]

    def close(self) -> None:
        """End the engine's processes, for which this one would wait at its end."""
        self._llm.llm_engine.engine_core.shutdown()

    def run(self, adapters: Sequence[int | None], prompt: int = 16, new: int = 32) -> tuple[float, list[Any]]:
        """Seconds, and the answers. Request i uses the i-th adapter."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [(7 * i + j) % 1900 + 10 for j in range(prompt)]} for i in range(NUM_REQUESTS)]
        requests = [None if i is None else self._adapters[i] for i in adapters]
        options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, options, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - start, [tuple(each.outputs[0].token_ids) for each in outputs]


def measure(engine: Engine, turns: int, prefill_turns: int) -> dict[str, Any]:
    """Shares of the fastest and of the medians. A prefill takes as long as all other cases of a turn."""
    cases = {
        "base": ([None] * NUM_REQUESTS, 16, 32),
        "1": ([0] * NUM_REQUESTS, 16, 32),
        "8": ([i % 8 for i in range(NUM_REQUESTS)], 16, 32),
        "64": (list(range(NUM_REQUESTS)), 16, 32),
        "prefill base": ([None] * NUM_REQUESTS, 256, 1),
        "prefill 1": ([0] * NUM_REQUESTS, 256, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):  # the first warms up
        for name, case in cases.items():
            if name.startswith("prefill") and turn > prefill_turns:
                continue
            took, answers = engine.run(*case)
            if name == "base":
                base_answers = answers
            if turn:
                seconds[name].append(took)
    mixed = engine.run([None if i % 2 == 0 else i for i in range(NUM_REQUESTS)])[1]
    changed = sum(mixed[i] != base_answers[i] for i in range(0, NUM_REQUESTS, 2))

    def ratio(over: str, under: str) -> list[float]:
        return [round(of(seconds[over]) / of(seconds[under]), 3) for of in (min, statistics.median)]

    return {
        "base tokens/s": round(NUM_REQUESTS * 32 / min(seconds["base"])),
        **{f"share of base, {name} adapters": ratio("base", name) for name in ("1", "8", "64")},
        "prefill, x base": ratio("prefill 1", "prefill base"),
        "base rows changed": f"{changed} of {NUM_REQUESTS // 2}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Multi-LoRA serving in vLLM on the CPU.")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prefill-turns", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    with tempfile.TemporaryDirectory(prefix="pylora-bench-") as name:
        folder = Path(name)
        model = write_model(folder / "model")
        for i in range(NUM_ADAPTERS):
            write_adapter(folder / str(i), model, i)
        engine = Engine(folder)
        try:
            print(json.dumps(measure(engine, arguments.turns, arguments.prefill_turns)))
        finally:
            engine.close()


if __name__ == "__main__":
    main()

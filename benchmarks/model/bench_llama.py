"""A random Llama of 16 layers, 512 wide, with adapters on its 112 linear modules: generation, training, lifecycle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pylora.bench import Work, benchmark, inference, libraries
from pylora.testing.llama import VOCABULARY, tiny_llama


def adapted(library: Any, layers: int = 16, **config: Any) -> Any:
    settings = {"r": 16, "target_modules": "all-linear", "init_lora_weights": False} | config
    torch.manual_seed(1)
    return library.get_peft_model(tiny_llama(layers), library.LoraConfig(**settings))


def same_logits(models: dict[str, Any], ids: torch.Tensor, tolerance: float = 1e-3) -> None:
    """The libraries' models agree: they drew the same adapter."""
    with torch.inference_mode():
        first, *others = [model(input_ids=ids).logits for model in models.values()]
    for other in others:
        torch.testing.assert_close(other, first, rtol=tolerance, atol=tolerance * float(first.abs().max()))


@benchmark(base="generation without an adapter")
def generate(new_tokens: int = 24) -> Work:
    """Greedy generation of one sequence with one adapter."""
    ids = torch.randint(0, VOCABULARY, (1, 8))
    settings: dict[str, Any] = {
        "input_ids": ids,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    models = {name: adapted(library).eval() for name, library in libraries().items()}
    base = tiny_llama()
    providers = {"base": inference(lambda: base.generate(**settings))}
    providers |= {name: inference(lambda model=model: model.generate(**settings)) for name, model in models.items()}
    return Work(providers, lambda: same_logits(models, ids), inner=1)


@benchmark(base="the gradient of the embedding, no adapter")
def train_step(dropout: float = 0.1) -> Work:
    """Forward and backward of 2 x 128 tokens through 8 layers (56 modules)."""
    ids = torch.randint(0, VOCABULARY, (2, 128))
    base = tiny_llama(8).train().requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_(True)
    models = {name: adapted(library, 8, lora_dropout=dropout).train() for name, library in libraries().items()}

    def step(model: Any) -> Callable[[], None]:
        return lambda: model(input_ids=ids, labels=ids).loss.backward()

    def check() -> None:
        """The gradients of the libraries' models, without dropout."""
        for model in models.values():
            model.eval()(input_ids=ids, labels=ids).loss.backward()
            model.train()
        parameters = [dict(model.named_parameters()) for model in models.values()]
        for name, first in parameters[0].items():
            for other in parameters[1:]:
                if first.grad is not None:
                    limit = 1e-3 * float(first.grad.abs().max())
                    torch.testing.assert_close(other[name].grad, first.grad, rtol=1e-3, atol=limit)

    providers = {"base": step(base)} | {name: step(model) for name, model in models.items()}
    return Work(providers, check, inner=1)


def _lifecycle(act: Callable[[Any, Any], object], prepare: Callable[[Any], Any], check: Callable[[], None]) -> Work:
    """`act` on what `prepare` makes, outside the clock, for each library."""
    found = libraries()
    providers = {name: (lambda state, library=library: act(library, state)) for name, library in found.items()}
    return Work(providers, check, before=lambda name: prepare(found[name]))


@benchmark(base="")
def wrap() -> Work:
    """get_peft_model on 112 modules."""

    def check() -> None:
        modules = [
            name for name, _ in adapted(libraries()["pylora"]).named_modules() if name.endswith("lora_A.default")
        ]
        assert len(modules) == 112, f"{len(modules)} adapted modules"

    return _lifecycle(
        lambda library, model: library.get_peft_model(model, library.LoraConfig(r=16, target_modules="all-linear")),
        lambda library: tiny_llama(),
        check,
    )


@benchmark(base="")
def load() -> Work:
    """load_adapter of 112 modules from a file in the page cache."""
    folder = tempfile.TemporaryDirectory(prefix="pylora-bench-")
    saved = adapted(libraries()["pylora"])
    saved.save_pretrained(folder.name)

    def act(library: Any, model: Any) -> None:
        model.load_adapter(folder.name, "loaded")

    def check() -> None:
        assert Path(folder.name, "adapter_model.safetensors").is_file()
        model = adapted(libraries()["pylora"])
        act(None, model)
        model.set_adapter("loaded")
        same_logits({"saved": saved.eval(), "loaded": model.eval()}, torch.arange(8)[None])

    return _lifecycle(act, adapted, check)


@benchmark(base="")
def merge_and_unmerge() -> Work:
    """merge_adapter and unmerge_adapter on 112 modules."""

    def act(library: Any, model: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    def check() -> None:
        model = adapted(libraries()["pylora"]).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ids = torch.arange(8)[None]
        with torch.inference_mode():
            apart = model(input_ids=ids).logits
            model.merge_adapter()
            together = model(input_ids=ids).logits
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3 * float(apart.abs().max()))
        model.unmerge_adapter()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6, msg=name)

    return _lifecycle(act, adapted, check)

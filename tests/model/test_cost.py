"""What is done to an adapter costs the same however many others there are, and a load draws no random numbers."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pylora
from tests.model.tiny_models import llama

TARGETS = ["q_proj", "v_proj", "embed_tokens"]


def config(**kwargs: Any) -> pylora.LoraConfig:
    return pylora.LoraConfig(**{"target_modules": TARGETS, "r": 2, **kwargs})


def calls(function: Callable[[], Any]) -> int:
    """How many Python functions are entered meanwhile, which counts visited modules many times over.

    Without garbage collection, whose Python callbacks (hypothesis sets one) would count as the function's own calls.
    """
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    previous, collected = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(previous)
        if collected:
            gc.enable()
    return count


@pytest.mark.filterwarnings("ignore")
def test_cost_does_not_grow(tmp_path: Path) -> None:
    model: Any = pylora.get_peft_model(llama(), config(modules_to_save=["norm"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)

    def measure(name: str) -> dict[str, int]:
        other = f"{name}_added"
        return {
            "load": calls(lambda: model.load_adapter(tmp_path, name)),
            "load on meta": calls(lambda: model.load_adapter(tmp_path, f"{name}_meta", low_cpu_mem_usage=True)),
            "add": calls(lambda: model.add_adapter(other, config())),
            "switch": calls(lambda: model.set_adapter(name)),
            "disable": calls(model.base_model.disable_adapter_layers),
            "enable": calls(model.base_model.enable_adapter_layers),
            "switch back": calls(lambda: model.set_adapter("default")),
            "delete": calls(lambda: model.delete_adapter(name)),
            "delete more": calls(lambda: (model.delete_adapter(other), model.delete_adapter(f"{name}_meta"))),
        }

    measure("warm-up")
    few = measure("first")
    for number in range(20):
        model.add_adapter(f"more{number}", config())
    many = measure("last")
    # A call or two a layer may depend on the number: a set that is copied, a name that is not found at once.
    assert {key: value for key, value in many.items() if value > few[key] + 20} == {}, few


def test_a_load_draws_no_numbers(tmp_path: Path) -> None:
    model = pylora.get_peft_model(llama(), config())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.uniform_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = llama()
    state = torch.get_rng_state()
    loaded = pylora.PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path, "other")
    assert torch.equal(torch.get_rng_state(), state)
    tokens = torch.tensor([[1, 2, 3]])
    for name in ("default", "other"):
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", [True, "gaussian", False])
def test_what_a_file_lacks_is_initialised(tmp_path: Path, scheme: Any) -> None:
    model = pylora.get_peft_model(llama(), config(init_lora_weights=scheme))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.fill_(7)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lacking = [key for key in tensors if "layers.1.self_attn.q_proj" in key or "embedding_B" in key]
    save_file({key: value for key, value in tensors.items() if key not in lacking}, file)

    loaded: Any = pylora.PeftModel.from_pretrained(llama(), tmp_path)
    result = loaded.load_adapter(tmp_path, "other")
    assert len(result.missing_keys) == len(lacking)
    for name in ("default", "other"):
        layer = loaded.get_base_model().model.layers[1].self_attn.q_proj
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        assert 0 < a.abs().max() < 6
        assert (b == 0).all() if scheme else 0 < b.abs().max() < 6
        embedding = loaded.get_input_embeddings()
        assert (embedding.lora_embedding_A[name] == 7).all()
        assert 0 < embedding.lora_embedding_B[name].abs().max() < 6
        assert (loaded.get_base_model().model.layers[0].self_attn.q_proj.lora_A[name].weight == 7).all()


def test_a_new_adapter_has_its_layers_mode(tmp_path: Path) -> None:
    model: Any = pylora.get_peft_model(llama(), config(lora_dropout=0.5))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.eval()
    model.add_adapter("b", config(lora_dropout=0.5))
    assert not any(module.training for module in model.modules())
    model.train()
    model.add_adapter("c", config(lora_dropout=0.5))
    assert all(module.training for module in model.modules())
    model.load_adapter(tmp_path, "d")
    assert not any(module.training for module in model.modules())
    model.train()
    model.load_adapter(tmp_path, "e", is_trainable=True)
    assert all(module.training for module in model.modules())


def test_eval_of_a_load_honours_overridden_train(tmp_path: Path) -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    net = nn.Sequential(nn.Linear(3, 3), Frozen(3), nn.BatchNorm1d(3))
    model: Any = pylora.get_peft_model(net, pylora.LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    model.train()
    assert [m.training for m in net] == [True, False, True]
    model.load_adapter(tmp_path, "other")
    assert not any(module.training for module in model.modules())


def test_switching_freezes_what_was_made_trainable() -> None:
    model: Any = pylora.get_peft_model(llama(), config())
    for name in ("b", "c"):
        model.add_adapter(name, config())

    def trained() -> set[str]:
        return {name.rpartition(".lora_")[2].split(".")[1] for name, p in model.named_parameters() if p.requires_grad}

    model.set_requires_grad(["b"])
    assert trained() == {"default", "b"}
    model.set_adapter("c")
    assert trained() == {"c"}
    model.base_model.set_adapter(["b", "c"])
    assert trained() == {"b", "c"}
    model.base_model.disable_adapter_layers()
    assert trained() == set()
    model.base_model.enable_adapter_layers()
    assert trained() == {"b", "c"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    model.delete_adapter("b")
    model.add_adapter("b", config())
    assert trained() == set()


@pytest.mark.filterwarnings("ignore")
def test_work_for_one_more_module(tmp_path: Path) -> None:
    """How many functions are entered for each module that has an adapter; the walks over the model are in it."""

    def measure(layers: int) -> dict[str, int]:
        torch.manual_seed(0)
        net, folder = llama(layers=layers), tmp_path / str(layers)
        wrapping = calls(lambda: pylora.get_peft_model(net, config(target_modules="all-linear")))
        model: Any = pylora.get_peft_model(llama(layers=layers), config(target_modules="all-linear"))
        model.save_pretrained(folder)
        return {
            "wrap": wrapping,
            "add": calls(lambda: model.add_adapter("added", config(target_modules="all-linear"))),
            "load": calls(lambda: model.load_adapter(folder, "loaded")),
            "switch": calls(lambda: model.set_adapter("loaded")),
            "save": calls(lambda: model.save_pretrained(folder)),
            "delete": calls(lambda: model.delete_adapter("added")),
        }

    measure(2)
    few, many = measure(2), measure(6)
    modules = 4 * 7
    bounds = {"wrap": 360, "add": 270, "load": 560, "switch": 55, "save": 900, "delete": 50}
    work = {key: (many[key] - few[key]) / modules for key in few}
    assert {key: count for key, count in work.items() if count > bounds[key]} == {}, work


def test_first_use_imports_no_other_library() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import pylora
model = pylora.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), pylora.LoraConfig(target_modules=["0"]))
model(torch.ones(1, 4)).sum().backward()
model.set_adapter("default")
others = ("transformers", "huggingface_hub", "accelerate", "peft", "safetensors", "torch._dynamo", "torch._inductor")
print(sorted(name for name in others if name in set(sys.modules) - before))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"

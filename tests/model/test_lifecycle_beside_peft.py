"""Copies, checkpointing, dtypes, irregular states, failed loads and torch.compile of models with adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pylora
from tests.model.tiny_models import llama

X = torch.tensor([[1, 2, 3, 4]])


def config(lib: Any = pylora, **kwargs: Any) -> Any:
    return lib.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **kwargs})


def _through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_torch])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(duplicate: Callable[[Any], Any], merged: bool) -> None:
    model = pylora.get_peft_model(llama(), config(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"]))
    model.add_adapter("other", config())
    expected = model(X).logits
    if merged:
        model.merge_adapter()
    other = duplicate(model)
    torch.testing.assert_close(other(X).logits, expected)
    if merged:
        other.unmerge_adapter()
        torch.testing.assert_close(other(X).logits, expected)
    other.delete_adapter("other")
    assert list(model.peft_config) == ["default", "other"]
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(use_reentrant: bool, when: str) -> None:
    grads = []
    for lib in (pylora, peft):
        base = llama().train()
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        if when == "before":
            base.gradient_checkpointing_enable(**options)
        torch.manual_seed(5)
        model: Any = lib.get_peft_model(base, config(lib))
        if when == "after":
            model.gradient_checkpointing_enable(**options)
            model.enable_input_require_grads()
        model.train()
        model(X).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 8
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_of_adapters(dtype: torch.dtype, autocast: bool) -> None:
    found = []
    for lib in (pylora, peft):
        cfg = config(lib, target_modules=["0"], init_lora_weights=True)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(16, 16)).to(dtype), cfg, autocast_adapter_dtype=autocast)
        found.append([p.dtype for name, p in model.named_parameters() if "lora_" in name])
    assert found[0] == found[1] == [torch.float32 if autocast else dtype] * 2


def test_status_in_irregular_states() -> None:
    models: list[Any] = []
    for lib in (pylora, peft):
        torch.manual_seed(0)
        model: Any = lib.get_peft_model(llama(), config(lib, modules_to_save=["norm"]))
        model.add_adapter("other", config(lib, target_modules=["q_proj"]))
        models.append(model)

    def layer(model: Any) -> Any:
        return model.get_base_model().model.layers[0].self_attn.q_proj

    steps: list[Callable[[Any], Any]] = [
        lambda model: None,
        lambda model: layer(model).lora_A["default"].weight.requires_grad_(False),
        lambda model: layer(model).enable_adapters(False),
        lambda model: layer(model).set_adapter("other"),
        lambda model: layer(model).merge(adapter_names=["other"]),
        lambda model: layer(model).unmerge(),
        lambda model: layer(model).delete_adapter("other"),
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: model.merge_adapter(["other"]),
    ]
    for step in steps:
        for model in models:
            step(model)
        ours, theirs = models
        assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
        assert list(map(vars, ours.get_layer_status())) == list(map(vars, theirs.get_layer_status()))


def test_a_failed_load_puts_back_an_adapter_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    pylora.get_peft_model(llama(), config(r=3)).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: value[:, :-1].contiguous() for key, value in load_file(file).items()}, file)

    base = llama()
    model = pylora.get_peft_model(base, config(r=2))
    model.add_adapter("other", config(r=4))
    model.set_requires_grad("other")
    expected = model(X).logits
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(RuntimeError, match="size mismatch"),
    ):
        pylora.PeftModel.from_pretrained(base, folder, adapter_name="default")
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is held and torch.equal(held, value) for name, (held, value) in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert base.model.layers[0].self_attn.q_proj.r == {"default": 2, "other": 4}
    assert torch.equal(model(X).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_failed_load_leaves_a_merged_model_merged(tmp_path: Path) -> None:
    pylora.get_peft_model(llama(), config(r=3)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value[:, :-1].contiguous() for key, value in tensors.items()}, file)
    model: Any = pylora.get_peft_model(llama().bfloat16(), config())
    model.merge_adapter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: pylora.PeftModel.from_pretrained(model.get_base_model(), tmp_path, "other"),
    ):
        with pytest.raises(RuntimeError, match="size mismatch"):
            load()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert model.get_model_status().merged_adapters == ["default"]
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.load_adapter(tmp_path, "other")
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_graph(dropout: float) -> None:
    model: Any = pylora.get_peft_model(llama(), config(lora_dropout=dropout))
    model.add_adapter("other", config(lora_dropout=dropout))
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X).logits, model(X).logits)
    model.set_adapter("other")
    torch.testing.assert_close(compiled(X).logits, model(X).logits)
    with torch._dynamo.config.patch(error_on_recompile=True):  # both are compiled by now
        for name in ("default", "other"):
            model.base_model.set_adapter(name, inference_mode=False)
            model.active_adapter = name
            compiled(X)
    model.train()
    compiled(X).logits.square().sum().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {name for name, p in model.named_parameters() if p.requires_grad}


def test_mixing_methods_is_refused() -> None:
    base = llama()
    with pytest.raises(ValueError, match="mixed"):
        pylora.get_peft_model(base, config(), mixed=True)
    assert not hasattr(base, "peft_config")

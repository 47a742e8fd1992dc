"""layer_replication."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import pylora
from tests.model.tiny_models import llama

X = torch.tensor([[0, 1, 2, 3]])
MAP = [[0, 1], [0, 2], [1, 2]]


def config(lib: Any = pylora, **kwargs: Any) -> Any:
    options = {
        "target_modules": ["up_proj", "down_proj"],
        "init_lora_weights": False,
        "layer_replication": MAP,
        **kwargs,
    }
    return lib.LoraConfig(**options)


def test_as_in_peft(tmp_path: Path) -> None:
    models: list[Any] = []
    for lib in (pylora, peft):
        base = llama()
        torch.manual_seed(1)
        models.append(lib.get_peft_model(base, config(lib)).eval())
    ours, theirs = models
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.config.num_hidden_layers == 4
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X).logits, theirs(X).logits)
    generated = [m.generate(input_ids=X, max_new_tokens=4, do_sample=False) for m in models]
    assert torch.equal(generated[0], generated[1])
    layers = ours.get_base_model().model.layers
    assert layers[0].mlp.up_proj.base_layer.weight is layers[1].mlp.up_proj.base_layer.weight
    assert layers[2].mlp.up_proj.base_layer.weight is layers[3].mlp.up_proj.base_layer.weight
    assert layers[0].mlp.up_proj.base_layer.weight is not layers[2].mlp.up_proj.base_layer.weight
    assert layers[0].mlp.up_proj.lora_A["default"].weight is not layers[1].mlp.up_proj.lora_A["default"].weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    theirs.save_pretrained(tmp_path)
    loaded = pylora.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(X).logits, theirs(X).logits)


def test_a_second_adapter_uses_the_same_layers() -> None:
    model = pylora.get_peft_model(llama(), config())
    layers = model.get_base_model().model.layers
    model.add_adapter("second", config())
    model.add_adapter("third", config(layer_replication=None))
    assert model.get_base_model().model.layers is layers
    names = set(model.peft_config)
    with pytest.raises(ValueError, match="layer_replication"):
        model.add_adapter("fourth", config(layer_replication=[[0, 1]]))
    assert set(model.peft_config) == names
    assert len(layers[3].mlp.up_proj.lora_A) == 3


def test_merging_is_refused() -> None:
    model: Any = pylora.get_peft_model(llama(), config())
    before = copy.deepcopy(model.state_dict())
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge LORA layers when base model layers are replicated"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model.unload().model.layers) == 4


@pytest.mark.parametrize("path", ["bert.encoder.layer", "model.h", "model.model.layers"])
def test_places(path: str) -> None:
    root = nn.Module()
    module = root
    *parents, last = path.split(".")
    for name in parents:
        child = nn.Module()
        setattr(module, name, child)
        module = child
    setattr(module, last, nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))
    pylora.inject_adapter_in_model(
        config(target_modules=["0.0", "1.0", "2.0"], layer_replication=[[0, 2], [0, 1]]), root
    )
    assert len(root.get_submodule(path)) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "kwargs", "error"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"]}, ValueError),
        (llama, {"layer_replication": [[0, 3]]}, IndexError),
        (llama, {"target_modules": ["nothing"]}, ValueError),
    ],
)
def test_refusals_change_nothing(base: Any, kwargs: dict[str, Any], error: type[Exception]) -> None:
    model = base()
    structure, layers = str(model), getattr(getattr(model, "model", None), "layers", None)
    with pytest.raises(error):
        pylora.get_peft_model(model, config(**kwargs))
    assert str(model) == structure
    if layers is not None:
        assert model.model.layers is layers
        assert model.config.num_hidden_layers == 2
    with pytest.raises(error):
        peft.get_peft_model(base(), config(peft, **kwargs))

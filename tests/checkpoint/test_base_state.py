"""The base model's tensors inside an adapted model."""

import peft
import pytest
import torch
from peft.utils.save_and_load import get_base_model_state_dict as pefts_base_state

import pylora
from pylora.checkpoint import get_base_model_state_dict, set_base_model_state_dict

FIELDS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_names_and_values_are_those_of_the_base_model(llama, wrap, fields):
    expected = llama().state_dict()
    found = get_base_model_state_dict(wrap(pylora, llama(), **fields))
    assert set(found) == set(expected) == set(pefts_base_state(wrap(peft, llama(), **fields)))
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    "fields",
    [*FIELDS, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, {"trainable_token_indices": [1]}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_on_pefts_models(llama, wrap, fields):
    model = wrap(peft, llama(), **fields)
    found, expected = get_base_model_state_dict(model), pefts_base_state(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_modules_called_like_wrappers_keep_their_names(wrap):
    base = torch.nn.Sequential()
    base.add_module("base_layer", torch.nn.Linear(3, 3))
    base.add_module("original_module", torch.nn.Linear(3, 3))
    names = set(base.state_dict())
    assert set(get_base_model_state_dict(wrap(pylora, base, target_modules=["base_layer"]))) == names


def test_setting(llama, wrap):
    model = wrap(pylora, llama(), **FIELDS[1])
    adapter = pylora.get_peft_model_state_dict(model)
    adapter = {key: tensor.clone() for key, tensor in adapter.items()}
    new = {key: tensor + 1 for key, tensor in llama().state_dict().items()}
    result = set_base_model_state_dict(model, new)
    assert result.missing_keys == result.unexpected_keys == []
    assert all(torch.equal(tensor, new[key]) for key, tensor in get_base_model_state_dict(model).items())
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in pylora.get_peft_model_state_dict(model).items())


def test_what_does_not_fit(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    new = {key: tensor + 1 for key, tensor in mlp().state_dict().items()}
    bad = {**new, "norm.bias": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=r"size mismatch for norm\.bias"):
        set_base_model_state_dict(model, bad)
    partial = {**new, "extra": torch.zeros(1)}
    del partial["lin0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lin0\.weight(.|\n)*Unexpected key\(s\).*extra"):
        set_base_model_state_dict(model, partial)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    result = set_base_model_state_dict(model, partial, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lin0.weight"], ["extra"])
    assert torch.equal(model.lin0.base_layer.bias, new["lin0.bias"])

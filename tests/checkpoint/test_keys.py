import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _remove_adapter_name_from_state_dict_key

from pylora.checkpoint.keys import (
    AdapterNameError,
    checked_adapter_name,
    is_under,
    rename_keys,
    select_under,
    to_checkpoint_key,
)


@pytest.mark.parametrize(
    ("model_key", "expected"),
    [
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("base_model.model.q.lora_B.default.bias", "base_model.model.q.lora_B.bias"),
        ("base_model.model.emb.lora_embedding_A.default", "base_model.model.emb.lora_embedding_A"),
        ("q.lora_magnitude_vector.default.weight", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector.default", "q.lora_magnitude_vector"),
        ("default.q.lora_A.default.weight", "default.q.lora_A.weight"),
        ("base_model.model.q.base_layer.bias", "base_model.model.q.base_layer.bias"),
        ("q.not_default.weight", "q.not_default.weight"),
        ("weight", "weight"),
    ],
)
def test_adapter_name_is_removed_where_it_stands_last(model_key, expected):
    assert to_checkpoint_key(model_key, "default") == expected


@given(
    path=st.lists(st.sampled_from(["default", "lora_A", "q", "layers", "0"]), max_size=4),
    factor=st.sampled_from(["lora_A", "lora_B"]),
    name=st.sampled_from(["default", "other", "lora_A", "weight", "q"]),
)
def test_same_key_as_peft(path, factor, name):
    for leaf in ([name, "weight"], [name, "bias"], [name]):
        key = ".".join([*path, factor, *leaf])
        assert to_checkpoint_key(key, name) == _remove_adapter_name_from_state_dict_key(key, name)


@pytest.mark.parametrize("name", ["", ".", "..", "a.b", "../x", "/abs", "a/b", "a\\b", "a\0b"])
def test_names_that_would_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="adapter_name") as caught:
        checked_adapter_name(name)
    # torch, and so PEFT, raises KeyError for a submodule name that is empty or has a dot.
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, AdapterNameError)
    assert "expected a plain name" in str(caught.value)


@pytest.mark.parametrize("name", ["default", "my-adapter", "v2 final", "åäö", "_x"])
def test_plain_names_pass(name):
    assert checked_adapter_name(name) == name


def test_a_name_is_a_string():
    with pytest.raises(TypeError, match="adapter_name"):
        checked_adapter_name(5)


def test_is_under_respects_components():
    roots = {"a.b", "c"}
    assert is_under("a.b", roots)
    assert is_under("a.b.x.y", roots)
    assert is_under("c.weight", roots)
    assert not is_under("a.bc", roots)
    assert not is_under("x.a.b", roots)
    assert not is_under("a", roots)
    assert not is_under("", roots)


def test_select_under_keeps_what_lies_below():
    tensors = {"a": 0, "a.b": 1, "a.b.c": 2, "a.bc": 3, "b.c": 4}
    assert select_under(tensors, {"a.b", "b.c"}) == {"a.b": 1, "a.b.c": 2, "b.c": 4}
    assert select_under(tensors, set()) == {}


def test_rename_keys_applies_the_first_pattern_that_matches():
    tensors = {"base_model.model.old.q": 1, "base_model.model.lm_head.q": 2, "base_model.old.q": 3}
    mapping = {"^old": "new", "old|new": "never", "^lm_head": "head"}
    assert rename_keys(tensors, mapping) == {
        "base_model.model.new.q": 1,
        "base_model.model.head.q": 2,
        "base_model.new.q": 3,
    }
    assert rename_keys(tensors, None) == tensors


def test_rename_keys_wants_peft_keys():
    with pytest.raises(ValueError, match="key_mapping"):
        rename_keys({"q.lora_A.weight": 1}, {"q": "k"})

"""Per-module ranks and alphas, and the scaling they give."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.config import get_pattern_key, pattern_value, scaling_for

peft_other = pytest.importorskip("peft.utils.other")

NAMES = ["q", "v", "model.layers.0.q", "model.layers.10.q", "model.layers.0.eq", "layers.0.mlp.q.v", "layers.0"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ({}, "q", 8),
        (None, "q", 8),
        ({"q": 1}, "q", 1),
        ({"q": 1}, "model.q", 1),
        ({"q": 1}, "model.eq", 8),
        ({"q": 1}, "q.model", 8),
        ({"layers.0.q": 1}, "model.layers.0.q", 1),
        ({"layers.0.q": 1}, "model.layers.10.q", 8),
        ({"^layers.0.q": 1}, "model.layers.0.q", 8),
        ({"^model.layers.0.q": 1}, "model.layers.0.q", 1),
        ({r"layers\.\d\.q": 1}, "model.layers.3.q", 1),
        ({r"layers\.\d\.q": 1}, "model.layers.13.q", 8),
        ({".*": 1, "q": 2}, "model.q", 1),
        ({"q": 2, ".*": 1}, "model.q", 2),
        ({"q|v": 2}, "model.v", 2),
        ({"a+b": 2}, "a+b", 2),
        ({"q": 0}, "q", 0),
    ],
)
def test_pattern_value(pattern, name, expected):
    assert pattern_value(pattern, name, 8) == expected
    if pattern is not None:
        assert pattern.get(peft_other.get_pattern_key(pattern.keys(), name), 8) == expected


KEYS = st.lists(
    st.sampled_from([*NAMES, ".*", "^q", "q$", r"layers\.\d+\..*", "q|v", "", "(q)", r"\d", "eq?"]), max_size=4
)


@given(keys=KEYS, name=st.sampled_from(NAMES))
def test_pattern_key_is_peft_s(keys, name):
    assert get_pattern_key(keys, name) == peft_other.get_pattern_key(keys, name)


def test_scaling():
    assert scaling_for(8, 16) == 2.0
    assert scaling_for(3, 8) == 8 / 3
    assert scaling_for(16, 8, use_rslora=True) == 2.0
    assert scaling_for(3, 8, True) == 8 / math.sqrt(3)
    assert scaling_for(8, 0) == 0


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_not_positive(rank):
    with pytest.raises(ValueError, match=f"`r` should be a positive integer value but the value passed is {rank}"):
        scaling_for(rank, 8)

"""Long target lists cut down to endings: PEFT's result exactly, since it is saved."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.targeting import find_minimal_target_modules

tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

PARTS = st.sampled_from(["a", "b", "c", "0", "1", "ab"])
NAMES = st.sets(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=12)


@settings(max_examples=500, deadline=None)
@given(targets=NAMES.filter(bool), others=NAMES)
def test_result_is_peft_s(targets, others):
    others -= targets
    expected = tuners_utils._find_minimal_target_modules(targets, others)
    assert find_minimal_target_modules(targets, others) == expected
    assert find_minimal_target_modules(list(targets), list(others)) == expected


@given(targets=NAMES.filter(bool), others=NAMES)
def test_result_selects_the_same_modules(targets, others):
    # A name that is itself the ending of another cannot be told from it by an ending.
    names = targets | others
    names = {name for name in names if not any(other.endswith("." + name) for other in names)}
    targets, others = targets & names, (others - targets) & names
    if not targets:
        return
    endings = find_minimal_target_modules(targets, others)
    selected = {n for n in names if n in endings or any(n.endswith("." + ending) for ending in endings)}
    assert selected == targets


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        (
            [f"layers.{i}.attn.{p}" for i in range(30) for p in "qv"],
            [f"layers.{i}.attn.k" for i in range(30)],
            {"q", "v"},
        ),
        (["enc.q", "dec.q"], ["x.q"], {"enc.q", "dec.q"}),
        (["enc.a.q", "dec.a.q"], ["x.q"], {"a.q"}),
        (["q"], ["a.q"], {"q"}),
        (["q"], [], {"q"}),
    ],
)
def test_examples(targets, others, expected):
    assert find_minimal_target_modules(targets, others) == expected


@pytest.mark.parametrize(
    ("targets", "others"), [([], []), ("", []), ("q", []), (["q", ""], []), (["q"], ["q", "v"]), (set(), {"q"})]
)
def test_bad_input_is_an_error_in_both(targets, others):
    for function in (tuners_utils._find_minimal_target_modules, find_minimal_target_modules):
        with pytest.raises(ValueError, match="target_modules"):
            function(targets, others)

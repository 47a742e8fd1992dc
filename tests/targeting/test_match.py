"""One name against a configuration: the rules row by row, and beside PEFT's matcher on generated names."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.config import LoraConfig
from pylora.targeting import Match, TargetMatcher, check_target_module_exists

tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

T, E, N = Match.TARGET, Match.EXCLUDED, Match.NONE
Q0, Q1, Q11 = (f"model.layers.{i}.attn.q" for i in (0, 1, 11))

ROWS = [
    # a list: exact names and endings after a dot
    ({"target_modules": ["q"]}, "q", T),
    ({"target_modules": ["q"]}, Q0, T),
    ({"target_modules": ["q"]}, "model.seq", N),
    ({"target_modules": ["q"]}, "q.model", N),
    ({"target_modules": ["attn.q"]}, Q0, T),
    ({"target_modules": ["attn.q"]}, "model.xattn.q", N),
    ({"target_modules": ["attn.q"]}, "q", N),
    ({"target_modules": [Q0]}, Q0, T),
    ({"target_modules": [Q0]}, "prefix." + Q0, T),
    ({"target_modules": [Q0]}, Q1, N),
    ({"target_modules": ["model"]}, Q0, N),
    ({"target_modules": ["Q"]}, Q0, N),
    ({"target_modules": ["k", "v", "q"]}, Q0, T),
    ({"target_modules": []}, Q0, N),
    # a string: a regular expression for the whole name
    ({"target_modules": "q"}, "q", T),
    ({"target_modules": "q"}, Q0, N),
    ({"target_modules": r".*\.q"}, Q0, T),
    ({"target_modules": r"model\.layers\.[01]\..*"}, Q1, T),
    ({"target_modules": r"model\.layers\.[01]\..*"}, Q11, N),
    ({"target_modules": "model"}, Q0, N),
    ({"target_modules": ".*(attn|mlp).*(q|v)$"}, Q0, T),
    ({"target_modules": "all-linear"}, Q0, N),
    ({"target_modules": ""}, Q0, N),
    # exclusion wins
    ({"target_modules": ["q"], "exclude_modules": ["q"]}, Q0, E),
    ({"target_modules": ["q"], "exclude_modules": [Q0]}, Q0, E),
    ({"target_modules": ["q"], "exclude_modules": [Q0]}, Q1, T),
    ({"target_modules": ["q"], "exclude_modules": ["model"]}, Q0, T),
    ({"target_modules": ["q"], "exclude_modules": r".*\.0\..*"}, Q0, E),
    ({"target_modules": ["q"], "exclude_modules": r".*\.0\..*"}, Q1, T),
    ({"target_modules": ["q"], "exclude_modules": r".*\.0\."}, Q0, T),
    ({"target_modules": ".*q", "exclude_modules": ["q"]}, Q0, E),
    ({"target_modules": [Q0], "exclude_modules": ["q"]}, Q0, E),
    ({"target_modules": ["v"], "exclude_modules": ["q"]}, Q0, E),
    ({"target_modules": ["q"], "exclude_modules": []}, Q0, T),
    ({"target_modules": ["q"], "exclude_modules": ""}, Q0, T),
    # modules that are saved whole, and what is inside them
    ({"target_modules": ["q"], "modules_to_save": ["q"]}, Q0, E),
    ({"target_modules": ["q"], "modules_to_save": ["attn"]}, Q0, E),
    ({"target_modules": ["q"], "modules_to_save": ["model"]}, Q0, E),
    ({"target_modules": ["q"], "modules_to_save": ["layers.0"]}, Q0, E),
    ({"target_modules": ["q"], "modules_to_save": ["layers.0"]}, Q1, T),
    ({"target_modules": ["q"], "modules_to_save": ["tn"]}, Q0, T),
    ({"target_modules": ["q"], "modules_to_save": ["att"]}, Q0, T),
    ({"target_modules": ["q"], "modules_to_save": []}, Q0, T),
    # layers: the first number with two parts before it
    ({"target_modules": ["q"], "layers_to_transform": [0]}, Q0, T),
    ({"target_modules": ["q"], "layers_to_transform": [0]}, Q1, N),
    ({"target_modules": ["q"], "layers_to_transform": 0}, Q0, T),
    ({"target_modules": ["q"], "layers_to_transform": 1}, Q0, N),
    ({"target_modules": ["q"], "layers_to_transform": [1]}, Q11, N),
    ({"target_modules": ["q"], "layers_to_transform": [1, 11]}, Q11, T),
    ({"target_modules": ["q"], "layers_to_transform": []}, Q1, T),
    ({"target_modules": ["q"], "layers_to_transform": [0]}, "q", T),
    ({"target_modules": ["q"], "layers_to_transform": [0]}, "model.q", N),
    ({"target_modules": ["q"], "layers_to_transform": [0]}, "layers.0.q", N),
    ({"target_modules": [Q0], "layers_to_transform": [1]}, Q0, T),
    ({"target_modules": ["w"], "layers_to_transform": [1]}, "m.layers.1.experts.0.w", T),
    ({"target_modules": ["w"], "layers_to_transform": [0]}, "m.layers.1.experts.0.w", N),
    # with the name of the list
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "layers"}, Q0, T),
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["layers"]}, Q0, T),
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "layers"}, "layers.0.q", T),
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h"}, Q0, N),
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, Q0, T),
    ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "ers"}, Q0, N),
    ({"target_modules": ["w"], "layers_to_transform": [0], "layers_pattern": "experts"}, "m.layers.1.experts.0.w", T),
    ({"target_modules": ["w"], "layers_to_transform": [1], "layers_pattern": "experts"}, "m.layers.1.experts.0.w", N),
    (
        {"target_modules": ["w"], "layers_to_transform": [1], "layers_pattern": ["layers", "experts"]},
        "m.experts.0.layers.1.w",
        T,
    ),
    ({"target_modules": ["w"], "layers_to_transform": [0], "layers_pattern": "h"}, "m.h.0.x.h.1.w", T),
    ({"target_modules": ["w"], "layers_to_transform": [1], "layers_pattern": "h"}, "m.h.0.x.h.1.w", N),
    ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ""}, Q1, T),
    ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": []}, Q0, N),
]


def peft_verdict(config, name):
    found = tuners_utils.check_target_module_exists(config, name)
    if isinstance(found, tuners_utils._ExcludedModule):
        return Match.EXCLUDED
    return Match.TARGET if found else Match.NONE


@pytest.mark.parametrize(("kwargs", "name", "expected"), ROWS, ids=str)
def test_rule(kwargs, name, expected):
    config = LoraConfig(**kwargs)
    assert check_target_module_exists(config, name) is expected
    assert peft_verdict(config, name) is expected


def test_only_a_target_is_true():
    assert Match.TARGET
    assert not Match.EXCLUDED
    assert not Match.NONE


def test_no_targets_beside_parameters():
    config = LoraConfig(target_parameters=["w"])
    assert check_target_module_exists(config, "q") is Match.NONE


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_invalid_expression_is_an_error(field):
    with pytest.raises(re.error):
        TargetMatcher(LoraConfig(**{"target_modules": ["q"], field: "(q"}))


PARTS = st.sampled_from(["model", "layers", "h", "attn", "q", "v", "qv", "experts", "0", "1", "12", "lay"])
NAME = st.lists(PARTS, min_size=1, max_size=7).map(".".join)
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), max_size=3)
REGEX = st.sampled_from([".*", r".*\.q", "q", r".*\.\d+\..*", "(model|h).*v", r"[^.]*\.[^.]*", "layers"])
PATTERN = st.none() | st.sampled_from(["layers", "h", "", "lay.*", "(h|layers)"]) | st.lists(PARTS, max_size=2)
LAYERS = st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3)


@st.composite
def configs(draw):
    by_regex = draw(st.booleans())
    layers = None if by_regex else draw(LAYERS)
    return LoraConfig(
        target_modules=draw(REGEX if by_regex else NAMES),
        exclude_modules=draw(st.none() | NAMES | REGEX),
        modules_to_save=draw(st.none() | NAMES),
        layers_to_transform=layers,
        layers_pattern=None if layers is None else draw(PATTERN),
    )


@settings(max_examples=400, deadline=None)
@given(config=configs(), names=st.lists(NAME, min_size=1, max_size=5))
def test_rules_are_peft_s_on_any_name(config, names):
    matcher = TargetMatcher(config)
    for name in names:
        assert matcher(name) is peft_verdict(config, name)

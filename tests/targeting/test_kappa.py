"""KappaTune beside PEFT's."""

import pytest
import torch
from torch import nn

from pylora.targeting.kappa import KappaTuneSelector, find_kappa_target_modules

helpers = pytest.importorskip("peft.helpers")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 12))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 6) * torch.arange(1.0, 7.0))
        self.other = nn.Parameter(torch.randn(3, 6, 6))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.wide = nn.Linear(40, 4)
        self.norm = nn.LayerNorm(8)
        self.mlp = Experts()


@pytest.fixture
def model():
    return Model()


CHOICES = [
    {},
    {"top_p": 0.5},
    {"top_p": 0.01},
    {"num_modules": 2},
    {"num_modules": 99, "top_p": 0.1},
    {"threshold": 9.0},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_rankings_are_those_of_peft(model, choice):
    own = KappaTuneSelector(model, show_progress=False)
    other = helpers.KappaTuneSelector(model, show_progress=False)
    assert own.get_best_targets(**choice) == other.get_best_targets(**choice)
    assert own.get_best_target_parameters(**choice) == other.get_best_target_parameters(**choice)


def test_the_best_conditioned_layer_is_first(model):
    with torch.no_grad():
        model.layers[3].weight.copy_(torch.eye(8))
    assert find_kappa_target_modules(model, top_p=0.2, show_progress=False) == {
        "target_modules": ["layers.3"],
        "target_parameters": ["mlp.gate_up_proj"],
    }


def test_long_dimensions_and_quantised_weights_are_left_out(model):
    model.layers[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    selector = KappaTuneSelector(model, max_dim_size_to_analyze=10, show_progress=False)
    assert sorted(selector.get_best_targets()) == ["layers.1", "layers.2", "layers.3", "layers.4"]
    assert selector.get_best_target_parameters() == ["mlp.down_proj"]


def test_suffixes_can_be_chosen(model):
    selector = KappaTuneSelector(model, moe_param_suffixes=(".other",), show_progress=False)
    assert selector.get_best_target_parameters() == ["mlp.other"]


def test_a_model_without_candidates(capsys):
    result = find_kappa_target_modules(nn.LayerNorm(4), show_progress=True)
    assert result == {"target_modules": [], "target_parameters": None}

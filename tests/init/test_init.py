"""Initialisation schemes: side by side with PEFT under one seed, and the registry's rules."""

import math

import pytest
import torch
from torch import nn

from pylora.init import Factors, find_init, init_adapter, register_init
from pylora.init import registry as registry_module

peft = pytest.importorskip("peft")


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "tall": lambda: nn.Linear(7, 3),
    "embedding": lambda: nn.Embedding(50, 16),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
}


def peft_factors(layer, scheme, rank, lora_bias, seed):
    config = peft.LoraConfig(target_modules=["layer"], r=rank, init_lora_weights=scheme, lora_bias=lora_bias)
    torch.manual_seed(seed)
    module = peft.get_peft_model(OneLayer(layer), config).base_model.model.layer
    state = torch.get_rng_state()
    if isinstance(layer, nn.Embedding):
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"], None, state
    b = module.lora_B["default"]
    return module.lora_A["default"].weight, b.weight, b.bias, state


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("scheme", [True, False, "gaussian", "Gaussian", None])
@pytest.mark.parametrize("kind", LAYERS)
def test_same_seed_same_factors_as_peft(kind, scheme, rank):
    layer = LAYERS[kind]()
    a, b, _, state = peft_factors(layer, scheme, rank, False, seed=3)
    mine_a, mine_b = torch.full_like(a, math.nan), torch.full_like(b, math.nan)
    torch.manual_seed(3)
    init_adapter(scheme, mine_a, mine_b, embedding=kind == "embedding")
    assert torch.equal(mine_a, a)
    assert torch.equal(mine_b, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scheme", [True, False])
def test_same_seed_same_bias_as_peft(scheme):
    a, b, bias, state = peft_factors(nn.Linear(24, 40), scheme, 8, True, seed=5)
    mine = [torch.full_like(tensor, math.nan) for tensor in (a, b, bias)]
    torch.manual_seed(5)
    init_adapter(scheme, mine[0], mine[1], b_bias=mine[2])
    for tensor, expected in zip(mine, (a, b, bias), strict=True):
        assert torch.equal(tensor, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_filled_without_a_graph():
    a, b = nn.Parameter(torch.empty(4, 8)), nn.Parameter(torch.empty(6, 4))
    init_adapter(True, a, b)
    assert a.grad_fn is None
    assert a.requires_grad
    assert not b.any()
    assert 0 < a.abs().max() <= 1 / math.sqrt(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", [True, False, "gaussian"])
def test_other_dtypes(scheme, dtype):
    a, b = torch.full((4, 64), math.nan, dtype=dtype), torch.full((32, 4), math.nan, dtype=dtype)
    init_adapter(scheme, a, b)
    assert a.isfinite().all()
    assert b.isfinite().all()
    assert a.std() > 0
    assert bool(b.any()) is (scheme is False)


def test_meta_tensors_draw_nothing():
    a, b = torch.empty(4, 8, device="meta"), torch.empty(6, 4, device="meta")
    before = torch.get_rng_state()
    init_adapter(True, a, b)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scheme", [None, "", 0])
def test_empty_values_mean_false(scheme):
    assert find_init(scheme) is find_init(False)


@pytest.mark.parametrize("scheme", ["foo", 1, 0.5])
def test_unknown_scheme(scheme):
    a, b = torch.ones(4, 8), torch.ones(6, 4)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"Unknown initialization init_lora_weights={scheme!r}"):
        init_adapter(scheme, a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert (a == 1).all()
    assert (b == 1).all()


def test_unknown_scheme_is_peft_s_exception_type():
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='foo'"):
        peft_factors(nn.Linear(4, 4), "foo", 2, False, 0)


def test_a_scheme_joins_by_one_decorator(monkeypatch):
    monkeypatch.setattr(registry_module, "_SCHEMES", dict(registry_module._SCHEMES))

    @register_init("ones")
    def ones(factors: Factors) -> None:
        factors.a.fill_(1)
        factors.b.fill_(factors.a.shape[0])

    a, b = torch.zeros(4, 8), torch.zeros(6, 4)
    init_adapter("ones", a, b)
    assert (a == 1).all()
    assert (b == 4).all()
    with pytest.raises(ValueError, match="'ones' is taken by ones"):
        register_init("ones")(ones)

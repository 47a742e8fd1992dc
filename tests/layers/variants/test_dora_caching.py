"""`DoraCaching`: what is kept, when it is used, and that it is never out of date."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import pylora
from pylora.layers.variants import DoraCaching, dora


@pytest.fixture(autouse=True)
def off():
    DoraCaching()(enabled=False)
    yield
    DoraCaching()(enabled=False)


@pytest.fixture
def counted(monkeypatch):
    """How many norms have been computed."""
    calls = []
    original = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.fixture
def model(make):
    return make(pylora, targets=["emb", "lin", "tr", "conv2"]).eval()


def caches(model):
    return [module._dora_cache for module in model.modules() if hasattr(module, "_dora_cache")]


def same(ours, others):
    for mine, other in zip(ours, others, strict=True):
        assert_close(mine, other, rtol=0, atol=0)


def test_norms_are_computed_once(model, ids, counted):
    expected = model(ids)
    assert not any(caches(model))
    counted.clear()
    with DoraCaching():
        for _ in range(3):
            same(model(ids), expected)
        assert len(counted) == len(caches(model)) == 4
        assert all(caches(model))
    same(model(ids), expected)
    assert not any(caches(model))


def test_nothing_is_kept_in_training(model, ids, counted):
    with DoraCaching():
        model(ids)
        model.train()
        assert not any(caches(model))
        counted.clear()
        model(ids)
        model(ids)
        assert len(counted) == 8
        assert not any(caches(model))


def test_switch_and_nesting(model, ids):
    DoraCaching()(enabled=True)
    model(ids)
    assert all(caches(model))
    with DoraCaching(enabled=False):
        model(ids)
        assert not any(caches(model))
        with DoraCaching():
            model(ids)
            assert all(caches(model))
    model(ids)
    assert all(caches(model))
    with pytest.raises(ZeroDivisionError), DoraCaching(enabled=False):
        raise ZeroDivisionError
    model(ids)
    assert all(caches(model))


def _in_place(layer):
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)


def _other_data(layer):
    # Twice: the allocator may give the second the place of what was there when the norm was computed.
    for _ in range(2):
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * 1.5


def _other_parameter(layer):
    layer.lora_B["default"].weight = torch.nn.Parameter(layer.lora_B["default"].weight.detach() * 2)


def _base_weight(layer):
    layer.set_base_weight(layer.get_base_weight() * 2)


def _base_in_place(layer):
    with torch.no_grad():
        layer.base_layer.weight.add_(0.1)


def _load(layer):
    layer.load_state_dict({key: value * 1.2 for key, value in layer.state_dict().items()})


def _reset(layer):
    layer.reset_lora_parameters("default", "gaussian")


def _double(layer):
    layer.double()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        _in_place,
        _other_data,
        _other_parameter,
        _base_weight,
        _base_in_place,
        _load,
        _reset,
        _double,
    ],
)
def test_every_change_is_seen(model, ids, change):
    layer = model.base_model.model.lin
    x = torch.randn(5, 8)
    with DoraCaching():
        model(ids)
        change(layer)
        x = x.to(layer.base_layer.weight.dtype)
        kept = layer(x)
    same([kept], [layer(x)])


def test_merging_and_unmerging(model, ids):
    with DoraCaching():
        expected = model(ids)
        model.merge_adapter()
        model(ids)
        model.unmerge_adapter()
        outputs = model(ids)
    same(outputs, model(ids))
    for mine, other in zip(outputs, expected, strict=True):
        assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_magnitudes_still_train(model, ids):
    with DoraCaching():
        model(ids)
        sum(out.sum() for out in model(ids)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "magnitude" in name)


def test_kept_in_inference_mode_and_used_with_gradients(model, ids):
    with DoraCaching():
        with torch.inference_mode():
            expected = model(ids)
        outputs = model(ids)
        same(outputs, expected)
        sum(out.sum() for out in outputs).backward()


def test_weights_made_in_inference_mode(make, ids, counted):
    with torch.inference_mode():
        model = make(pylora, targets=["lin"]).eval()
        counted.clear()
        with DoraCaching():
            same(model(ids), model(ids))
    assert len(counted) == 2
    assert not any(caches(model))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_not_carry_what_is_kept(model, ids, copier):
    with DoraCaching():
        expected = model(ids)
        twin = copier(model)
        assert not any(caches(twin))
        same(twin(ids), expected)
        assert all(caches(twin))
    assert "_dora_cache" not in "".join(model.state_dict())


def test_several_adapters(make, ids, counted):
    model = make(pylora, targets=["lin"], names=("one", "two")).eval()
    expected = model(ids)
    counted.clear()
    with DoraCaching():
        same(model(ids), expected)
        same(model(ids), expected)
        assert len(counted) == 2
        model.set_adapter("two")
        alone = model(ids)
        assert len(counted) == 2
    same(alone, model(ids))

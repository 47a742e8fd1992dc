"""DoRA's kept norms: when they are reused, and that they are never out of date."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

import pylora
from pylora.layers.variants import DoraCaching, dora, dora_cache


@pytest.fixture(autouse=True)
def off():
    DoraCaching()(enabled=False)
    yield
    DoraCaching()(enabled=False)


@pytest.fixture
def counted(monkeypatch):
    """How many norms have been computed."""
    calls = []

    def count(name):
        original = getattr(dora, name)
        monkeypatch.setattr(dora, name, lambda *args: calls.append(name) or original(*args))

    count("row_norms")
    count("dora_linear_norms")
    return calls


@pytest.fixture
def model(make):
    return make(pylora, targets=["emb", "lin", "tr", "conv2"]).eval()


def caches(model):
    return [module._kept_norms for module in model.modules() if hasattr(module, "_kept_norms")]


def fresh(model, *inputs):
    """What the model computes with nothing kept."""
    pylora.invalidate(model)
    return model(*inputs)


def same(ours, others, **tolerances):
    for mine, other in zip(ours, others, strict=True):
        assert_close(mine, other, **{"rtol": 0, "atol": 0, **tolerances})


@pytest.mark.parametrize("training", [False, True])
def test_norms_are_computed_once_while_nothing_changes(model, ids, counted, training):
    model.train(training)
    expected = model(ids)
    assert len(counted) == len(caches(model)) == 4
    assert all(caches(model))
    for _ in range(3):
        same(model(ids), expected, rtol=1e-5, atol=1e-5)  # a dense layer's first norms come from another product
    assert len(counted) == 4


def test_gradient_accumulation_computes_them_once(model, ids, counted):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 4):
        for _ in range(3):
            sum(out.sum() for out in model(ids)).backward()
        assert len(counted) == 4 * step
        optimizer.step()
        optimizer.zero_grad()


def test_training_reads_the_base_weight_s_squares_once(make, monkeypatch):
    layer = make(pylora, targets=["lin"]).base_model.model.lin
    calls = []
    original = dora.dora_row_squares
    monkeypatch.setattr(dora, "dora_row_squares", lambda weight: calls.append(1) or original(weight))
    for _ in range(3):
        layer(torch.randn(5, 8))
        _in_place(layer)
    assert len(calls) == 1
    _base_in_place(layer)
    layer(torch.randn(5, 8))
    assert len(calls) == 2


class _Uncounted(torch.optim.Optimizer):
    """Writes as an optimizer does that gets raw pointers."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                version = param._version
                param.data.mul_(1.5)
                assert param._version == version


@pytest.mark.parametrize(
    "make_optimizer",
    [
        _Uncounted,
        lambda params: torch.optim.SGD(params, lr=0.5),
        lambda params: torch.optim.SGD(params, lr=0.5, foreach=True),
        lambda params: torch.optim.AdamW(params, lr=0.5, foreach=True),
        lambda params: torch.optim.AdamW(params, lr=0.5, fused=True),
    ],
    ids=["uncounted", "sgd", "foreach", "adamw foreach", "adamw fused"],
)
def test_a_step_of_any_optimizer_is_seen(model, ids, make_optimizer):
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        sum(out.square().sum() for out in model(ids)).backward()
        optimizer.step()
        outputs = model(ids)
        same(outputs, fresh(model, ids), rtol=1e-5, atol=1e-5)


def test_a_compiled_step_is_seen(model, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    sum(out.square().sum() for out in model(ids)).backward()
    torch.compile(optimizer.step, backend="aot_eager")()
    same(model(ids), fresh(model, ids), rtol=1e-5, atol=1e-5)


def test_edits_through_data_need_invalidate(model, ids):
    before = model(ids)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            for factor in [*module.lora_B.parameters(), *module.lora_embedding_B.values()]:
                factor.data.mul_(3)
    pylora.invalidate(model)
    assert not any(caches(model))
    after = model(ids)
    assert not torch.equal(before[0], after[0])
    same(after, fresh(copy.deepcopy(model), ids))


def test_no_memory_of_the_weights_is_held(make):
    layer = make(pylora, targets=["lin"]).base_model.model.lin
    layer(torch.randn(5, 8))
    assert layer.lora_magnitude_vector["default"]._kept_norms
    memory = StorageWeakRef(layer.base_layer.weight.untyped_storage())
    assert not memory.expired()
    layer.half()
    assert memory.expired()


def test_in_a_process_group_norms_are_kept_within_caching_only(model, ids, counted, monkeypatch):
    """FSDP gathers parameters into one memory again and again without counting."""
    monkeypatch.setattr(dora_cache, "_in_process_group", lambda: True)
    model(ids)
    assert not any(caches(model))
    model(ids)
    assert len(counted) == 8
    with DoraCaching():
        model(ids)
        model(ids)
        assert all(caches(model))
    assert len(counted) == 12
    model(ids)
    assert len(counted) == 16


def test_switch_and_nesting():
    DoraCaching()(enabled=True)
    with DoraCaching(enabled=False):
        assert not dora_cache.caching_enabled()
        with DoraCaching():
            assert dora_cache.caching_enabled()
        assert not dora_cache.caching_enabled()
    assert dora_cache.caching_enabled()
    with pytest.raises(ZeroDivisionError), DoraCaching(enabled=False):
        raise ZeroDivisionError
    assert dora_cache.caching_enabled()


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


def _twice_cast(layer):
    layer.half().float()


def _other_storage(layer):
    """As a sharding wrapper does: the parameter away, and another one with other values in its place."""
    for parts in (layer.lora_A["default"], layer.lora_B["default"]):
        weight = parts._parameters.pop("weight").detach().clone()
        parts._parameters["weight"] = nn.Parameter(weight * 1.7)


def _magnitude(layer):
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(2)


def _other_weight_of_the_same_size(layer):
    layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.base_layer.weight))


CHANGES = [
    lambda layer: layer.set_scale("default", 3.0),
    lambda layer: layer.scale_layer(0.5),
    _in_place,
    _other_data,
    _other_parameter,
    _other_storage,
    _magnitude,
    _base_weight,
    _base_in_place,
    _other_weight_of_the_same_size,
    _load,
    _reset,
    _double,
    _twice_cast,
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["lin", "tr"])
def test_every_change_is_seen(model, change, caching, inference, name):
    layer = model.base_model.model.get_submodule(name)
    x = torch.randn(5, layer.in_features)
    with DoraCaching(caching), torch.inference_mode(inference):
        layer(x)
        layer(x)
    change(layer)
    x = x.to(layer.base_layer.weight.dtype)
    with DoraCaching(caching), torch.inference_mode(inference):
        kept = layer(x)
        # The norms of a dense layer that has to compute them come from another product: other last bits.
        same([kept], [fresh(layer, x)], rtol=1e-5, atol=1e-5)


def test_merging_and_unmerging(model, ids):
    expected = model(ids)
    model.merge_adapter()
    model(ids)
    model.unmerge_adapter()
    outputs = model(ids)
    same(outputs, fresh(model, ids), rtol=1e-5, atol=1e-5)
    for mine, other in zip(outputs, expected, strict=True):
        assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_magnitudes_still_train(model, ids):
    model(ids)
    sum(out.sum() for out in model(ids)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "magnitude" in name)


def test_kept_in_inference_mode_and_used_with_gradients(model, ids, counted):
    with torch.inference_mode():
        expected = model(ids)
    outputs = model(ids)
    assert len(counted) == 4
    same(outputs, expected, rtol=1e-5, atol=1e-5)
    sum(out.sum() for out in outputs).backward()


def test_weights_made_in_inference_mode_are_trusted_within_caching(make, ids, counted):
    with torch.inference_mode():
        model = make(pylora, targets=["lin"]).eval()
        counted.clear()
        expected = model(ids)
        same(model(ids), expected)
        assert len(counted) == 2
        with DoraCaching():
            same(model(ids), expected)
            same(model(ids), expected, rtol=1e-5, atol=1e-5)
            assert len(counted) == 3
        with torch.inference_mode():
            _in_place(model.base_model.model.lin)
        for context in (DoraCaching(False), DoraCaching()):
            with context:
                outputs = model(ids)
                same(outputs, fresh(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_not_carry_what_is_kept(model, ids, copier):
    expected = model(ids)
    twin = copier(model)
    assert not any(caches(twin))
    assert all(caches(model))
    same(twin(ids), expected)
    assert all(caches(twin))
    with torch.no_grad():
        twin.base_model.model.lin.lora_A["default"].weight.mul_(2)
    outputs = twin(ids)
    same(outputs, fresh(twin, ids), rtol=1e-5, atol=1e-5)
    assert not torch.equal(outputs[0], expected[0])
    assert "kept" not in "".join(model.state_dict())


def test_several_adapters(make, ids, counted):
    model = make(pylora, targets=["lin"], names=("one", "two")).eval()
    counted.clear()
    expected = model(ids)
    assert len(counted) == 2
    same(model(ids), expected)
    assert len(counted) == 2
    model.set_adapter("two")
    alone = model(ids)
    assert len(counted) == 2
    same(alone, fresh(model, ids), rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_magnitudes_runs(make):
    layer = make(pylora, targets=["lin"]).base_model.model.lin.eval()
    x = torch.randn(5, 8)
    expected = layer(x)
    seen = []
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *args: seen.append(1))
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert seen == [1]

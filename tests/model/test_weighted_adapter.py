"""`add_weighted_adapter`: the eleven kinds on every kind of layer beside PEFT, its errors, and models left alone."""

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pylora
from pylora.combine import COMBINATIONS, EQUAL_RANK_KINDS, SVD_KINDS

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.e = nn.Embedding(11, 12)
        self.c = nn.Conv2d(3, 6, (2, 2))
        self.c1 = nn.Conv2d(6, 5, 1)
        self.q = nn.Linear(15, 20)
        self.t = Conv1D(9, 20)
        self.head = nn.Linear(9, 3)
        self.to(dtype)

    def forward(self, x):
        x = self.c1(self.c(self.e(x).view(-1, 3, 2, 2))).flatten(1)
        return self.head(self.t(self.q(torch.cat([x, x, x], dim=1))))


X = torch.arange(11)
TARGETS = ["e", "c", "c1", "q", "t"]


def build(lib, first, second, dtype=torch.float32):
    """A model with adapters "a" and "b" whose numbers are the same whatever made them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out
        model = lib.get_peft_model(Net(dtype), lib.LoraConfig(**first), adapter_name="a")
        model.add_adapter("b", lib.LoraConfig(**second))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def options(**kwargs):
    return {"target_modules": TARGETS, "r": 3, "lora_alpha": 5} | kwargs


def layers(model):
    found = {name: getattr(model.base_model.model, name) for name in TARGETS}
    return {name: layer for name, layer in found.items() if hasattr(layer, "base_layer")}


def add(model, weights=(1.3, -0.4), name="new", seed=4, adapters=("a", "b"), **kwargs):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(list(adapters), list(weights), name, **kwargs)


def compare(mine, theirs, name="new", tolerance=2e-5):
    for key, layer in layers(mine).items():
        expected = layers(theirs)[key]
        assert layer.r[name] == expected.r[name]
        delta, reference = layer.get_delta_weight(name), expected.get_delta_weight(name)
        assert (delta - reference).abs().max() <= tolerance * reference.abs().max().clamp_min(1e-6), key
        for a, b in zip(
            [p for n, p in layer.named_parameters() if n.endswith((f".{name}", f".{name}.weight"))],
            [p for n, p in expected.named_parameters() if n.endswith((f".{name}", f".{name}.weight"))],
            strict=True,
        ):
            assert a.shape == b.shape
            assert not a.requires_grad


PAIRS = [
    pytest.param({}, {}, id="same"),
    pytest.param({"target_modules": ["e", "q"]}, {"target_modules": ["q", "t", "c"]}, id="other targets"),
    pytest.param({"lora_alpha": 9}, {"alpha_pattern": {"q": 2}}, id="alphas"),
]
UNEQUAL = [
    pytest.param({"r": 2}, {"r": 4}, id="other ranks"),
    pytest.param({"rank_pattern": {"q": 5}}, {}, id="rank pattern"),
]


# PEFT leaves a few numbers of a layer of equal magnitudes to chance; none here.
@pytest.mark.parametrize("weights", [(1.3, 0.4), (1.0, -0.5), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
def test_beside_peft(kind, first, second, weights):
    mine, theirs = (build(lib, options(**first), options(**second)) for lib in (pylora, peft))
    for model in (mine, theirs):
        add(model, weights, combination_type=kind, density=0.6)
    compare(mine, theirs)
    for model in (mine, theirs):
        assert model.active_adapter == "a"
        model.set_adapter("new")
    expected = theirs(X).detach()
    torch.testing.assert_close(mine(X), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("first", "second"), UNEQUAL)
@pytest.mark.parametrize("kind", sorted(SVD_KINDS | {"cat"}))
def test_unequal_ranks_beside_peft(kind, first, second):
    mine, theirs = (build(lib, options(**first), options(**second)) for lib in (pylora, peft))
    for model in (mine, theirs):
        add(model, combination_type=kind, density=0.6)
    compare(mine, theirs)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_sign_methods_beside_peft(kind, method):
    mine, theirs = (build(lib, options(), options()) for lib in (pylora, peft))
    for model in (mine, theirs):
        add(model, combination_type=kind, density=0.5, majority_sign_method=method)
    compare(mine, theirs)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("rank", "clamp"), [(2, None), (5, None), (3, 0.9), (3, 0.99)])
def test_svd_options_beside_peft(rank, clamp, full):
    mine, theirs = (build(lib, options(), options()) for lib in (pylora, peft))
    for model in (mine, theirs):
        add(model, svd_rank=rank, svd_clamp=clamp, svd_full_matrices=full)
    compare(mine, theirs, tolerance=2e-5 if clamp is None else 2e-3)


@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_dora_beside_peft(kind):
    """The new adapter's magnitudes are those of the base weight."""
    kwargs = options(target_modules=["q"], use_dora=True)
    mine, theirs = (build(lib, kwargs, kwargs) for lib in (pylora, peft))
    for model in (mine, theirs):
        add(model, combination_type=kind)
        model.set_adapter("new")
    magnitudes = [m.base_model.model.q.lora_magnitude_vector["new"].weight for m in (mine, theirs)]
    torch.testing.assert_close(*magnitudes)
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-4)


def test_one_adapter_is_combined_exactly():
    for kind in ("svd", "cat", "ties"):
        model = build(pylora, options(), options())
        add(model, [-0.7], adapters=["b"], combination_type=kind)
        for layer in layers(model).values():
            expected = -0.7 * layer.get_delta_weight("b")
            torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-5)


def test_configurations_beside_peft():
    for first, second in (({}, {}), ({"target_modules": "e|q"}, {"target_modules": "t"})):
        mine, theirs = (build(lib, options(**first), options(**second)) for lib in (pylora, peft))
        for model in (mine, theirs):
            add(model, combination_type="cat")
        ours, expected = (model.peft_config["new"].to_dict() for model in (mine, theirs))
        assert ours == expected


def test_the_result_saves_and_loads_in_both(tmp_path):
    """On layers of a pattern's smaller rank PEFT's factors do not fit the new configuration."""
    model = build(pylora, options(rank_pattern={"q": 2}), options(rank_pattern={"q": 2}))
    add(model, combination_type="linear")
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    for lib in (pylora, peft):
        torch.manual_seed(0)
        loaded = lib.PeftModel.from_pretrained(Net(), tmp_path / "new").eval()
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-3, atol=1e-3)


def test_rslora_keeps_the_sum():
    """PEFT leaves use_rslora set, which multiplies the result by the root of its rank."""
    model = build(pylora, options(use_rslora=True), options())
    add(model, combination_type="cat")
    for layer in layers(model).values():
        expected = 1.3 * layer.get_delta_weight("a") - 0.4 * layer.get_delta_weight("b")
        torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-4, atol=1e-4)
        assert layer.scaling["new"] == 1


def test_trained_biases_of_b_are_combined():
    """PEFT leaves them out."""
    kwargs = {"target_modules": ["q", "t"], "lora_bias": True}
    model = build(pylora, options(**kwargs), options(**kwargs))
    add(model, combination_type="svd", svd_rank=6)
    q = model.base_model.model.q
    x = torch.randn(4, 15)
    outputs = {}
    for names in (["a"], ["b"], ["new"]):
        q._active_adapter = names
        outputs[names[0]] = q(x) - q.base_layer(x)
    torch.testing.assert_close(outputs["new"], 1.3 * outputs["a"] - 0.4 * outputs["b"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_the_base_weight_is_not_changed_again(scheme):
    """PEFT starts the new adapter by the first one's scheme, which takes another part out of the base weight."""
    kwargs = {"target_modules": ["q"], "init_lora_weights": scheme}
    model = build(pylora, options(**kwargs), options(target_modules=["q"]))
    before = model.base_model.model.q.weight.detach().clone()
    add(model, combination_type="svd")
    assert torch.equal(model.base_model.model.q.weight, before)
    assert model.peft_config["new"].init_lora_weights == scheme


@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "ties_svd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_base_with_f32_adapters(kind, dtype):
    model = build(pylora, options(), options(), dtype)
    add(model, combination_type=kind, density=0.5)
    for layer in layers(model).values():
        attr = layer.factor_names[0]
        new, old = (getattr(layer, attr)[name] for name in ("new", "a"))
        assert getattr(new, "weight", new).dtype == getattr(old, "weight", old).dtype == torch.float32


def test_an_existing_name_is_left_alone():
    model = build(pylora, options(), options())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    add(model, name="b", combination_type="nonsense")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


ERRORS = [
    ({"adapters": ["a", "x"]}, ValueError, "Adapter x does not exist"),
    ({"adapters": [], "weights": []}, ValueError, ""),
    ({"combination_type": "mean"}, ValueError, "Invalid combination_type: mean"),
    ({"combination_type": "ties", "density": None}, TypeError, ""),
    ({"combination_type": "dare_linear_svd", "density": -0.5}, ValueError, "Density should be >= 0"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, RuntimeError, "Unimplemented mask"),
    ({"combination_type": "svd", "svd_driver": "gesvd"}, RuntimeError, ""),
]


@pytest.mark.parametrize("lib", [pylora, peft], ids=["pylora", "peft"])
@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS, ids=str)
def test_errors(lib, kwargs, error, message):
    model = build(lib, options(), options())
    check_refused(lib, model, kwargs, error, message)


@pytest.mark.parametrize("lib", [pylora, peft], ids=["pylora", "peft"])
@pytest.mark.parametrize("kind", sorted(EQUAL_RANK_KINDS))
def test_unequal_ranks(lib, kind):
    model = build(lib, options(r=2), options(r=4))
    check_refused(lib, model, {"combination_type": kind, "density": 0.5}, ValueError, "must have the same r value")
    model = build(lib, options(rank_pattern={"q": 2}), options())
    check_refused(lib, model, {"combination_type": kind, "density": 0.5}, RuntimeError, "")


@pytest.mark.parametrize("lib", [pylora, peft], ids=["pylora", "peft"])
def test_targets_of_different_types(lib):
    model = build(lib, options(target_modules="q|t"), options())
    check_refused(lib, model, {}, ValueError, "same target modules type")


@pytest.mark.parametrize("lib", [pylora, peft], ids=["pylora", "peft"])
def test_shared_modules_to_save(lib):
    model = build(lib, options(modules_to_save=["head"]), options(modules_to_save=["head"]))
    message = "same module with modules_to_save, but found 1 such instance"
    check_refused(lib, model, {}, ValueError, message)
    model = build(lib, options(modules_to_save=["head"]), options())
    add(model)
    assert "new" in model.base_model.model.head.modules_to_save


def test_weights_of_another_number():
    check_refused(pylora, build(pylora, options(), options()), {"weights": [1.0]}, ValueError, "weights: expected")


def test_a_failure_in_the_middle_takes_everything_back(monkeypatch):
    from pylora.model import weighted

    combine, calls = weighted.combine_terms, []

    def failing(terms, how):
        calls.append(how)
        if len(calls) == 3:
            raise RuntimeError("third layer")
        return combine(terms, how)

    monkeypatch.setattr(weighted, "combine_terms", failing)
    check_refused(pylora, build(pylora, options(), options()), {}, RuntimeError, "third layer")


def check_refused(lib, model, kwargs, error, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    arguments = {"adapters": ["a", "b"], "weights": [1.0, 1.0]} | kwargs
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(adapter_name="new", **arguments)
    if lib is pylora:
        assert list(model.peft_config) == ["a", "b"]
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert model.active_adapter == "a"

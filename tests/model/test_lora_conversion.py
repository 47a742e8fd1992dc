"""`convert_to_lora`, `save_as_lora` and `reduce_intruder_dimension`, beside PEFT where it works."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import pylora
from pylora.model.conversion import convert_to_lora, save_as_lora
from pylora.model.intruders import reduce_intruder_dimension

peft = pytest.importorskip("peft")
their_reduction = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension
pytestmark = pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(20, 32)
        self.v = nn.Linear(32, 12, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.v(torch.tanh(self.q(x))))


X = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return Net()


def build(lib, **kwargs):
    options = {"target_modules": ["q", "v"], "r": 4, "lora_alpha": 6} | kwargs
    model = lib.get_peft_model(net(), lib.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def products(tensors):
    keys = sorted(key for key in tensors if ".lora_A." in key)
    return {key: tensors[key.replace(".lora_A.", ".lora_B.")] @ tensors[key] for key in keys}


@pytest.mark.parametrize("kwargs", [{}, {"target_modules": "q|v"}, {"rank_pattern": {"q": 2}}], ids=str)
@pytest.mark.parametrize("rank", [2, 4, 7, 0.5, 0.9])
def test_beside_peft(rank, kwargs):
    config, tensors = convert_to_lora(build(pylora, **kwargs), rank)
    expected_config, expected = peft.convert_to_lora(build(peft, **kwargs), rank)
    assert tensors.keys() == expected.keys()
    assert {key: value.shape for key, value in tensors.items()} == {key: v.shape for key, v in expected.items()}
    for key, product in products(expected).items():
        assert (products(tensors)[key] - product).abs().max() < 1e-5 * product.abs().max()
    assert config.to_dict() == expected_config.to_dict()


def test_loads_as_an_adapter(tmp_path):
    model = build(pylora)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        save_as_lora(tmp_path / "new", model, rank=4)
    for lib in (pylora, peft):
        loaded = lib.PeftModel.from_pretrained(net(), tmp_path / "new").eval()
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["r"] == 4


def test_modules_to_save_go_along(tmp_path):
    model = build(pylora, modules_to_save=["head"])
    model.add_adapter("other", pylora.LoraConfig(target_modules=["q"], modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.fill_(2)
    save_as_lora(tmp_path, model, rank=4)
    assert (load_file(tmp_path / "adapter_model.safetensors")["base_model.model.head.weight"] == 2).all()
    loaded = pylora.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_some_of_the_layers():
    """PEFT fails on a layer without it."""
    model = build(pylora)
    model.add_adapter("other", pylora.LoraConfig(target_modules=["v"], init_lora_weights=False))
    config, tensors = convert_to_lora(model, 3, adapter_name="other")
    assert len(tensors) == 2
    assert "q" not in config.target_modules


def test_without_a_configuration():
    model = net()
    pylora.inject_adapter_in_model(pylora.LoraConfig(target_modules=["q"], init_lora_weights=False), model)
    expected = model.q.get_delta_weight("default")
    del model.peft_config
    config, tensors = convert_to_lora(model, 4)
    assert config.r == config.lora_alpha == 4
    assert tensors["q.lora_A.weight"].shape == (4, 20)
    fresh = net()
    pylora.inject_adapter_in_model(config, fresh)
    pylora.set_peft_model_state_dict(fresh, tensors)
    u, s, vh = torch.linalg.svd(expected)
    torch.testing.assert_close(fresh.q.get_delta_weight("default"), (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)


def test_conv1d_and_dtypes():
    model = pylora.get_peft_model(
        nn.Sequential(Conv1D(12, 20)).to(torch.bfloat16),
        pylora.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, fan_in_fan_out=True),
        autocast_adapter_dtype=False,
    )
    _, tensors = convert_to_lora(model, 4)
    a, b = tensors["base_model.model.0.lora_A.weight"], tensors["base_model.model.0.lora_B.weight"]
    assert a.dtype == b.dtype == torch.bfloat16
    expected = model.base_model.model[0].get_delta_weight("default").float().t()
    torch.testing.assert_close(b.float() @ a.float(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_dora_is_rewritten_as_what_it_adds():
    """PEFT leaves the magnitudes out."""
    model = build(pylora, use_dora=True)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "magnitude" in n):
            parameter.mul_(1.5)
    config, tensors = convert_to_lora(model, 12)
    plain = pylora.get_peft_model(net(), config).eval()
    pylora.set_peft_model_state_dict(plain, tensors)
    merged = model.merge_and_unload()
    for name in ("q", "v"):
        delta = plain.base_model.model.get_submodule(name).get_delta_weight("default")
        u, s, vh = torch.linalg.svd(merged.get_submodule(name).weight - net().get_submodule(name).weight)
        best = (u[:, :12] * s[:12]) @ vh[:12]
        torch.testing.assert_close(delta, best, rtol=1e-4, atol=1e-5)


ERRORS = [
    ({"rank": 0}, ValueError, "rank of 0"),
    ({"rank": 0.0}, ValueError, "between 0 and 1"),
    ({"rank": 1.5}, ValueError, "between 0 and 1"),
    ({"rank": 40}, ValueError, "larger than the weight shape"),
    ({"rank": 4, "adapter_name": "absent"}, KeyError, "absent"),
]


@pytest.mark.parametrize("lib", ["pylora", "peft"])
@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS, ids=str)
def test_errors(lib, kwargs, error, message):
    convert, module = (convert_to_lora, pylora) if lib == "pylora" else (peft.convert_to_lora, peft)
    model = build(module)
    with pytest.raises(error, match=message):
        convert(model, **kwargs)


@pytest.mark.parametrize("lib", ["pylora", "peft"])
def test_models_that_cannot_be_converted(lib, tmp_path):
    convert, module = (convert_to_lora, pylora) if lib == "pylora" else (peft.convert_to_lora, peft)
    with pytest.raises(TypeError, match="Could not detect any layer"):
        convert(net(), 4)
    with pytest.raises(ValueError, match="config sets bias=all"):
        convert(build(module, bias="all"), 4)
    embedding = module.get_peft_model(nn.Sequential(nn.Embedding(5, 8)), module.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert(embedding, 4)
    save = save_as_lora if lib == "pylora" else peft.save_as_lora
    with pytest.raises(TypeError):
        save(tmp_path / "out", net(), 4)
    assert (tmp_path / "out").exists() is (lib == "peft")


class TestIntruders:
    def run(self, lib, **kwargs):
        model = build(lib)
        lines = []
        reduce = reduce_intruder_dimension if lib is pylora else their_reduction
        reduce(model, logging_sink=lines.append, **kwargs)
        return model, lines

    @pytest.mark.parametrize(
        "kwargs", [{}, {"threshold_epsilon": 0.9, "top_k": 3}, {"mitigation_lambda": 0.2}], ids=str
    )
    def test_beside_peft(self, kwargs):
        (mine, lines), (theirs, expected_lines) = (self.run(lib, **kwargs) for lib in (pylora, peft))
        assert lines == expected_lines
        assert mine.active_adapters == ["intruder_reduced"]
        for name in ("q", "v"):
            layer, expected = (m.base_model.model.get_submodule(name) for m in (mine, theirs))
            delta = expected.get_delta_weight("intruder_reduced")
            difference = layer.get_delta_weight("intruder_reduced") - delta
            assert difference.abs().max() < 2e-5 * delta.abs().max()
            assert torch.equal(layer.get_delta_weight("default"), expected.get_delta_weight("default"))

    def test_without_intruders_it_is_a_copy(self):
        model, lines = self.run(pylora, threshold_epsilon=0.0)
        assert "No intruders" in lines[0]
        q = model.base_model.model.q
        assert torch.equal(q.lora_A["intruder_reduced"].weight, q.lora_A["default"].weight)
        assert q.lora_A["intruder_reduced"].weight is not q.lora_A["default"].weight

    def test_embedding_and_conv1d(self):
        """PEFT gives factors of the wrong shape there."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(15, 20), Conv1D(12, 20))
        options = {"target_modules": ["0", "1"], "r": 4, "init_lora_weights": False, "fan_in_fan_out": True}
        model = pylora.get_peft_model(model, pylora.LoraConfig(**options))
        reduce_intruder_dimension(model, threshold_epsilon=2.0, mitigation_lambda=1.0, logging_sink=None)
        for layer in model.base_model.model:
            torch.testing.assert_close(
                layer.get_delta_weight("intruder_reduced"), layer.get_delta_weight("default"), rtol=1e-3, atol=1e-4
            )

    def test_other_models_and_names(self):
        model = build(pylora)
        model.peft_type = "IA3"
        with pytest.raises(ValueError, match="not using LoRA"):
            reduce_intruder_dimension(model)
        with pytest.raises(KeyError):
            reduce_intruder_dimension(build(pylora), old_adapter_name="absent")

    def test_a_failure_takes_the_new_adapter_out(self, monkeypatch):
        from pylora.model import intruders

        def fail(*args):
            raise RuntimeError("later")

        monkeypatch.setattr(intruders, "_reduced", fail)
        model = build(pylora)
        with pytest.raises(RuntimeError, match="later"):
            reduce_intruder_dimension(model)
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]

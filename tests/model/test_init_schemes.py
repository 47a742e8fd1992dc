"""Initialisers that change the base weight, through a model: beside PEFT, saved, loaded, and taken back on failure."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pylora

peft = pytest.importorskip("peft")

CHANGING = ["olora", "pissa", "pissa_niter_4"]
SCHEMES = [*CHANGING, "orthogonal"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(20, 32)
        self.v = nn.Linear(32, 12, bias=False)

    def forward(self, x):
        return self.v(torch.tanh(self.q(x)))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


X = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))


def config(lib, scheme, **kwargs):
    return lib.LoraConfig(target_modules=["q", "v"], r=4, lora_alpha=6, init_lora_weights=scheme, **kwargs)


def wrap(lib, scheme, model=None, **kwargs):
    torch.manual_seed(5)
    return lib.get_peft_model(net() if model is None else model, config(lib, scheme, **kwargs))


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}], ids=str)
def test_beside_peft(scheme, kwargs):
    mine, theirs = wrap(pylora, scheme, **kwargs), wrap(peft, scheme, **kwargs)
    for name, weight in base_weights(theirs).items():
        torch.testing.assert_close(base_weights(mine)[name], weight, rtol=1e-4, atol=3e-6)
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine(X), net()(X), rtol=1e-4, atol=1e-5)
    if not scheme.startswith("pissa"):  # whose singular vectors have free signs
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("scheme", CHANGING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_beside_peft(scheme, dtype):
    mine, theirs = wrap(pylora, scheme, net(dtype)), wrap(peft, scheme, net(dtype))
    for name, weight in base_weights(theirs).items():
        torch.testing.assert_close(base_weights(mine)[name], weight)
    for mine_layer, their_layer in zip(
        (mine.base_model.model.q, mine.base_model.model.v),
        (theirs.base_model.model.q, theirs.base_model.model.v),
        strict=True,
    ):
        assert mine_layer.lora_A["default"].weight.dtype == their_layer.lora_A["default"].weight.dtype
        delta, expected = (each.get_delta_weight("default") for each in (mine_layer, their_layer))
        torch.testing.assert_close(delta, expected, rtol=0.02, atol=0.01 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("scheme", ["olora", "pissa"])
def test_conv1d(scheme):
    """PEFT's olora takes the weight as it is stored there, [in, out], and fails."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 20))
    before = model(X)
    wrapped = pylora.get_peft_model(
        copy.deepcopy(model),
        pylora.LoraConfig(target_modules=["0"], r=4, init_lora_weights=scheme, fan_in_fan_out=True),
    )
    assert not torch.equal(wrapped.base_model.model[0].weight, model[0].weight)
    torch.testing.assert_close(wrapped(X), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["olora", "pissa", "orthogonal", "loftq"])
def test_attention(scheme):
    """Both projections; PEFT looks for a weight that an attention does not have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 4)).eval()
    x = torch.randn(5, 2, 16)
    before = model[0](x, x, x)[0]
    loftq = {"loftq_config": {"loftq_bits": 8, "loftq_iter": 1}} if scheme == "loftq" else {}
    options = pylora.LoraConfig(target_modules=["0"], r=4, init_lora_weights=scheme, **loftq)
    attention = pylora.get_peft_model(model, options).base_model.model[0]
    after = attention(x, x, x)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 if scheme != "loftq" else 1e-2)
    attention.enable_adapters(False)
    changed = scheme != "orthogonal"
    assert torch.allclose(attention(x, x, x)[0], before, atol=1e-5) is not changed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_embedding_beside_it_starts_as_in_peft(scheme):
    class WithEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(11, 20)
            self.q = nn.Linear(20, 9)

        def forward(self, x):
            return self.q(self.e(x))

    factors = []
    for lib in (pylora, peft):
        torch.manual_seed(0)
        model = WithEmbedding()
        model = lib.get_peft_model(model, lib.LoraConfig(target_modules=["e", "q"], r=4, init_lora_weights=scheme))
        layer = model.base_model.model.e
        factors.append((layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]))
    for mine, theirs in zip(*factors, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheme", ["olora", "pissa", "orthogonal"])
def test_a_convolution_raises_peft_s_type_and_changes_nothing(scheme):
    class WithConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.c = nn.Conv2d(3, 6, 3)

    for lib in (pylora, peft):
        model = WithConv()
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="Unknown initialization"):
            lib.get_peft_model(model, lib.LoraConfig(target_modules=["q", "c"], r=4, init_lora_weights=scheme))
        if lib is pylora:
            assert type(model.q) is nn.Linear
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("scheme", "rank", "error"), [("pissa", 4, TypeError), ("olora", 4, TypeError), ("orthogonal", 3, ValueError)]
)
def test_a_refused_layer_leaves_the_others_alone(scheme, rank, error):
    model = net()
    model.v.to(torch.float64)  # the second of the two
    before = {name: p.clone() for name, p in model.named_parameters()}
    for lib in (pylora, peft):
        target = model if lib is pylora else copy.deepcopy(model)
        with pytest.raises(error):
            lib.get_peft_model(target, lib.LoraConfig(target_modules=["q", "v"], r=rank, init_lora_weights=scheme))
    assert type(model.q) is nn.Linear
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("scheme", ["olora", "pissa", "loftq"])
def test_reset_takes_only_what_leaves_the_base_alone(scheme):
    for lib in (pylora, peft):
        model = wrap(lib, True)
        layer = model.base_model.model.q
        before = layer.lora_A["default"].weight.clone()
        with pytest.raises(ValueError, match="Unknown initialization"):
            layer.reset_lora_parameters("default", scheme)
        assert torch.equal(layer.lora_A["default"].weight, before)
        layer.reset_lora_parameters("default", "gaussian")
        assert not torch.equal(layer.lora_A["default"].weight, before)


class TestSavedAndLoaded:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("scheme", ["olora", "pissa"])
    @pytest.mark.parametrize("writer", [pylora, peft])
    def test_the_base_weight_is_changed_again(self, writer, scheme, low_cpu_mem_usage, tmp_path):
        """The file's A and B belong to the residual, which is computed from the original weight once more."""
        trained = wrap(writer, scheme)
        with torch.no_grad():
            trained.base_model.model.q.lora_B["default"].weight *= 2
        trained.save_pretrained(tmp_path)
        loaded = pylora.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(X), trained(X), rtol=1e-4, atol=1e-5)
        q = loaded.base_model.model.q
        assert torch.equal(q.lora_B["default"].weight, trained.base_model.model.q.lora_B["default"].weight)
        assert not torch.allclose(q.weight, net().q.weight)
        if not low_cpu_mem_usage:  # with which PEFT fails
            theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
            torch.testing.assert_close(q.weight, theirs.base_model.model.q.weight, rtol=1e-4, atol=3e-6)

    @pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
    @pytest.mark.parametrize("beside", [False, True])
    def test_a_file_that_does_not_fit_leaves_the_base_weight_alone(self, beside, tmp_path):
        wrap(pylora, "pissa").save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if ".v.lora_B" in key)
        save_file({**tensors, key: torch.zeros(3, 3)}, file)
        model = wrap(pylora, True) if beside else net()
        before = {name: p.clone() for name, p in model.named_parameters()}
        load = model.load_adapter if beside else partial(pylora.PeftModel.from_pretrained, model)
        with pytest.raises(RuntimeError):
            load(tmp_path, adapter_name="other")
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


class TestLoftQ:
    def config(self, **kwargs):
        loftq = {"loftq_bits": 4, "loftq_iter": 2}
        return pylora.LoraConfig(r=4, lora_alpha=8, init_lora_weights="loftq", loftq_config=loftq, **kwargs)

    def test_linear_convolution_and_embedding(self):
        """PEFT needs bitsandbytes and a GPU for it, and fails on the last two."""

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(40, 3 * 8 * 8)
                self.c = nn.Conv2d(3, 6, 3)
                self.q = nn.Linear(6 * 36, 10)

            def forward(self, x):
                return self.q(self.c(self.e(x).view(-1, 3, 8, 8)).flatten(1))

        torch.manual_seed(0)
        model = Mixed()
        x = torch.arange(40)
        expected = model(x)
        before = {name: getattr(model, name).weight.detach().clone() for name in "ecq"}
        wrapped = pylora.get_peft_model(model, self.config(target_modules=list("ecq")))
        repaired = (wrapped(x) - expected).norm()
        with wrapped.disable_adapter():
            quantised = (wrapped(x) - expected).norm()
        assert 0 < repaired < quantised
        for name, weight in before.items():
            layer = getattr(wrapped.base_model.model, name)
            rounding = (layer.weight - weight).norm()
            rest = (layer.weight + layer.get_delta_weight("default") - weight).norm()
            assert 0 < rest < rounding < 0.12 * weight.norm()

    def test_needs_its_settings(self):
        with pytest.raises(ValueError, match="loftq_config"):
            pylora.LoraConfig(init_lora_weights="loftq")


class TestSchemesThatComeLater:
    """Their trained adapters are plain LoRA, so that files of PEFT's load."""

    def saved(self, folder, scheme):
        trained = wrap(pylora, False)
        trained.save_pretrained(folder)
        file = folder / "adapter_config.json"
        text = json.loads(file.read_text())
        text["init_lora_weights"] = scheme
        text["eva_config"] = vars(pylora.config.EvaConfig()) if scheme == "eva" else None
        text["lora_ga_config"] = vars(pylora.config.LoraGAConfig()) if scheme == "lora_ga" else None
        file.write_text(json.dumps(text))
        return trained

    @pytest.mark.parametrize("scheme", ["eva", "lora_ga", "mica"])
    def test_a_file_loads(self, scheme, tmp_path):
        trained = self.saved(tmp_path, scheme)
        loaded = pylora.PeftModel.from_pretrained(net(), tmp_path)
        assert torch.equal(loaded(X), trained(X))
        assert loaded.peft_config["default"].init_lora_weights == scheme
        assert (loaded.peft_config["default"].lora_ga_config is not None) is (scheme == "lora_ga")
        model = wrap(pylora, True)
        model.load_adapter(tmp_path, "other")
        model.set_adapter("other")
        torch.testing.assert_close(model(X), trained(X))

    @pytest.mark.parametrize("beside", [False, True])
    def test_a_file_that_lacks_tensors(self, beside, tmp_path):
        self.saved(tmp_path, "eva")
        file = tmp_path / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if ".v." not in key}, file)
        if beside:
            loaded = wrap(pylora, True)
            assert len(loaded.load_adapter(tmp_path, "other").missing_keys) == 2
            layer, name = loaded.base_model.model.v, "other"
        else:
            with pytest.warns(UserWarning, match="missing adapter keys"):
                loaded = pylora.PeftModel.from_pretrained(net(), tmp_path)
            layer, name = loaded.base_model.model.v, "default"
        assert not layer.get_delta_weight(name).any()
        assert layer.lora_A[name].weight.isfinite().all()

    @pytest.mark.filterwarnings("ignore:CorDA changes", "ignore:.*corda_config")
    @pytest.mark.parametrize(("scheme", "is_trainable"), [("corda", False), ("mica", True)])
    def test_what_the_weights_do_not_say_is_refused(self, scheme, is_trainable, tmp_path):
        self.saved(tmp_path, scheme)
        with pytest.raises(pylora.UnsupportedFeatureError, match="init_lora_weights"):
            pylora.PeftModel.from_pretrained(net(), tmp_path, is_trainable=is_trainable)

    @pytest.mark.filterwarnings("ignore:.*eva_config")
    def test_a_new_adapter_is_refused(self):
        with pytest.raises(pylora.UnsupportedFeatureError, match="'eva'"):
            wrap(pylora, "eva")


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_dora_s_magnitudes_are_those_of_the_whole_weight(scheme):
    mine, theirs = wrap(pylora, scheme, use_dora=True), wrap(peft, scheme, use_dora=True)
    for name in ("q", "v"):
        layer, expected = (model.base_model.model.get_submodule(name) for model in (mine, theirs))
        magnitude = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude, net().get_submodule(name).weight.norm(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(magnitude, expected.lora_magnitude_vector["default"].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine(X), net()(X), rtol=1e-4, atol=1e-5)

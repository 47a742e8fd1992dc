"""aLoRA on a layer, and where a batch invokes it."""

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets as peft_offsets
from torch import nn
from torch.testing import assert_close

import pylora
from pylora.layers import Linear
from pylora.layers.variants import ALoraLinearVariant, calculate_alora_offsets


def alora(lib=pylora, tokens=(1, 2), **fields):
    return lib.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=list(tokens), **fields)


def make_layer(lib, cls, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    layer = cls(
        nn.Linear(6, 5).to(dtype), "default", config=alora(lib, init_lora_weights=False, **fields), r=3, lora_alpha=4
    )
    layer.lora_A.float()
    layer.lora_B.float()
    return layer


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def both(request):
    return make_layer(pylora, Linear, request.param), make_layer(peft, peft.tuners.lora.Linear, request.param)


class TestForward:
    @pytest.mark.parametrize("offsets", [None, [None, 2, 9], [0, 1, 4], [None] * 3], ids=str)
    @pytest.mark.parametrize("tokens", [(4,), ()], ids=["tokens", "one token"])
    def test_as_peft(self, both, offsets, tokens):
        x = torch.randn(3, *tokens, 6).to(both[0].base_layer.weight.dtype)
        results = []
        for layer in both:
            out = layer(x, alora_offsets=offsets)
            out.float().square().sum().backward()
            results.append((out, *(param.grad for name, param in layer.named_parameters() if "lora_" in name)))
        for mine, other in zip(*results, strict=True):
            assert (mine is None) == (other is None)
            assert_close(mine, other)

    def test_only_the_last_tokens(self, both):
        layer = both[0]
        x = torch.randn(2, 5, 6).to(layer.base_layer.weight.dtype)
        base = layer.base_layer(x)
        out = layer(x, alora_offsets=[None, 3])
        assert torch.equal(out[0], base[0])
        assert torch.equal(out[1, :2], base[1, :2])
        assert (out[1, 2:] != base[1, 2:]).any(-1).all()
        plain = make_layer(pylora, Linear, layer.base_layer.weight.dtype)
        plain.lora_variant.clear()
        assert_close(out[1, 2:], plain(x)[1, 2:])

    def test_without_offsets_gradients_are_zero(self):
        layer = make_layer(pylora, Linear)
        layer(torch.randn(2, 4, 6)).sum().backward()
        assert all((param.grad == 0).all() for name, param in layer.named_parameters() if "lora_" in name)

    def test_dropout_acts_on_the_adapter_s_tokens(self):
        layer = make_layer(pylora, Linear, lora_dropout=0.99)
        x = torch.randn(2, 400, 6)
        out, base = layer(x, alora_offsets=[400, 1]), layer.base_layer(x)
        changed = (out[0] != base[0]).any(-1).double().mean()
        assert 0 < changed < 0.3

    def test_a_result_that_is_not_contiguous_stays_as_it_is(self):
        layer = make_layer(pylora, Linear)
        x = torch.randn(4, 2, 6).transpose(0, 1)
        result = torch.randn(4, 2, 5).transpose(0, 1)
        before = result.clone()
        out = ALoraLinearVariant.forward(layer, "default", x, result, alora_offsets=[1, 2])
        assert torch.equal(result, before)
        assert out.shape == result.shape
        assert torch.equal(out[0, :3], before[0, :3])

    def test_a_wrong_number_of_offsets(self):
        layer = make_layer(pylora, Linear)
        with pytest.raises(ValueError, match="alora_offsets: expected one for each of the 2 sequences, got 3"):
            layer(torch.randn(2, 4, 6), alora_offsets=[1, 1, 1])

    def test_beside_a_plain_adapter(self):
        layer = make_layer(pylora, Linear)
        layer.update_layer("plain", 3, lora_alpha=4, config=pylora.LoraConfig(init_lora_weights=False))
        layer.set_adapter(["default", "plain"])
        x = torch.randn(2, 4, 6)
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("plain").t()
        expected[1, 2:] += x[1, 2:] @ layer.get_delta_weight("default").t()
        assert_close(layer(x, alora_offsets=[None, 2]), expected)

    def test_mixed_batch(self):
        layer = make_layer(pylora, Linear)
        layer.update_layer("plain", 3, lora_alpha=4, config=pylora.LoraConfig(init_lora_weights=False))
        x = torch.randn(4, 3, 6)
        names = ["default", "plain", "__base__", "default"]
        expected = layer.base_layer(x)
        expected[1] += x[1] @ layer.get_delta_weight("plain").t()
        expected[3, 1:] += x[3, 1:] @ layer.get_delta_weight("default").t()
        assert_close(layer(x, adapter_names=names, alora_offsets=[None, None, None, 2]), expected)
        expected[3] = layer.base_layer(x[3])
        assert_close(layer(x, adapter_names=names), expected)


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [True, False])
    def test_refused_and_nothing_changed(self, safe_merge):
        layer = make_layer(pylora, Linear)
        layer.update_layer("plain", 3, lora_alpha=4, config=pylora.LoraConfig(init_lora_weights=False))
        before = layer.base_layer.weight.clone()
        for check in (layer.merge, layer.check_merge):
            with pytest.raises(NotImplementedError, match=r"aLoRA does not support .*merging"):
                check(safe_merge=safe_merge, adapter_names=["plain", "default"])
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.merged

    def test_of_the_variant_itself(self):
        layer = make_layer(pylora, Linear)
        variant = layer.lora_variant["default"]
        for method in (variant.merge_safe, variant.merge_unsafe, variant.unmerge):
            with pytest.raises(NotImplementedError, match="aLoRA does not support"):
                method(layer, "default", layer.base_layer.weight)


class TestOffsets:
    @pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 2, 3, 4, 5, 6, 7], None], ids=str)
    def test_as_peft(self, tokens):
        ids = torch.randint(1, 4, (60, 6))
        config = {"default": alora(tokens=tokens) if tokens else pylora.LoraConfig()}
        assert calculate_alora_offsets(config, "default", ids) == peft_offsets(config, "default", ids)

    def test_with_names_as_peft(self):
        ids = torch.randint(1, 4, (40, 6))
        configs = {"one": alora(tokens=[1, 2]), "two": alora(tokens=[3]), "plain": pylora.LoraConfig()}
        names = (["one", "two", "plain", "__base__"] * 10)[:38]
        assert calculate_alora_offsets(configs, "two", ids, names) == peft_offsets(configs, "two", ids, names)

    def test_unknown_name(self):
        with pytest.warns(UserWarning, match="Adapter 'other' not found in peft_config. Using base model for row 1"):
            found = calculate_alora_offsets({"a": alora(tokens=[1])}, "a", torch.tensor([[1], [1]]), ["a", "other"])
        assert found == [1, None]

    def test_no_input(self):
        assert calculate_alora_offsets({}, "default", None) == []

    def test_no_tokens_is_no_alora(self):
        config = {"default": pylora.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[])}
        assert calculate_alora_offsets(config, "default", torch.tensor([[1]])) == [None]


def test_only_on_linear_layers():
    for base in (nn.Embedding(4, 4), nn.Conv1d(4, 4, 1)):
        model = nn.Sequential(base)
        model.prepare_inputs_for_generation = None
        with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
            pylora.get_peft_model(model, alora(target_modules=["0"]))
        assert model[0] is base

"""Which variant a configuration gets on which layer; PEFT's rule: one flag, and the layer must have it."""

import dataclasses

import peft
import pytest
import torch
from torch import nn

import pylora
from pylora.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear
from pylora.layers.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    LoraVariant,
    register_variant,
    registry,
)

BASES = {
    Linear: nn.Linear(4, 4),
    Embedding: nn.Embedding(4, 4),
    Conv1d: nn.Conv1d(4, 4, 1),
    Conv2d: nn.Conv2d(4, 4, 1),
    Conv3d: nn.Conv3d(4, 4, 1),
}
DORA = {
    Linear: DoraLinearVariant,
    Embedding: DoraEmbeddingVariant,
    Conv1d: DoraConv1dVariant,
    Conv2d: DoraConv2dVariant,
    Conv3d: DoraConv3dVariant,
}


def layer_of(cls, **config):
    return cls(BASES[cls], "default", config=pylora.LoraConfig(**config), r=4)


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_dora_on_each_kind(cls):
    layer = layer_of(cls, use_dora=True)
    assert type(layer.lora_variant["default"]) is DORA[cls]
    assert layer.use_dora == {"default": True}
    assert layer.supports_lora_conversion() == (cls is Linear)
    assert layer_of(cls).lora_variant == {}


def test_the_same_flags_as_peft():
    assert registry.requested_flags(pylora.LoraConfig()).keys() == _flags_of_peft().keys()
    every = pylora.LoraConfig(
        use_dora=True,
        velora_config={},
        alora_invocation_tokens=[1],
        monteclora_config={},
        use_bdlora={},
        arrow_config={},
        kasa_config={},
        init_lora_weights="mica",
        task_type="CAUSAL_LM",
    )
    assert all(registry.requested_flags(every).values())


def _flags_of_peft():
    flags = {}
    for field in dataclasses.fields(peft.LoraConfig):
        flags.update(dict.fromkeys(field.metadata.get("lora_variants", ())))
        if field.metadata.get("is_lora_variant"):
            flags[field.name] = None
    return flags


class TestRefusals:
    @pytest.mark.parametrize("lib", [peft, pylora])
    def test_two_flags(self, lib):
        config = lib.LoraConfig(target_modules=["0"], use_dora=True, alora_invocation_tokens=[1], task_type="CAUSAL_LM")
        base = nn.Sequential(nn.Linear(4, 4))
        base.prepare_inputs_for_generation = None
        with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
            lib.get_peft_model(base, config)

    def test_a_flag_that_no_configuration_has(self, monkeypatch):
        layer = layer_of(Linear)
        monkeypatch.setattr(Linear, "lora_variants", property(lambda self: {("made_up",): None}))
        with pytest.raises(ValueError, match=r"made_up.*found in lora_variants"):
            layer.resolve_lora_variant(config=pylora.LoraConfig())

    def test_plain_lora_has_to_be_listed(self, monkeypatch):
        layer = layer_of(Linear)
        monkeypatch.setattr(Linear, "lora_variants", property(lambda self: {("use_dora",): None}))
        with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
            layer.resolve_lora_variant(config=pylora.LoraConfig())

    def test_unsorted_keys(self, monkeypatch):
        layer = layer_of(Linear)
        monkeypatch.setattr(Linear, "lora_variants", property(lambda self: {("use_dora", "use_bdlora"): None}))
        with pytest.raises(ValueError, match="must be sorted tuples"):
            layer.resolve_lora_variant(config=pylora.LoraConfig())


class _Halved(LoraVariant):
    """Half of what plain LoRA adds."""

    @classmethod
    def init(cls, module, adapter_name, config, **kwargs):
        module.halved = adapter_name

    @classmethod
    def forward(cls, module, active_adapter, x, result, **kwargs):
        return result + module._adapter_output(active_adapter, x) / 2

    @classmethod
    def delta(cls, module, active_adapter):
        delta = module._plain_delta(active_adapter)
        return delta._replace(scaling=delta.scaling / 2)


@pytest.fixture
def halved(monkeypatch):
    """A variant that joins by a registration, in place of aLoRA's flag."""
    monkeypatch.setattr(registry, "_BY_KIND", {kind: dict(table) for kind, table in registry._BY_KIND.items()})
    register_variant("use_dora", "linear")(_Halved)


def test_a_variant_joins_by_registering(halved):
    base = nn.Linear(6, 5)
    layer = Linear(base, "default", config=pylora.LoraConfig(use_dora=True, init_lora_weights=False), r=4)
    assert layer.halved == "default"
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = base(x) + x @ layer.get_delta_weight("default").t() / 2
        torch.testing.assert_close(layer(x), expected)
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
        layer.unmerge()
        torch.testing.assert_close(layer(x), expected)


def test_a_layer_class_of_one_s_own_may_list_its_variants():
    class Own(Linear):
        @property
        def lora_variants(self):
            return {(): None, ("use_dora",): _Halved}

    layer = Own(nn.Linear(6, 5), "default", config=pylora.LoraConfig(use_dora=True), r=4)
    assert isinstance(layer.lora_variant["default"], _Halved)

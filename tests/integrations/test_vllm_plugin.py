"""When the vLLM plugin steps in, with modules in vLLM's place."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import logging
import sys
import types

import pytest

from pylora.integrations.vllm import plugin


class Base:
    """What vLLM 0.32's PunicaWrapperBase looks like from outside."""

    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs): ...

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs): ...

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs): ...

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs): ...

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs): ...

    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs): ...

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs): ...

    def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled): ...

    def _select_full_linear_output(self, y, adapter_y, bias_stacked, module_enabled): ...

    @property
    def token_lora_indices(self): ...

    @property
    def sampler_indices(self): ...


@pytest.fixture
def platform(monkeypatch):
    """The platform of a vLLM that is nothing but what the plugin asks for."""

    class CpuPlatform:
        def is_cpu(self):
            return True

        @classmethod
        def get_punica_wrapper(cls):
            return plugin.STOCK

    base = type("PunicaWrapperBase", (Base,), {})
    modules = {
        "vllm": types.ModuleType("vllm"),
        "vllm.platforms": types.ModuleType("vllm.platforms"),
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.punica_wrapper": types.ModuleType("vllm.lora.punica_wrapper"),
        "vllm.lora.punica_wrapper.punica_base": types.ModuleType("vllm.lora.punica_wrapper.punica_base"),
    }
    modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    modules["vllm.platforms"].current_platform = CpuPlatform()
    modules["vllm.lora.punica_wrapper.punica_base"].PunicaWrapperBase = base
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("PYLORA_VLLM", raising=False)
    return modules["vllm.platforms"].current_platform


def base_class():
    return sys.modules["vllm.lora.punica_wrapper.punica_base"].PunicaWrapperBase


def test_exchanges_the_class_once(platform, caplog):
    with caplog.at_level(logging.INFO):
        plugin.register()
        assert platform.get_punica_wrapper() == type(platform).get_punica_wrapper() == plugin.OURS
        exchanged = type(platform).__dict__["get_punica_wrapper"]
        plugin.register()
    assert type(platform).__dict__["get_punica_wrapper"] is exchanged
    assert len(caplog.records) == 1


def test_can_be_switched_off(platform, monkeypatch):
    monkeypatch.setenv("PYLORA_VLLM", "0")
    plugin.register()
    assert platform.get_punica_wrapper() == plugin.STOCK


def test_does_nothing_without_vllm(monkeypatch, caplog):
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(plugin.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    plugin.register()
    assert not caplog.records


def test_leaves_other_devices_alone(platform, monkeypatch, caplog):
    monkeypatch.setattr(type(platform), "is_cpu", lambda self: False)
    plugin.register()
    assert platform.get_punica_wrapper() == plugin.STOCK
    assert not caplog.records


def test_leaves_another_plugins_class_alone(platform, monkeypatch, caplog):
    monkeypatch.setattr(type(platform), "get_punica_wrapper", classmethod(lambda cls: "other.Wrapper"))
    plugin.register()
    assert platform.get_punica_wrapper() == "other.Wrapper"
    assert "other.Wrapper" in caplog.text


def changed(name, value):
    return lambda: setattr(base_class(), name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("add_shrink", None), "no method add_shrink"),
        (changed("add_expand", lambda self, y, x, lora_b_stacked: None), "no argument output_slices"),
        (
            changed("add_lora_embedding", lambda self, y, x, lora_b_stacked, add_inputs, dims: None),
            "an argument dims that pylora does not know",
        ),
        (changed("sampler_indices", None), "no property sampler_indices"),
        (lambda: delattr(sys.modules["vllm.platforms"], "current_platform"), "AttributeError"),
        (lambda: sys.modules.pop("vllm.lora.punica_wrapper.punica_base"), "ModuleNotFoundError"),
    ],
)
def test_leaves_another_interface_alone_with_a_warning(platform, change, message, caplog):
    change()
    plugin.register()
    assert platform.get_punica_wrapper() == plugin.STOCK
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert message in caplog.text


def test_further_optional_arguments_fit():
    class Newer(Base):
        def add_shrink(self, y, x, lora_a_stacked, scale, tuning=None, **kwargs): ...

    assert plugin.misfit(Base) is None
    assert plugin.misfit(Newer) is None


def test_vllm_finds_it_by_its_entry_point():
    entries = [each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "pylora"]
    if not entries:
        pytest.skip("pylora is not installed here, or was before it had the entry point")
    assert all(each.load() is plugin.register for each in entries)

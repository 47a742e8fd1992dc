"""Random lifecycles against a reference that keeps each adapter's weights by itself and computes in plain torch."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from pylora.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from pylora.checkpoint.read import load_peft_weights
from pylora.checkpoint.save import write_weights
from pylora.config import LoraConfig
from pylora.layers.variants import DoraCaching
from pylora.model.lora_model import LoraModel

LAYERS = ("0", "2")
NAMES = ("default", "b", "c")


class Lifecycle(RuleBasedStateMachine):
    """Two dense layers (8 -> 12 -> 6), up to three adapters, each plain or with DoRA."""

    @initialize()
    def wrap(self) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).requires_grad_(False)
        self.base = copy.deepcopy(base).double()
        self.x = torch.randn(3, 8)
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[tuple[Path, Any]] = []
        self.weights: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self.active, self.merged, self.enabled, self.trains = ["default"], False, True, ["default"]
        self.model: Any = LoraModel(base, self.config(4, LAYERS), "default").eval()
        self.remember("default")

    def teardown(self) -> None:
        DoraCaching()(enabled=False)
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def config(self, rank: int, layers: tuple[str, ...], use_dora: bool = False) -> LoraConfig:
        return LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(layers), init_lora_weights=False, use_dora=use_dora
        )

    def remember(self, name: str) -> None:
        deltas = {}
        for layer in LAYERS:
            module = self.model.model.get_submodule(layer)
            if name in getattr(module, "lora_A", {}):
                a, b = module.lora_A[name].weight.double(), module.lora_B[name].weight.double()
                magnitude = module.lora_magnitude_vector[name].weight if module.use_dora[name] else None
                kept = None if magnitude is None else magnitude.detach().double()
                deltas[layer] = (module.scaling[name] * (b @ a).detach(), kept)
        self.weights[name] = deltas

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.integers(1, 5),
        layers=st.sampled_from([LAYERS, ("0",), ("2",)]),
        use_dora=st.booleans(),
    )
    def add(self, name: str, rank: int, layers: tuple[str, ...], use_dora: bool) -> None:
        if name not in self.weights:
            self.model.peft_config[name] = self.config(rank, layers, use_dora)
            self.model.inject_adapter(self.model.model, name)
            self.merged = False
            self.remember(name)

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    def activate(self, names: list[str]) -> None:
        names = [name for name in names if name in self.weights]
        if names:
            self.model.set_adapter(names)
            # Also while the adapters are disabled: that is PEFT's rule.
            self.active, self.trains, self.merged = names, names, False

    @rule(name=st.sampled_from(NAMES), scale=st.sampled_from([-1.0, 0.5, 2.0]))
    def train(self, name: str, scale: float) -> None:
        """Edit an adapter in place, as an optimizer does. Not while merged: the output stays what was merged."""
        if name in self.weights and not self.merged:
            for layer in self.weights[name]:
                module = self.model.model.get_submodule(layer)
                with torch.no_grad():
                    module.lora_B[name].weight.mul_(scale)
                    if module.use_dora[name]:
                        module.lora_magnitude_vector[name].weight.add_(0.1)
            self.remember(name)

    @rule(enabled=st.booleans())
    def cache_norms(self, enabled: bool) -> None:
        DoraCaching()(enabled=enabled)

    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        self.model.merge_adapter(safe_merge=safe)
        self.merged = True

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = False

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        self.trains = self.active if enabled else []
        if enabled:
            self.model.enable_adapter_layers()
        else:
            self.model.disable_adapter_layers()
            self.merged = False  # the forward in `check` unmerges

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        # With another adapter active everywhere: which one follows a deleted active one is the layers' own choice.
        if name in self.weights and name not in self.active and not self.merged:
            self.model.delete_adapter(name)
            del self.weights[name]

    @rule(name=st.sampled_from(NAMES))
    def save(self, name: str) -> None:
        """To files, from where `load` takes it whatever has become of the adapter since."""
        if name not in self.weights:
            return
        folder = Path(self.folder.name, str(len(self.saved)))
        folder.mkdir()
        self.model.peft_config[name].save_pretrained(folder)
        write_weights(get_peft_model_state_dict(self.model.model, adapter_name=name), folder)
        self.saved.append((folder, self.weights[name]))

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 9))
    def load(self, name: str, which: int) -> None:
        """A saved adapter under any name: as a new one, or into one that it fits. Not into a merged one, as `train`."""
        if not self.saved:
            return
        folder, weights = self.saved[which % len(self.saved)]
        config, tensors = LoraConfig.from_pretrained(folder), load_peft_weights(folder)
        if name not in self.weights:
            self.model.peft_config[name] = config
            self.model.inject_adapter(self.model.model, name)
            self.merged = False
        elif self.merged or not self.fits(config, name):
            return
        result = set_peft_model_state_dict(self.model.model, tensors, adapter_name=name)
        assert result.unexpected_keys == []
        self.weights[name] = weights

    def fits(self, config: LoraConfig, name: str) -> bool:
        fields = ("r", "lora_alpha", "target_modules", "use_dora")
        there = self.model.peft_config[name]
        return all(getattr(config, field) == getattr(there, field) for field in fields)

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def replace_by_copy(self, how: Any) -> None:
        self.model = how(self.model)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = self.x.double()
        for name, module in self.base.named_children():
            if name not in LAYERS or not self.enabled:
                expected = module(expected)
                continue
            weight = module.weight
            for delta, magnitude in (self.weights[a][name] for a in self.active if name in self.weights[a]):
                weight = weight + delta
                if magnitude is not None:
                    weight = (magnitude / (module.weight + delta).norm(dim=1))[:, None] * weight
            expected = nn.functional.linear(expected, weight, module.bias)
        torch.testing.assert_close(self.model(self.x).double(), expected, rtol=1e-3, atol=1e-4)
        assert self.model.active_adapters == self.active
        assert sorted(self.model.peft_config) == sorted(self.weights)
        trainable = {name.split(".")[-2] for name, p in self.model.named_parameters() if p.requires_grad}
        assert trainable == set(self.trains)


def test_lifecycles() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TestCase = Lifecycle.TestCase
        TestCase.settings = settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        )
        TestCase("runTest").runTest()

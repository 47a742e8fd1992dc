"""`patch_peft` and `unpatch_peft`: once, reversible, and only where PEFT is the one that is known."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys

import pytest
import torch

import pylora
from pylora.integrations import patch_peft as module

peft = pytest.importorskip("peft")
MODULES = (
    "peft_model",
    "tuners.tuners_utils",
    *(f"tuners.lora.{name}" for name in ("layer", "model", "variants", "dora")),
)


def contents() -> dict[str, dict]:
    """Every attribute of every class of the modules that are concerned."""
    return {
        f"{name}.{cls.__qualname__}": dict(cls.__dict__)
        for name in MODULES
        for cls in vars(importlib.import_module(f"peft.{name}")).values()
        if isinstance(cls, type) and cls.__module__.startswith("peft.")
    }


def test_unpatching_restores_the_very_same_objects(patch):
    before = contents()
    patch()
    changed = contents()
    forward = changed["tuners.lora.layer.Linear"]["forward"]
    assert forward is not before["tuners.lora.layer.Linear"]["forward"]
    patch()
    assert contents()["tuners.lora.layer.Linear"]["forward"] is forward
    pylora.unpatch_peft()
    after = contents()
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert list(after[name]) == list(attributes), name
        assert all(after[name][key] is value for key, value in attributes.items()), name
    pylora.unpatch_peft()
    assert module._changes._before == []


def test_patching_again_works(patch, make, ops):
    x = torch.randn(3, 24)
    model = make()
    for _ in range(2):
        patch()
        model(x)
        pylora.unpatch_peft()
        model(x)
    assert ops["dense"] == 4


def test_an_unknown_version_is_left_alone(monkeypatch):
    before = contents()
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    known = " or ".join(module.PEFT_VERSIONS)
    with pytest.warns(pylora.PeftWarning, match=re.escape(f"patch_peft: peft: expected version {known}, got 0.99.0")):
        assert pylora.patch_peft() is False
    assert contents() == before


def test_classes_that_another_library_has_changed_are_left_alone(monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.layer._ConvNd, "_factors", 1, raising=False)
    before = contents()
    with pytest.warns(pylora.PeftWarning, match=r"patch_peft: peft.*_ConvNd\._factors: expected none, got one"):
        assert pylora.patch_peft() is False
    assert contents() == before


def test_without_peft_it_is_an_import_error():
    code = """
import sys
sys.modules["peft"] = None
import pylora
pylora.unpatch_peft()
try:
    pylora.patch_peft()
except ImportError as error:
    print("peft" in str(error))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "True"


def test_models_are_pickled_without_pylora(patch, make):
    patch()
    model = make(use_dora=True, adapters=2)
    x = torch.randn(3, 24)
    model(x)
    model.merge_adapter()
    merged = model(x)
    data = pickle.dumps(model.base_model.model)
    assert b"pylora" not in data
    torch.testing.assert_close(pickle.loads(data)(x), merged)

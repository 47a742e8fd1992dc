"""Which packages are installed, beside the installed PEFT's answers."""

import importlib.metadata
import importlib.util

import pytest

from pylora.integrations import packages

theirs = pytest.importorskip("peft.import_utils")

FUNCTIONS = sorted(name for name in dir(theirs) if name.startswith("is_") and callable(getattr(theirs, name)))
FLAGS = sorted(name for name in dir(theirs) if name.startswith("is_") and not callable(getattr(theirs, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_answer_as_peft(name):
    assert getattr(packages, name)() == getattr(theirs, name)()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_those_of_peft(name):
    assert getattr(packages, name) is getattr(theirs, name)


def test_unknown_flags_are_attribute_errors():
    with pytest.raises(AttributeError, match="is_transformers_ge_v99"):
        _ = packages.is_transformers_ge_v99


@pytest.mark.parametrize(("found", "outcome"), [("7.1.0", True), ("6.9", ImportError), ("7.0.0rc1", ImportError)])
def test_versions_that_are_too_old_are_import_errors(monkeypatch, found, outcome):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    packages.is_gptqmodel_available.cache_clear()
    try:
        if outcome is ImportError:
            with pytest.raises(ImportError, match=r"gptqmodel: expected version 7\.0\.0 or later"):
                packages.is_gptqmodel_available()
        else:
            assert packages.is_gptqmodel_available() is outcome
    finally:
        packages.is_gptqmodel_available.cache_clear()

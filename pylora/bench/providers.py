"""Helpers of case files: the libraries to compare, and calls without autograd."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

Result = TypeVar("Result")


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def libraries() -> dict[str, ModuleType]:
    """ "pylora", and "peft" where it is installed: the same names do the same work in both."""
    names = ["pylora", "peft"] if has_peft() else ["pylora"]
    return {name: importlib.import_module(name) for name in names}


def inference(call: Callable[[], Result]) -> Callable[[], Result]:
    """`call` under torch.inference_mode."""

    def run() -> Result:
        with torch.inference_mode():
            return call()

    return run

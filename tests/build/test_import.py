"""What `import pylora` costs: it brings in neither the libraries beside torch nor the native extension."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pylora

BESIDE_TORCH = ("transformers", "peft", "accelerate", "huggingface_hub", "safetensors.torch", "matplotlib")
UNWANTED = (*BESIDE_TORCH, "typer", "rich", "pylora._C")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_lean():
    loaded = run_python("import pylora, sys; print(*sys.modules)").split()
    assert "pylora" in loaded
    assert not [name for name in UNWANTED if name in loaded]


def test_config_needs_no_torch():
    loaded = run_python("import pylora.config, sys; print(*sys.modules)").split()
    assert "torch" not in loaded


def test_command_line_starts_without_torch():
    loaded = run_python("import sys; from pylora.cli.app import build_app; build_app(); print(*sys.modules)").split()
    assert "typer" in loaded
    assert "torch" not in loaded


def test_only_native_imports_the_extension():
    package = Path(pylora.__file__).parent
    pattern = re.compile(r"^\s*(import pylora\._C|from pylora import .*\b_C\b|from pylora\._C)", re.MULTILINE)
    importers = [path.name for path in package.rglob("*.py") if pattern.search(path.read_text())]
    assert importers == ["_native.py"]

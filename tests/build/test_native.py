"""What `pylora._native` says about an extension that is missing, stale, or built for something else."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from pylora import _native, _source_hash
from pylora._version import __version__
from pylora.errors import PyloraBuildError

ROOT = Path(_native.__file__).resolve().parents[1]


@pytest.fixture
def source_tree(tmp_path, monkeypatch):
    """A small source tree that `_native` believes to be its own."""
    for name in ("setup.py", "CMakeLists.txt", "csrc/module.cpp", "csrc/lora/op.cpp", "cmake/isa.cmake", "pylora/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"// {name}\n")
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path / "pylora")
    return tmp_path


@pytest.fixture
def extension(monkeypatch):
    """Replace the extension by one whose facts the test chooses; `load` forgets what it loaded before."""

    def install(*, version=__version__, torch_version=torch.__version__, source_hash="0" * 16):
        module = types.ModuleType("pylora._C")
        module.__version__ = version
        module.build_info = lambda: {"torch": torch_version, "source_hash": source_hash}
        monkeypatch.setitem(sys.modules, "pylora._C", module)
        return module

    _native.load.cache_clear()
    yield install
    _native.load.cache_clear()


def test_versions_agree():
    module = _native.load()
    assert module.__version__ == __version__ == module.build_info()["version"]
    assert module.build_info()["torch"] == torch.__version__
    assert _native.C is module


def test_build_info_is_complete():
    info = _native.load().build_info()
    assert set(info) == {"version", "torch", "source_hash", "cuda_archs", "compiler", "isas_built"}
    assert "scalar" in info["isas_built"].split(",")
    assert "scalar" in _native.load().cpu_isas_supported()
    assert _native.load().cpu_isa() in info["isas_built"].split(",")


def test_a_fitting_extension_is_loaded_once(source_tree, extension):
    module = extension(source_hash=_source_hash.source_hash(source_tree))
    assert _native.load() is module
    assert _native.load() is module


@pytest.mark.parametrize("changed", ["csrc/lora/op.cpp", "cmake/isa.cmake", "CMakeLists.txt", "setup.py"])
def test_changed_source_is_noticed(source_tree, extension, changed, monkeypatch):
    extension(source_hash=_source_hash.source_hash(source_tree))
    (source_tree / changed).write_text("// other\n")
    monkeypatch.delenv(_native.ALLOW_STALE, raising=False)
    with pytest.raises(PyloraBuildError, match=r"older than the C\+\+ sources.*pip install --no-build-isolation -e \."):
        _native.load()


def test_new_and_renamed_sources_are_noticed(source_tree):
    before = _source_hash.source_hash(source_tree)
    (source_tree / "csrc/lora/cpu.cpp").write_text("")
    added = _source_hash.source_hash(source_tree)
    (source_tree / "csrc/lora/cpu.cpp").rename(source_tree / "csrc/lora/gpu.cpp")
    assert len({before, added, _source_hash.source_hash(source_tree)}) == 3


def test_documents_do_not_make_a_build_stale(source_tree):
    before = _source_hash.source_hash(source_tree)
    (source_tree / "csrc/README.md").write_text("text")
    (source_tree / "csrc/lora/.op.cpp.swp").write_text("an editor's")
    assert _source_hash.source_hash(source_tree) == before


def test_stale_build_can_be_allowed(source_tree, extension, monkeypatch):
    module = extension(source_hash="old")
    monkeypatch.setenv(_native.ALLOW_STALE, "1")
    with pytest.warns(RuntimeWarning, match="older than the C"):
        assert _native.load() is module


def test_installed_package_is_not_compared_with_sources(tmp_path, extension, monkeypatch):
    (tmp_path / "csrc").mkdir()  # some other package's
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path / "pylora")
    module = extension()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.load() is module


def test_other_torch_minor_version(source_tree, extension):
    extension(torch_version="1.2.3+cpu")
    with pytest.raises(PyloraBuildError, match=r"built against torch 1\.2\.3\+cpu.*pip install --no-build-isolation"):
        _native.load()


def test_other_torch_patch_version_or_variant_fits(source_tree, extension):
    minor = ".".join(torch.__version__.split(".")[:2])
    extension(torch_version=f"{minor}.99+cu130", source_hash=_source_hash.source_hash(source_tree))
    _native.load()


def test_other_pylora_version(source_tree, extension):
    extension(version="0.0.1")
    with pytest.raises(PyloraBuildError, match=rf"is of pylora 0\.0\.1, the Python code of {__version__}"):
        _native.load()


def fail_import(monkeypatch, error):
    def import_module(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_not_built(source_tree, extension, monkeypatch):
    fail_import(monkeypatch, ModuleNotFoundError("No module named 'pylora._C'"))
    with pytest.raises(PyloraBuildError, match=r"not built.*cd .* && pip install --no-build-isolation -e \."):
        _native.load()


def test_built_for_another_python(source_tree, extension, monkeypatch):
    (source_tree / "pylora/_C.cpython-36m-x86_64-linux-gnu.so").write_bytes(b"")
    fail_import(monkeypatch, ModuleNotFoundError("No module named 'pylora._C'"))
    with pytest.raises(PyloraBuildError, match=r"another Python \(_C\.cpython-36m"):
        _native.load()


def test_undefined_symbol(source_tree, extension, monkeypatch):
    fail_import(monkeypatch, ImportError("_C.so: undefined symbol: _ZN3c1011something"))
    with pytest.raises(
        PyloraBuildError, match=rf"does not load with torch {torch.__version__.split('+')[0]}"
    ) as caught:
        _native.load()
    assert "undefined symbol: _ZN3c1011something" in str(caught.value)
    assert "pip install --no-build-isolation" in str(caught.value)


def test_outside_a_source_tree_the_fix_is_another_command(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path / "pylora")
    assert "-e ." not in _native.rebuild_command()
    assert "pip install --no-build-isolation" in _native.rebuild_command()


def test_a_broken_build_is_an_import_error(source_tree, extension):
    extension(version="0.0.1")
    with pytest.raises(ImportError, match=r"0\.0\.1"):
        from pylora._native import C  # noqa: F401


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'D'"):
        _ = _native.D

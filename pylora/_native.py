"""The only import of the native extension `pylora._C`, and the place that says what is wrong when it cannot be used.

`from pylora._native import C` gives the extension or raises `PyloraBuildError` with the command that mends the build.
`import pylora` does not come through here, so configurations and `pylora doctor` work without a build.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora._source_hash import is_source_tree, source_hash
from pylora._version import __version__
from pylora.errors import PyloraBuildError

if TYPE_CHECKING:
    from types import ModuleType

    from pylora import _C as C

__all__ = ["ALLOW_STALE", "C", "load", "rebuild_command"]

ALLOW_STALE = "PYLORA_ALLOW_STALE"
"""Environment variable for whoever edits C++ while others run: 1 turns the error about a stale build into a warning."""

_PACKAGE = Path(__file__).resolve().parent


def rebuild_command(settings: str = "") -> str:
    """The command that builds the extension anew for the torch that is installed.

    Args:
        settings: Environment variables for the build, such as "PYLORA_CUDA=1".
    """
    pip = f"{settings} pip install --no-build-isolation".strip()
    if is_source_tree(_PACKAGE.parent):
        return f"cd {_PACKAGE.parent} && {pip} -e ."
    return f"{pip} --no-deps --force-reinstall . (in a folder with pylora's sources)"


@functools.cache
def load() -> ModuleType:
    """Import the extension, check that it fits this pylora and this torch, and return it.

    Raises:
        PyloraBuildError: The extension is missing, cannot be linked against the installed torch, or was built for
            another torch minor version, from another version of pylora, or from sources that have changed since.
    """
    try:
        import torch
    except Exception as error:
        raise PyloraBuildError(
            f"pylora: torch cannot be imported ({type(error).__name__}: {error}). Install it first, for instance with "
            f"`pip install torch`, then build pylora for it: {rebuild_command()}"
        ) from error
    try:
        # Only after torch: the extension finds torch's libraries because they are already in the process.
        module = importlib.import_module("pylora._C")
    except ImportError as error:
        raise PyloraBuildError(_explain_import_error(error, torch.__version__)) from error
    problem = _explain_mismatch(module.__version__, module.build_info(), torch.__version__)
    if problem is not None:
        raise PyloraBuildError(problem)
    return module


def _explain_import_error(error: ImportError, torch_version: str) -> str:
    fix = f"Build it with: {rebuild_command()}"
    if not isinstance(error, ModuleNotFoundError):
        return (
            f"pylora: the native extension does not load with torch {torch_version}; most likely it was built against "
            f"another version of torch. {fix}\nThe loader said: {error}"
        )
    others = sorted(path.name for path in _PACKAGE.glob("_C.*.so"))
    if others:
        return f"pylora: the native extension was built for another Python ({', '.join(others)}). {fix}"
    return f"pylora: the native extension is not built. {fix}"


def _explain_mismatch(built_version: str, info: dict[str, str], torch_version: str) -> str | None:
    """What does not fit between the loaded extension and what is around it, or None."""
    fix = f"Build it again with: {rebuild_command()}"
    if _minor(info["torch"]) != _minor(torch_version):
        return (
            f"pylora: the native extension was built against torch {info['torch']}, and torch {torch_version} is "
            f"installed; it fits only {_minor(info['torch'])}.x. {fix}"
        )
    if built_version != __version__:
        return f"pylora: the native extension is of pylora {built_version}, the Python code of {__version__}. {fix}"
    root = _PACKAGE.parent
    if is_source_tree(root) and info["source_hash"] != source_hash(root):
        stale = f"pylora: the native extension is older than the C++ sources in {root}."
        if os.environ.get(ALLOW_STALE) != "1":
            return f"{stale} {fix} (or set {ALLOW_STALE}=1 to go on with the old one)"
        warnings.warn(f"{stale} Going on with it, since {ALLOW_STALE}=1.", RuntimeWarning, stacklevel=3)
    return None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def __getattr__(name: str) -> Any:
    if name == "C":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A hash over everything the native extension is built from.

The build stores it in `pylora._C`; in a source tree `pylora._native` compares it with the files' present state.
setup.py runs this file by path, so it imports nothing of pylora.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_FILES = ("CMakeLists.txt", "setup.py")
_FOLDERS = ("cmake", "csrc")
_SUFFIXES = (".c", ".cc", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".hpp")


def is_source_tree(root: Path) -> bool:
    """Whether `root` is a checkout or unpacked sdist of pylora, as opposed to a site-packages folder."""
    return all((root / name).is_file() for name in ("setup.py", "CMakeLists.txt", "csrc/module.cpp"))


def source_hash(root: Path) -> str:
    """The first 16 hex digits of a SHA-256 over names and contents of the build's inputs under `root`.

    Notes, READMEs and tests do not count: changing them leaves a build current.
    """
    names = [name for name in _FILES if (root / name).is_file()]
    for folder in _FOLDERS:
        for parent, folders, files in os.walk(root / folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(parent, root)
            names += [f"{relative}/{name}" for name in files if name.endswith(_SUFFIXES) and not name.startswith(".")]
    digest = hashlib.sha256()
    for name in sorted(name.replace(os.sep, "/") for name in names):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]

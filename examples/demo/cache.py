"""Folders that are built once and reused: complete, or not there.

A folder is built under another name, sealed with ``complete.json`` (the size and SHA-256 of every file, written last)
and then renamed into place. A run that is killed half-way leaves nothing under the final name, and a file that is
truncated or changed later no longer matches its seal; both are noticed and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "complete.json"
_PARTIAL_PREFIX = ".partial-"
_BLOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pylora/demo``, or ``~/.cache/pylora/demo``.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG base directory specification demands; without a usable
    ``HOME`` the home folder of the user database counts.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    base = Path(xdg) if os.path.isabs(xdg) else Path(home) / ".cache"
    return base / "pylora" / "demo"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path, recipe: str) -> None:
    """Write the seal of a finished folder. ``recipe`` names what the files were made from, and how."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / SEAL).write_text(json.dumps({"recipe": recipe, "files": files}, indent=2) + "\n", encoding="utf-8")


def flaw(folder: Path, recipe: str) -> str | None:
    """Why a folder cannot be used as it is, in words; None where it is complete and unchanged."""
    if not folder.is_dir():
        return "not there yet"
    try:
        record = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        made_from = record["recipe"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
    except FileNotFoundError:
        return "never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    if made_from != recipe:
        return "made by another version of the demo"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        if sha256_of(path) != sha256:
            return f"{name} has changed"
    return None


@contextmanager
def building(folder: Path, recipe: str) -> Iterator[Path]:
    """A scratch folder to build in; where the block ends well it is sealed and replaces ``folder``, else it is removed.

    Call with the lock of the cache held: what other runs left half built beside ``folder`` is cleared away first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{_PARTIAL_PREFIX}{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL_PREFIX}{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        seal(scratch, recipe)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Output folders that are there whole or not at all, and inputs by folder or hub id."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pylora.offline.errors import OfflineError


def check_output(folder: Path, inputs: tuple[Path, ...] = ()) -> None:
    """Check that `folder` can be made: absent, or empty, in a folder that can be written.

    Raises:
        OfflineError: it holds something, is a file, or lies within an input.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OfflineError(f"{folder}: expected the name of a new folder, got a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise OfflineError(f"{folder}: expected a new or empty folder, got one with files: remove it or choose another")
    for path in inputs:
        if path.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise OfflineError(f"{folder}: expected a folder outside of {path}, which is read")


@contextmanager
def new_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path` that are missing; if the block raises, they are removed again.

    Raises:
        OSError: one cannot be made.
    """
    missing = [each for each in path.absolute().parents if not each.exists()]
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            try:
                each.rmdir()
            except OSError:
                break
        raise


@contextmanager
def disk_failures() -> Iterator[None]:
    """Make an OSError of what safetensors raises when it cannot write a file.

    Raises:
        OSError: it could not.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; when the block ends well it is renamed to `folder`.

    If the block raises, also by an interrupt, nothing of it stays. A process that is killed leaves the temporary
    folder, `.NAME.pylora-*`, and never a `folder` with a part of the files.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    with new_parents(folder):
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.pylora-", dir=folder.absolute().parent))
        try:
            with disk_failures():
                yield staging
            staging.chmod(0o777 & ~_umask())
            os.replace(staging, folder)  # takes the place of an empty folder too
            _sync(folder.absolute().parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes more.

    Raises:
        OfflineError: it has not.
    """
    parent = next(each for each in folder.absolute().parents if each.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OfflineError(f"{folder}: expected {needed / 1e6:.0f} MB of free space, found {free / 1e6:.0f} MB")


def local_folder(place: str, what: str, patterns: tuple[str, ...] = ()) -> Path:
    """`place` if that is a folder, else the files of the hub repository of that id.

    Args:
        place: A folder, or a hub id such as "meta-llama/Llama-3.2-1B".
        what: How messages call it.
        patterns: Which of a repository's files to download.

    Raises:
        OfflineError: neither is there.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    looks_local = path.is_absolute() or place.startswith((".", "~")) or place.count("/") != 1 or path.exists()
    if looks_local:
        raise OfflineError(f"{place}: expected the folder of {what}, found {'a file' if path.exists() else 'nothing'}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise OfflineError(f"{place}: expected the folder of {what}, found nothing") from None
    try:
        return Path(snapshot_download(place, allow_patterns=list(patterns) or None))
    except (OSError, HFValidationError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise OfflineError(f"{place}: expected the folder of {what} or a hub id; not on this disk: {why}") from None

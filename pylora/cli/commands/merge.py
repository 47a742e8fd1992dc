"""`pylora merge`: an adapter's weights into its base model's files."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pylora.cli.failures import clear_failures
from pylora.cli.registry import command


class Dtype(str, Enum):
    """Dtypes that a model can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@command("merge")
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder, or a hub id.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the merged model.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the merged model; default: what the base has.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the result with the merge in f64 before it gets its name.")
    ] = False,
) -> None:
    """Merge an adapter into its base model, without loading the model.

    Goes through the base's .safetensors files tensor by tensor, so that memory holds one weight and the adapter,
    however large the model. Shards, configuration and tokenizer stay as the base has them. OUT appears when everything
    is written, or not at all; the inputs are only read.

    Works for dense layers, Conv1D, embeddings and convolutions, for DoRA, rsLoRA, `lora_bias` and `modules_to_save`.

    Examples:

    * `pylora merge ./llama ./my-adapter ./llama-tuned`

    * `pylora merge HuggingFaceTB/SmolLM2-135M ./my-adapter ./tuned --dtype bfloat16 --check`
    """
    with clear_failures("merge"):
        import torch
        from tqdm import tqdm

        from pylora.offline.adapter import read_adapter
        from pylora.offline.base import BaseCheckpoint
        from pylora.offline.merge import plan_merge, write_merged

        torch.set_grad_enabled(False)
        with BaseCheckpoint(base) as files:
            weights = read_adapter(adapter)
            plan = plan_merge(files, weights, None if dtype is None else getattr(torch, dtype.value))
            total = plan.total_bytes() * (2 if check else 1)
            with tqdm(
                total=total, unit="B", unit_scale=True, desc="merge", delay=2, disable=not sys.stderr.isatty()
            ) as bar:
                found = write_merged(plan, out, bar.update, check)
        typer.echo(f"merged {len(plan.layers)} layers of {adapter} into {out} ({plan.total_bytes() / 1e6:.0f} MB)")
        if plan.replaced:
            typer.echo(f"replaced {len(plan.replaced)} tensors that the adapter has whole")
        if plan.added:
            typer.echo(f"added {', '.join(plan.added)}: the base's configuration knows nothing of them")
        if found:
            typer.echo(found)

"""The op lora beside the bare linear layer and beside PEFT's layer, forward and training.

python benchmarks/ops/bench_lora.py [--threads 1] [--repeat 9] [--record]
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from pylora.ops import lora_linear
from pylora.ops.reference import lora as reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.tolerances import assert_near

RANK = 16


def peft_layer(inputs: LoraInputs, dropout_p: float) -> nn.Module | None:
    """PEFT's layer around the same tensors, or None without peft."""
    try:
        from peft.tuners.lora import LoraConfig, LoraModel
    except ImportError:
        return None
    base = nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0], bias=False, dtype=inputs.weight.dtype)
    base.weight = nn.Parameter(inputs.weight.detach(), requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=RANK * inputs.scaling, lora_dropout=dropout_p, target_modules=["0"])
    model = LoraModel(nn.Sequential(base), config, "default")
    model._cast_adapter_dtype(adapter_name="default")  # as get_peft_model does: f32 factors
    layer = model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.a)
        layer.lora_B["default"].weight.copy_(inputs.b)
    return layer.train(dropout_p > 0)


def forward_case(rows: int, width: int, dtype: torch.dtype, inner: int = 1) -> harness.Case:
    inputs = lora_inputs(rows, width, width, RANK, dtype, torch.float32, bias=False)
    x, weight, a, b = inputs.x, inputs.weight, inputs.a, inputs.b

    def inference(call):
        def run() -> Tensor:
            with torch.inference_mode():
                return call()

        return run

    providers = {
        "base": inference(lambda: functional.linear(x, weight)),
        "pylora": inference(lambda: lora_linear(x, weight, None, a, b, inputs.scaling)),
    }
    if (layer := peft_layer(inputs, 0.0)) is not None:
        providers["peft"] = inference(lambda: layer(x))

    def check() -> None:
        expected = reference.lora_linear(x, weight, None, a, b, inputs.scaling)
        assert_near(providers["pylora"](), expected, width)

    return harness.Case(f"forward {name(dtype)} {rows} x {width}", providers, check, inner)


def train_case(rows: int, width: int, dtype: torch.dtype, dropout_p: float) -> harness.Case:
    inputs = lora_inputs(rows, width, width, RANK, dtype, torch.float32, bias=False)
    x, a, b = (t.requires_grad_() for t in (inputs.x, inputs.a, inputs.b))
    weight, dy = inputs.weight, inputs.dy

    def step(call):
        return lambda: torch.autograd.backward(call(), dy)

    providers = {
        "base": step(lambda: functional.linear(x, weight)),
        "pylora": step(lambda: lora_linear(x, weight, None, a, b, inputs.scaling, dropout_p)),
    }
    if (layer := peft_layer(inputs, dropout_p)) is not None:
        providers["peft"] = step(lambda: layer(x))

    def check() -> None:
        rng = torch.tensor([1, 2])
        y = lora_linear(x, weight, None, a, b, inputs.scaling, dropout_p, rng)
        wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
        expected = reference.lora_linear(wide[0], weight, None, wide[1], wide[2], inputs.scaling, dropout_p, rng)
        grads = torch.autograd.grad(y, [x, a, b], dy)
        for grad, grad_ref in zip(grads, torch.autograd.grad(expected, wide, dy.double()), strict=True):
            assert_near(grad, grad_ref, max(rows, width))

    return harness.Case(
        f"train {name(dtype)} {rows} x {width}" + (f" dropout {dropout_p}" if dropout_p else ""), providers, check
    )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(
    threads: Annotated[int, typer.Option(help="torch threads; one is the steadier figure on a shared machine")] = 1,
    repeat: Annotated[int, typer.Option(help="turns of each provider; the minimum counts")] = 9,
    record: Annotated[bool, typer.Option(help="append the figures to benchmarks/results/lora.jsonl")] = False,
) -> None:
    """Time lora_linear: PEFT's defaults, so adapters are float32 whatever the base's dtype."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    f32, bf16 = torch.float32, torch.bfloat16
    cases = [
        forward_case(1, 1024, f32, inner=20),
        forward_case(128, 2048, f32),
        forward_case(512, 2048, f32),
        forward_case(1, 2048, bf16, inner=5),
        forward_case(64, 1024, bf16),
        train_case(512, 2048, f32, 0.0),
        train_case(512, 2048, f32, 0.1),
        train_case(32, 1024, bf16, 0.0),
    ]
    harness.run("lora", cases, repeat, record)


if __name__ == "__main__":
    typer.run(main)

"""Launchers on a GPU as graphs hold them: queued on the caller's stream, replayed, nothing waited for."""

import pytest
import torch

from pylora.ops.reference import lora as reference
from pylora.testing.emulator import load
from pylora.testing.factories import lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.tolerances import assert_near

pytestmark = pytest.mark.device

SCALING = 0.5


@pytest.fixture(autouse=True)
def torch_with_cuda():
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} is a build for the CPU: nothing captures a stream")


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_graph_replays(rows, dropout_p):
    """On new inputs, with counters as each launch leaves them; the masks follow rng, which the graph reads anew."""
    ops = load().lora
    inputs = lora_inputs(rows, 136, 264, 16, torch.bfloat16, bias=False)
    x, a, b, base = (t.cuda() for t in (inputs.x, inputs.a, inputs.b, torch.randn_like(inputs.dy)))
    rng, y = RNG.clone().cuda(), torch.empty_like(base)
    v = torch.empty(rows, 16, device="cuda")
    shape = {"num_tokens": rows, "in_features": 136, "out_features": 264, "rank": 16}
    shape |= {"dtype": x.dtype, "factor_dtype": a.dtype}
    workspace = torch.zeros(ops.forward_workspace_bytes(**shape), dtype=torch.uint8, device="cuda")
    fields = shape | {"x": x, "a": a, "b": b, "y": y, "v": v, "workspace": workspace, "scaling": SCALING}
    if dropout_p:
        fields["dropout"] = (dropout_p, rng)

    def launch() -> None:
        y.copy_(base)
        ops.forward(**fields, stream=torch.cuda.current_stream().cuda_stream)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for seed in range(3):
        x.copy_(torch.randn_like(x))
        rng.copy_(torch.tensor([seed, 7]))
        graph.replay()
        torch.cuda.synchronize()
        wide = [t.cpu().double() for t in (base, x, a, b)]
        expected = reference.lora_add(*wide, SCALING, dropout_p, rng.cpu())
        size = reference.lora_add(*(t.abs() for t in wide), SCALING, dropout_p, rng.cpu())
        assert_near(y.cpu(), expected, 136 + 2**14, "y", size)

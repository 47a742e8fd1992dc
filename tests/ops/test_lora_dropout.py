"""Dropout of the lora ops: which elements are dropped, by which random numbers, and the results against f64."""

import pytest
import torch

from pylora.ops import draw_rng, lora_dropout, lora_linear
from pylora.ops.reference import lora as reference
from pylora.ops.reference.philox import dropout_bits, philox4x32
from pylora.testing.factories import lora_inputs
from pylora.testing.isa import cpu_isa, supported_isas
from pylora.testing.lora import DTYPES, RNG, check_lora
from pylora.testing.tolerances import assert_near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [1e-3, 0.1, 0.5, 1.0])
def test_dropout_forward_and_backward(isa, dtype, dropout_p):
    for num_tokens, width in [(1, 17), (7, 64), (130, 513)]:
        check_lora(lora_inputs(num_tokens, width, 96, 8, dtype), dropout_p, RNG)


def test_philox_known_answers():
    """The vectors published with the generator (Random123, kat_vectors)."""
    zeros = tuple(torch.zeros(1, dtype=torch.int64) for _ in range(4))
    ones = tuple(torch.full((1,), 0xFFFFFFFF) for _ in range(4))
    assert [w.item() for w in philox4x32(zeros, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [w.item() for w in philox4x32(ones, -1)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_elements_of_the_reference(isa, dtype):
    x = torch.ones(70, 333, dtype=dtype)
    out = lora_dropout(x, 0.2, RNG)
    kept = dropout_bits(70, 333, RNG) >= round(0.2 * 65536)
    assert torch.equal(out != 0, kept)
    assert_near(out, reference.lora_dropout(x, 0.2, RNG), 1)


def test_dropout_counts_rows_over_leading_dimensions():
    x = torch.randn(4, 5, 70)
    assert torch.equal(lora_dropout(x, 0.5, RNG).view(20, 70), lora_dropout(x.view(20, 70), 0.5, RNG))


def test_dropout_statistics():
    """Share of zeros and mean of 4 million elements, within five standard deviations."""
    out = lora_dropout(torch.ones(2000, 2000), 0.1, RNG)
    zeros = (out == 0).double().mean().item()
    assert abs(zeros - 0.1) < 5 * (0.1 * 0.9 / out.numel()) ** 0.5 + 2**-17
    assert abs(out.double().mean().item() - 1.0) < 5 * (0.1 / 0.9 / out.numel()) ** 0.5


def test_dropout_is_seeded_by_torch():
    x = torch.randn(8, 64)
    torch.manual_seed(3)
    first = lora_dropout(x, 0.5)
    second = lora_dropout(x, 0.5)
    torch.manual_seed(3)
    again = lora_dropout(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_every_isa_drops_the_same_elements():
    x = torch.randn(33, 700)
    outs = []
    for name in supported_isas():
        with cpu_isa(name):
            outs.append(lora_dropout(x, 0.3, RNG))
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert len(outs) == len(supported_isas()) > 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradient_checkpointing_replays_the_mask(dropout_p):
    inputs = lora_inputs(16, 64, 48, 4).requires_grad_()

    def layer(x):
        return lora_linear(x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p)

    torch.manual_seed(5)
    y = layer(inputs.x)
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    torch.manual_seed(5)
    y_replayed = torch.utils.checkpoint.checkpoint(layer, inputs.x, use_reentrant=False)
    grads_replayed = torch.autograd.grad(y_replayed, inputs.leaves(), inputs.dy)
    assert torch.equal(y, y_replayed)
    assert all(torch.equal(g, h) for g, h in zip(grads, grads_replayed, strict=True))


def test_dropped_infinity_is_a_nan_as_in_torch():
    assert torch.isnan(lora_dropout(torch.full((4, 64), torch.inf), 0.5, RNG)).any()


def test_dropout_of_nothing_is_a_copy():
    x = torch.randn(3, 5).t()
    for p in (0.0, 1e-9):
        out = lora_dropout(x, p)
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()
    assert lora_dropout(torch.empty(3, 0), 0.5).shape == (3, 0)


def test_draw_rng_is_two_words_of_torchs_generator():
    torch.manual_seed(1)
    first = draw_rng("cpu")
    torch.manual_seed(1)
    assert torch.equal(first, draw_rng("cpu"))
    assert (first.dtype, first.shape) == (torch.int64, (2,))
    assert len({tuple(draw_rng("cpu").tolist()) for _ in range(50)}) == 50

"""Fragments of mma and ldmatrix against the PTX ISA's formulas (section "Matrix multiply-accumulate operation using mma
instruction", figures of mma.m16n8k16 and m16n8k8), written down here from the text and not from the emulator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

KINDS = {"bf16": (0, torch.bfloat16), "f16": (1, torch.float16), "tf32": (2, torch.float32)}


def a_position(kind: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of a's element i in a lane."""
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return group if i in (0, 2) else group + 8, member if i in (0, 1) else member + 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, member * 2 + (i & 1) if i < 4 else member * 2 + (i & 1) + 8


def b_position(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return member if i == 0 else member + 4, group
    return member * 2 + (i & 1) if i < 2 else member * 2 + (i & 1) + 8, group


def c_position(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    return group if i < 2 else group + 8, member * 2 + (i & 1)


def fragment(matrix: Tensor, position: object, per_lane: int) -> Tensor:
    """[32, per_lane] elements of `matrix`, as the lanes hold them."""
    rows = [[matrix[position(lane, i)] for i in range(per_lane)] for lane in range(32)]  # type: ignore[operator]
    return torch.stack([torch.stack(row) for row in rows])


def as_words(fragments: Tensor) -> Tensor:
    """Pairs of 16-bit elements, the first in the lower half; 32-bit elements as they are."""
    return fragments.contiguous().view(torch.int32)


def run_mma(emu: ModuleType, kind: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    number, dtype = KINDS[kind]
    halves = 1 if kind == "tf32" else 2
    a_words = as_words(fragment(a.to(dtype), lambda lane, i: a_position(kind, lane, i), 4 * halves))
    b_words = as_words(fragment(b.to(dtype), lambda lane, i: b_position(kind, lane, i), 2 * halves))
    d = fragment(c.float(), c_position, 4)
    emu.mma(kind=number, a=a_words, b=b_words, d=d)
    out = torch.full((16, 8), float("nan"))
    for lane in range(32):
        for i in range(4):
            out[c_position(lane, i)] = d[lane, i]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies_matrices_laid_out_by_the_isa(emu: ModuleType, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    a = torch.randint(-8, 9, (16, depth))
    b = torch.randint(-8, 9, (depth, 8))
    c = torch.randint(-100, 101, (16, 8))
    assert torch.equal(run_mma(emu, kind, a, b, c).long(), a @ b + c)


@pytest.mark.parametrize("kind", KINDS)
def test_each_element_of_a_fragment_has_its_own_place(emu: ModuleType, kind: str) -> None:
    """Element (r, k) of a alone times a b that numbers its rows and columns: the place shows in the product."""
    depth = 8 if kind == "tf32" else 16
    b = torch.arange(1, 1 + depth * 8).reshape(depth, 8)
    for row, k in [(0, 0), (3, 5), (8, 1), (15, depth - 1), (7, depth // 2), (12, depth // 2 + 1)]:
        a = torch.zeros(16, depth, dtype=torch.long)
        a[row, k] = 1
        expected = torch.zeros(16, 8)
        expected[row] = b[k].float()
        assert torch.equal(run_mma(emu, kind, a, b, torch.zeros(16, 8)), expected)


def test_tf32_operands_lose_what_the_tensor_core_does_not_read(emu: ModuleType) -> None:
    a = torch.zeros(16, 8)
    b = torch.zeros(8, 8)
    a[0, 0] = 1 + 2.0**-10 + 2.0**-12  # ten bits of mantissa remain
    b[0, 0] = 1.0
    assert run_mma(emu, "tf32", a, b, torch.zeros(16, 8))[0, 0] == 1 + 2.0**-10


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_lanes_the_elements_of_the_isa(emu: ModuleType, count: int, transposed: bool) -> None:
    rows = torch.randperm(8 * count * 8).to(torch.int16).reshape(count, 8, 8)
    registers = torch.full((32, count), -1, dtype=torch.int32)
    emu.ldmatrix(count=count, transposed=transposed, rows=rows, registers=registers)
    pairs = registers.view(torch.int16).reshape(32, count, 2)
    for lane in range(32):
        for m in range(count):
            for half in range(2):
                i, j = lane // 4, 2 * (lane % 4) + half
                assert pairs[lane, m, half] == (rows[m, j, i] if transposed else rows[m, i, j])

"""Philox4x32-10 and dropout's counter layout (csrc/common/philox.h) in torch integers.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply_wide(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a * b, for 0 <= a < 2**32 held in int64, in halves so that no product overflows."""
    low_part, high_part = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high_part + (low_part >> 16)
    return ((middle << 16) | (low_part & 0xFFFF)) & _MASK, (middle >> 16) & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on int64 tensors that hold 32-bit words; `seed` is the 64-bit key."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        low0, high0 = _multiply_wide(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply_wide(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_bits(num_tokens: int, width: int, rng: Tensor) -> Tensor:
    """The 16 random bits of each element: int64 [num_tokens, width]. `rng` is int64 [2], {seed, offset}."""
    seed, offset = rng.tolist()
    row = torch.arange(num_tokens)[:, None].expand(num_tokens, width)
    column = torch.arange(width)[None, :].expand(num_tokens, width)
    inner = column % 64
    words = philox4x32(
        (
            8 * (column // 64) + inner % 8,
            row & _MASK,
            torch.full_like(row, offset & _MASK),
            torch.full_like(row, (offset >> 32) & _MASK),
        ),
        seed,
    )
    eighth = inner // 8
    word = torch.stack(words).gather(0, (eighth // 2)[None])[0]
    return torch.where(eighth % 2 == 0, word & 0xFFFF, word >> 16)


def dropout_multiplier(num_tokens: int, width: int, dropout_p: float, rng: Tensor) -> Tensor:
    """What drop(x) multiplies x by: 0 where an element is dropped, else 65536 / (65536 - threshold); f64."""
    threshold = int(dropout_p * 65536 + 0.5)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    kept = dropout_bits(num_tokens, width, rng) >= threshold
    return torch.where(kept, torch.tensor(scale, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))

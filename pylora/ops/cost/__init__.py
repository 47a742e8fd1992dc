"""The least work of each op as pure functions of its shape: what a roofline and a floor are drawn from.

Operations are multiplications and additions, two for each term of a product. Bytes are compulsory traffic: every input
read once and every output written once, whatever an implementation reads twice or keeps in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by torch's name of its dtype."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of main memory traffic of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

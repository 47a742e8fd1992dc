"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pylora.testing.isa import built_isas, cpu_isa, supported_isas


@pytest.fixture(params=built_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the build in turn, in use; skipped where this CPU lacks it."""
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param

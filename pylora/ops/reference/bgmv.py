"""bgmv as its definition: see `sgmv`."""

from pylora.ops.reference.sgmv import bgmv

__all__ = ["bgmv"]

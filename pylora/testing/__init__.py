"""Helpers that pylora's tests and benchmarks share, shipped so that a new op outside this tree can use them too."""

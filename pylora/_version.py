"""The version, in the one place that packaging, the native build and `pylora.__version__` read."""

__version__ = "0.1.0"

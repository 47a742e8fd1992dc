"""Exceptions and warnings. Those named as in PEFT have PEFT's base classes, so `except` clauses written for it work."""


class PeftError(Exception):
    """Base of the errors that come from an adapter's configuration or state."""


class PeftWarning(UserWarning):
    """Base of the warnings about an adapter's configuration, weights or use."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module of the model matches the adapter's targets, or every match was excluded."""


class UnsupportedFeatureError(PeftError, ValueError):
    """A configuration field, layer type or call that pylora knows but has no mechanism for.

    Raised before the model is touched, so that nothing asked for is silently left out.
    """


class PyloraBuildError(ImportError):
    """The native extension is missing, stale, or of another torch. The message names the command that mends it."""

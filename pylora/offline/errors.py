"""What can be wrong with files that a person named."""

from __future__ import annotations


class OfflineError(ValueError):
    """A file or folder that cannot be used as asked. The message says which, and what would do."""

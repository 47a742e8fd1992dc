"""The one exception that the demo turns into a short message and exit status 1."""


class DemoError(Exception):
    """Something that the reader can act on: no network, a full disk, logits that disagree."""

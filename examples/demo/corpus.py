"""The text of the demo: the language reference that CPython carries, split so that held-out means held out.

The topics of ``pydoc_data.topics`` (what ``help("for")`` prints) quote one another freely: "compound" contains all of
"for", "with" and "try". A split by topic alone would therefore leave most of the held-out text in the training text,
and the measured perplexity would reward memory. So whatever the held-out topics share with the training topics is
removed from the held-out side: equal paragraphs, and paragraphs that touch any longer run of equal words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# Eight words are longer than the stock phrases that any two pages of the reference share ("is a new reference to a"),
# and short enough that a sentence that was only reworded at its ends is still noticed.
SHARED_RUN_WORDS = 8
HELD_OUT_FRACTION = 0.2
# Picks one of the possible splits. With this one no topic makes up more than a quarter of the held-out text of Python
# 3.11; with most others a single long page ("string-methods", "types") would be more than half of it.
_SPLIT_PREFIX = b"held-out"


@dataclass(frozen=True)
class Corpus:
    """A split text: topic name -> text, in the order of the names; no topic is on both sides."""

    train: Mapping[str, str]
    held_out: Mapping[str, str]


def python_topics() -> dict[str, str]:
    """The language reference of the running Python, as topic name -> text.

    Raises:
        SystemExit: this Python was packaged without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit(
            "demo: text: expected the standard library's pydoc_data.topics, got none; install the complete standard "
            "library (on Debian and Ubuntu: apt install libpython3-stdlib) or use a Python from python.org"
        ) from error
    return dict(topics)


def split_topics(topics: Mapping[str, str], held_out_fraction: float = HELD_OUT_FRACTION) -> Corpus:
    """Split topics into train and held-out parts that share no paragraph and no run of ``SHARED_RUN_WORDS`` words.

    Which topics are held out depends on their names only (the smallest SHA-256 hashes), so the split is the same on
    every machine, and the same for the topics that two versions of Python have in common. Repeated paragraphs stay
    once on either side.

    Args:
        topics: topic name -> text.
        held_out_fraction: share of the topics to hold out, between 0 and 1; their text is less after the removal.
    """
    by_hash = sorted(topics, key=lambda name: hashlib.sha256(_SPLIT_PREFIX + name.encode()).digest())
    held_out_names = set(by_hash[: round(len(topics) * held_out_fraction)])
    train = {name: paragraphs(topics[name]) for name in sorted(topics) if name not in held_out_names}
    held_out = {name: paragraphs(topics[name]) for name in sorted(held_out_names)}
    return Corpus(
        train=_joined(_without_repeats(train)),
        held_out=_joined(_without_repeats(_without_shared(held_out, train.values()))),
    )


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, with their own indentation and line breaks."""
    return [block.rstrip() for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip()]


def word_runs(blocks: Iterable[str], length: int = SHARED_RUN_WORDS) -> Iterator[tuple[tuple[str, ...], set[int]]]:
    """Every run of ``length`` words over consecutive blocks, each with the indices of the blocks that it touches."""
    words = [(word, index) for index, block in enumerate(blocks) for word in block.split()]
    for start in range(len(words) - length + 1):
        run = words[start : start + length]
        yield tuple(word for word, _ in run), {index for _, index in run}


def _without_shared(held_out: dict[str, list[str]], train: Iterable[list[str]]) -> dict[str, list[str]]:
    train_blocks: set[str] = set()
    train_runs: set[tuple[str, ...]] = set()
    for blocks in train:
        train_blocks.update(_normalised(block) for block in blocks)
        train_runs.update(run for run, _ in word_runs(blocks))
    kept = {}
    for name, blocks in held_out.items():
        remaining = [block for block in blocks if _normalised(block) not in train_blocks]
        # Taking a paragraph out makes new neighbours, and so new runs: repeat until nothing more is shared.
        while shared := set().union(*(touched for run, touched in word_runs(remaining) if run in train_runs)):
            remaining = [block for index, block in enumerate(remaining) if index not in shared]
        kept[name] = remaining
    return kept


def _without_repeats(topics: dict[str, list[str]]) -> dict[str, list[str]]:
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name, blocks in topics.items():
        kept[name] = []
        for block in blocks:
            if (normalised := _normalised(block)) not in seen:
                seen.add(normalised)
                kept[name].append(block)
    return kept


def _normalised(block: str) -> str:
    return " ".join(block.split())


def _joined(topics: dict[str, list[str]]) -> dict[str, str]:
    return {name: "\n\n".join(blocks) for name, blocks in topics.items() if blocks}

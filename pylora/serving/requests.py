"""What users of a served model ask for and what they get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """What one user wants.

    Attributes:
        prompt: token ids, at least one.
        adapter: name in the pool; None or "__base__" for the base model.
        max_new_tokens: when to stop, at the latest.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 16


class Token(NamedTuple):
    """One event of a stream: a new token of a request, or its end.

    Attributes:
        request: index in the batch.
        token: its id; None where the request has ended.
        error: what ended it, None where it ended well.
    """

    request: int
    token: int | None
    error: Exception | None = None


@dataclass
class Answer:
    """What one request got.

    Attributes:
        tokens: new token ids, with the one that ends the text if it came.
        error: why there is no answer, or only a part of one.
    """

    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_ok(self) -> bool:
        """Whether nothing went wrong."""
        return self.error is None


def collect(events: Iterable[Token]) -> list[Answer]:
    """The answers that a stream's events make. Each request has an event at its end."""
    answers: dict[int, Answer] = {}
    for event in events:
        answer = answers.setdefault(event.request, Answer())
        if event.token is not None:
            answer.tokens.append(event.token)
        else:
            answer.error = event.error
    return [answers[request] for request in sorted(answers)]


def check_request(request: Request) -> None:
    """Refuse a request that nothing could be generated for.

    Raises:
        ValueError: no prompt, or no new tokens wanted.
    """
    if len(request.prompt) == 0:
        raise ValueError("request: prompt: expected at least one token, got none")
    if request.max_new_tokens < 1:
        raise ValueError(f"request: max_new_tokens: expected at least 1, got {request.max_new_tokens}")

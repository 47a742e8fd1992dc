"""Serves batches of (prompt, adapter) pairs on a transformers model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pylora.errors import PeftError
from pylora.serving.attach import AttachedPool
from pylora.serving.pool import AdapterPool
from pylora.serving.requests import Answer, Request, Token, check_request, collect


class ServingRuntime:
    """A model with a pool attached, that answers batches of requests.

    A batch is generated as a whole: requests that end early leave their row unused until the longest one ends. Several
    threads may call at the same time; each has a batch of its own.

    Args:
        model: a decoder-only transformers model, in evaluation mode, without adapters.
        pool: adapters of that model.

    Raises:
        AdapterMismatchError: the pool is for another model.
    """

    def __init__(self, model: Any, pool: AdapterPool) -> None:
        self.model = model
        self.pool = pool
        self.attached = AttachedPool(model, pool)

    def serve(self, requests: Sequence[Request], **generate_options: Any) -> list[Answer]:
        """Answer a batch.

        Args:
            requests: rows of the batch.
            generate_options: of `model.generate`, such as `do_sample`; the same for all rows. Greedy by default.

        Returns:
            an answer for each request. One whose adapter cannot be had, or whose prompt is empty, has an error; the
            others are served. An error of the model itself is the error of all that ran.
        """
        events: list[Token] = []
        self._run(requests, events.append, threading.Event(), generate_options)
        return collect(events)

    def stream(self, requests: Sequence[Request], **generate_options: Any) -> Iterator[Token]:
        """Answer a batch token by token, as soon as each is there. Arguments and errors are `serve`'s.

        The model runs on a thread of its own, which ends at the next token when the iterator is closed.

        Yields:
            the tokens of all requests as they come, and for each request an event without a token at its end.
        """
        events: queue.SimpleQueue[Token | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()

        def run() -> None:
            try:
                self._run(requests, events.put, stopped, generate_options)
                events.put(None)
            except BaseException as error:  # raised by the iterator, on the caller's thread
                events.put(error)

        worker = threading.Thread(target=run, name="pylora-serving", daemon=True)
        worker.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stopped.set()
            worker.join()

    def detach(self) -> None:
        """Give the model back as it was."""
        self.attached.detach()

    def _run(
        self,
        requests: Sequence[Request],
        emit: Callable[[Token], None],
        stopped: threading.Event,
        options: dict[str, Any],
    ) -> None:
        rows: list[int] = []
        slots: list[int] = []
        try:
            for index, request in enumerate(requests):
                try:
                    check_request(request)
                    slots += self.pool.acquire([request.adapter])
                    rows.append(index)
                except (PeftError, ValueError, TypeError) as error:
                    emit(Token(index, None, error))
            if rows:
                self._generate([requests[row] for row in rows], rows, slots, emit, stopped, options)
        finally:
            self.pool.release(slots)

    def _generate(
        self,
        requests: list[Request],
        rows: list[int],
        slots: list[int],
        emit: Callable[[Token], None],
        stopped: threading.Event,
        options: dict[str, Any],
    ) -> None:
        ids, mask = _left_padded(self.model, requests)
        follower = _Follower(requests, rows, _end_tokens(self.model, options), emit, stopped)
        longest = max(request.max_new_tokens for request in requests)
        arguments = {"do_sample": False, **options, "max_new_tokens": longest}
        try:
            with torch.inference_mode(), self.attached.rows(slots):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    pad_token_id=_pad_token(self.model),
                    streamer=follower,
                    stopping_criteria=[follower.finished],
                    **arguments,
                )
            follower.close(None)
        except Exception as error:
            follower.close(error)


class _Follower:
    """Sees each step's tokens first (transformers' streamer) and then says which rows are done (stopping criterion)."""

    def __init__(
        self,
        requests: list[Request],
        rows: list[int],
        ends: frozenset[int],
        emit: Callable[[Token], None],
        stopped: threading.Event,
    ) -> None:
        self._rows, self._ends, self._emit, self._stopped = rows, ends, emit, stopped
        self._left = [request.max_new_tokens for request in requests]
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        """New tokens, one a row; the first call has the prompts."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        for place, token in enumerate(value.tolist()):
            if not self._left[place]:
                continue
            self._emit(Token(self._rows[place], token))
            self._left[place] = 0 if token in self._ends else self._left[place] - 1
            if not self._left[place]:
                self._emit(Token(self._rows[place], None))

    def end(self) -> None:
        """Generation is over. Nothing is left to flush: each row ended with its own event."""

    def finished(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows are done; all of them once the consumer is gone."""
        gone = self._stopped.is_set()
        return torch.tensor([gone or not left for left in self._left], device=ids.device)

    def close(self, error: Exception | None) -> None:
        """End what has not ended yet."""
        for place, left in enumerate(self._left):
            if left:
                self._left[place] = 0
                self._emit(Token(self._rows[place], None, error))


def _left_padded(model: nn.Module, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[num_rows, longest prompt]`, prompts at the right."""
    width = max(len(request.prompt) for request in requests)
    pad = _pad_token(model)
    gaps = [width - len(request.prompt) for request in requests]
    ids = [[pad] * gap + list(request.prompt) for gap, request in zip(gaps, requests, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    device = next(model.parameters()).device
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _pad_token(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return 0 if pad is None else pad  # masked wherever it stands


def _end_tokens(model: Any, options: dict[str, Any]) -> frozenset[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)

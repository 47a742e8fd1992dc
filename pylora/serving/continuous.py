"""Adapters by request in transformers' continuous batching: requests join and leave the batch at every step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pylora.errors import PeftError, UnsupportedFeatureError
from pylora.serving.attach import AttachedPool
from pylora.serving.errors import AdapterMismatchError, NoFreeSlotError
from pylora.serving.pool import AdapterPool
from pylora.serving.requests import Answer, Request, Token, check_request, collect

if TYPE_CHECKING:
    from typing_extensions import Self

# Of the paged cache and of a step, where the caller says nothing. transformers would take most of the memory for the
# cache and for a mask of its length.
_PAGE_SIZE, _NUM_BLOCKS, _STEP_TOKENS, _STEP_REQUESTS = 32, 256, 512, 64

_POLL_SECONDS = 0.5  # how long the end of the generation thread may go unnoticed


class ContinuousRuntime:
    """Serves a pool's adapters by transformers' continuous batching, the mechanism of `model.generate_batch`.

    transformers packs the tokens of a step, whole prompts and single new tokens alike, into one row over a paged cache.
    Here each step is told which of its tokens belong to which request, so that each request gets its own adapter and
    those for the base model none. Prompts that begin alike share no cache, as `generate_batch` lets them: with another
    adapter their keys and values are others.

    Use it as a context manager: the model runs on a thread of its own inside the block. One `serve` or `stream` at a
    time.

    Args:
        model: a decoder-only transformers model without adapters that supports continuous batching.
        pool: adapters of that model, without its output embedding.
        generation_config: transformers' `GenerationConfig`. None: the model's own, greedy.
        batching_config: transformers' `ContinuousBatchingConfig`, for the sizes of the cache and of a step. None: a
            cache of 8,192 tokens, 64 requests and 512 tokens a step. Block sharing, asynchronous batching and compiled
            steps are switched off in it.

    Raises:
        AdapterMismatchError: the pool is for another model, or has the output embedding.
        UnsupportedFeatureError: more than one sequence a request, or a transformers whose manager is another.
    """

    def __init__(
        self, model: Any, pool: AdapterPool, generation_config: Any = None, batching_config: Any = None
    ) -> None:
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is head and name in pool.spec.layers:
                raise AdapterMismatchError(f"{name}: a continuous batch computes it for other rows; name other layers")
        self.model, self.pool = model, pool
        self._generation_config = _generation_config(model, generation_config)
        self._batching_config = _batching_config(batching_config)
        self.attached = AttachedPool(model, pool)
        self._manager: Any = None
        self._is_streaming = threading.Lock()
        self._step = threading.Lock()  # held while the model computes
        self._slots: dict[str, int] = {}  # of the manager's requests; -1 for the base model and what was cancelled
        self._ids = map("pylora-{}".format, itertools.count())

    def __enter__(self) -> Self:
        if self._manager is None:
            self._manager = _make_manager(self.model, self._generation_config, self._batching_config, self._compute)
            self._manager.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
        self._slots.clear()

    def detach(self) -> None:
        """Give the model back as it was."""
        self.attached.detach()

    def serve(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer requests, each beside whichever others there are.

        Args:
            requests: of any number; as many as fit are under way at a time.

        Returns:
            an answer for each. One whose adapter cannot be had, or that is longer than the cache, has an error; the
            others are served. A request for which all slots are taken waits for one that ends.
        """
        return collect(self.stream(requests))

    def stream(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Answer requests token by token, as soon as each is there.

        Args:
            requests: taken one after the other as there is room, so that an iterator may bring later ones while
                earlier ones run.

        Yields:
            the tokens of all requests as they come, and for each request an event without a token at its end.

        Raises:
            RuntimeError: outside the `with` block, or beside another stream.
        """
        if self._manager is None:
            raise RuntimeError("ContinuousRuntime: expected to be used inside its `with` block")
        if not self._is_streaming.acquire(blocking=False):
            raise RuntimeError("ContinuousRuntime: expected one stream at a time; another is running")
        flow = _Flow(iter(enumerate(requests)))
        try:
            while True:
                yield from self._admit(flow)
                if not flow.running:
                    return
                output = self._manager.get_result(timeout=_POLL_SECONDS)
                if output is not None:
                    yield from self._advance(flow, output)
                elif not self._manager.is_running():
                    raise RuntimeError("ContinuousRuntime: the generation thread has ended")
        finally:
            for name in flow.running:
                self._cancel(name)
            self._is_streaming.release()

    def _admit(self, flow: _Flow) -> Iterator[Token]:
        """Hand requests to the manager while there are any and there is room."""
        while len(flow.running) < self._batching_config.max_requests_per_batch:
            entry = flow.waiting or next(flow.requests, None)
            if entry is None:
                return
            flow.waiting = None
            index, request = entry
            try:
                self._check(request)
                slot = self.pool.acquire([request.adapter])[0]
            except NoFreeSlotError as error:
                if flow.running:  # one of them will end
                    flow.waiting = entry
                    return
                yield Token(index, None, error)
            except (PeftError, ValueError, TypeError) as error:
                yield Token(index, None, error)
            else:
                self._submit(flow, index, request, slot)

    def _submit(self, flow: _Flow, index: int, request: Request, slot: int) -> None:
        name = next(self._ids)
        self._slots[name] = slot
        flow.running[name] = [index, 0]
        self._manager.add_request(
            list(request.prompt), request_id=name, max_new_tokens=request.max_new_tokens, streaming=True
        )

    def _check(self, request: Request) -> None:
        check_request(request)
        config = self._batching_config
        capacity, length = config.num_blocks * config.page_size, len(request.prompt) + request.max_new_tokens
        if length > capacity:
            raise ValueError(f"request: expected at most the cache's {capacity} tokens with the new ones, got {length}")

    def _advance(self, flow: _Flow, output: Any) -> Iterator[Token]:
        """The events that an output of the manager stands for: it has all tokens so far."""
        known = flow.running.get(output.request_id)
        if known is None:  # of a stream that was closed
            return
        index, told = known
        known[1] = len(output.generated_tokens)
        is_over = output.is_finished()
        if is_over:
            del flow.running[output.request_id]
            self.pool.release([self._slots.pop(output.request_id)])
        for token in output.generated_tokens[told:]:
            yield Token(index, token)
        if is_over:
            yield Token(index, None, None if output.error is None else RuntimeError(output.error))

    def _cancel(self, name: str) -> None:
        """Take a request back, and its slot after the step that may use it. It may be in one more, without slot."""
        self._manager.cancel_request(name)
        with self._step:
            slot, self._slots[name] = self._slots[name], -1
        self.pool.release([slot])

    def _compute(self, batch: Any, compute: Callable[[], None]) -> None:
        """A step of the manager, on its thread: `compute` runs the model over the requests in `batch`."""
        with self._step:
            slots = [self._slots[each.state.request_id] for each in batch]
            with self.attached.packed(slots, [each.query_length for each in batch]):
                compute()


@dataclasses.dataclass
class _Flow:
    """One stream's requests.

    Attributes:
        requests: those to come, with their place.
        waiting: one that found no slot.
        running: of those in the manager, the place and how many tokens were told.
    """

    requests: Iterator[tuple[int, Request]]
    waiting: tuple[int, Request] | None = None
    running: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def _generation_config(model: Any, given: Any) -> Any:
    config = copy.deepcopy(model.generation_config if given is None else given)
    if given is None:
        config.do_sample = False
    if (config.num_return_sequences or 1) > 1:
        raise UnsupportedFeatureError(f"num_return_sequences={config.num_return_sequences}: expected one a request")
    if config.eos_token_id is None:
        config.eos_token_id = -1  # transformers' word for none
    return config


def _batching_config(given: Any) -> Any:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(page_size=_PAGE_SIZE) if given is None else copy.deepcopy(given)
    return dataclasses.replace(
        config,
        num_blocks=config.num_blocks or _NUM_BLOCKS,
        max_batch_tokens=config.max_batch_tokens or _STEP_TOKENS,
        max_requests_per_batch=config.max_requests_per_batch or _STEP_REQUESTS,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        varlen_compile_config=None,
        decode_compile_config=None,
        default_compile_level=0,
    )


def _make_manager(
    model: Any, generation_config: Any, batching_config: Any, compute: Callable[[Any, Callable[[], None]], None]
) -> Any:
    """transformers' manager, each step of which is run by `compute`, which is given the requests in it."""
    import torch
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    if not callable(getattr(ContinuousBatchingManager, "_generation_step", None)):
        raise UnsupportedFeatureError("this transformers batches continuously in another way (5.19 to 5.23 are known)")

    class Manager(ContinuousBatchingManager):
        def _generation_step(self) -> None:
            compute(self.batch_processor.inputs_and_outputs.requests_in_batch, super()._generation_step)

    with torch.no_grad():
        return Manager(model, generation_config, batching_config)

"""Adapters by request in transformers' continuous batching, against each adapter alone in a PeftModel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from pylora import PeftModel
from pylora.errors import UnsupportedFeatureError
from pylora.serving import (
    AdapterMismatchError,
    AdapterPool,
    ContinuousRuntime,
    NoFreeSlotError,
    PoolSpec,
    Request,
    UnknownAdapterError,
)

Make = Callable[..., Path]
NAMES = ["a", None, "b", "c"]
SMALL = {"page_size": 4, "num_blocks": 16, "max_batch_tokens": 16, "max_requests_per_batch": 6}
CAPACITY = 64


@pytest.fixture
def folders(make_adapter: Make) -> dict[str | None, Path | None]:
    return {
        None: None,
        "a": make_adapter("a", 1),
        "b": make_adapter("b", 2, r=8, target_modules=["q_proj", "up_proj", "down_proj"]),
        "c": make_adapter("c", 3, r=1, target_modules="all-linear", use_rslora=True),
    }


@pytest.fixture
def make_runtime(
    fresh_llama: Callable[[], Any], folders: dict[str | None, Path | None]
) -> Callable[..., ContinuousRuntime]:
    """A runtime whose steps are short: prompts are split over several, and requests wait for one another."""

    def make(num_slots: int = 3, **config: Any) -> ContinuousRuntime:
        model = fresh_llama()
        pool = AdapterPool(model, num_slots, 8)
        for name, folder in folders.items():
            if name is not None and folder is not None:
                pool.register(name, folder)
        batching = ContinuousBatchingConfig(**{**SMALL, **config})
        return ContinuousRuntime(model, pool, GenerationConfig(do_sample=False, eos_token_id=None), batching)

    return make


@pytest.fixture
def alone(fresh_llama: Callable[[], Any], folders: dict[str | None, Path | None]) -> Callable[[Request], list[int]]:
    """The greedy answer to a request by its adapter alone."""

    def answer(request: Request) -> list[int]:
        folder = folders[request.adapter]
        model = fresh_llama() if folder is None else PeftModel.from_pretrained(fresh_llama(), folder).eval()
        ids = torch.tensor([list(request.prompt)])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=request.max_new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, ids.shape[1] :].tolist()

    return answer


def mixed_requests(count: int) -> list[Request]:
    """Prompts of 1 to 20 tokens and answers of 1 to 9, adapters and the base model in turn."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, number: int) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    return [Request(draw(2, 30, draw(1, 21, 1)[0]), NAMES[i % 4], draw(1, 10, 1)[0]) for i in range(count)]


def test_requests_of_one_batch_have_their_own_adapters(make_runtime: Any, alone: Any) -> None:
    requests = mixed_requests(20)
    with make_runtime() as runtime:
        steps = record_steps(runtime)
        answers = runtime.serve(requests)
        assert runtime.pool.stats().in_use == 0
    for request, answer in zip(requests, answers, strict=True):
        assert answer.is_ok
        assert answer.tokens == alone(request), request
    assert max(len(set(slots)) for slots, _ in steps) == 4  # three adapters and the base model in one step
    assert any(1 in lengths and max(lengths) > 1 for _, lengths in steps)  # prompts beside single tokens
    assert any(set(lengths) == {1} and len(lengths) > 1 for _, lengths in steps)


def record_steps(runtime: ContinuousRuntime) -> list[tuple[list[int], list[int]]]:
    """Slots and lengths of each step from now on."""
    steps = []
    packed = runtime.attached.packed

    def recording(slots: list[int], lengths: list[int]) -> Any:
        steps.append((slots, lengths))
        return packed(slots, lengths)

    runtime.attached.packed = recording  # type: ignore[method-assign]
    return steps


def test_prompts_that_begin_alike_share_no_cache(make_runtime: Any, alone: Any) -> None:
    """transformers would take the first request's keys and values, which are another adapter's."""
    requests = [Request([*range(2, 20)], name, 5) for name in (*NAMES, *NAMES)]
    with make_runtime(allow_block_sharing=True) as runtime:
        answers = runtime.serve(requests)
    right = {name: alone(Request([*range(2, 20)], name, 5)) for name in NAMES}
    assert [answer.tokens for answer in answers] == [right[request.adapter] for request in requests]
    assert len({tuple(tokens) for tokens in right.values()}) == 4


def test_more_adapters_than_slots_take_turns(make_runtime: Any, alone: Any) -> None:
    requests = mixed_requests(16)
    with make_runtime(num_slots=1) as runtime:
        answers = runtime.serve(requests)
        assert runtime.pool.stats().evictions > 3
    assert [answer.tokens for answer in answers] == [alone(request) for request in requests]


def test_a_cache_that_is_too_small_for_all_starts_requests_anew(make_runtime: Any, alone: Any) -> None:
    requests = [Request([2 + i, 3, 4], NAMES[i % 4], 30) for i in range(6)]
    with make_runtime() as runtime:
        answers = runtime.serve(requests)
    assert [answer.tokens for answer in answers] == [alone(request) for request in requests]


def test_a_request_that_fills_the_cache_and_one_beyond(make_runtime: Any, alone: Any) -> None:
    full = Request([*range(2, 22)], "a", CAPACITY - 20)
    with make_runtime() as runtime:
        beyond, fits = runtime.serve([Request(full.prompt, "a", CAPACITY - 19), full])
    assert "expected at most the cache's 64 tokens" in str(beyond.error)
    assert fits.tokens == alone(full)


def test_later_requests_join_a_running_batch(make_runtime: Any, alone: Any) -> None:
    requests = [Request([5, 6, 7], "a", 20), Request([8, 9], "b", 3), Request([9], None, 2)]
    seen = []

    def arriving() -> Iterator[Request]:
        yield requests[0]
        while len(seen) < 4:  # the first has begun: it is the stream's reader who adds these
            yield requests[2]
        yield requests[1]

    with make_runtime(max_requests_per_batch=2) as runtime:
        for event in runtime.stream(arriving()):
            seen.append(event)
    ends = [event.request for event in seen if event.token is None]
    assert ends.index(0) > 1  # others came and went beside it
    assert [event.token for event in seen if event.request == 0] == [*alone(requests[0]), None]
    last = max(event.request for event in seen)
    assert [event.token for event in seen if event.request == last] == [*alone(requests[1]), None]


def test_bad_requests_fail_alone(make_runtime: Any, make_adapter: Make, alone: Any) -> None:
    good = [Request([5, 6, 7], "a", 5), Request([8, 9], None, 5), Request([10], "c", 5)]
    bad = [Request([5], "nobody", 5), Request([], "a", 5), Request([5], "a", 0), Request([5], "wide", 5)]
    with make_runtime() as runtime:
        runtime.pool.register("wide", make_adapter("wide", r=9))
        answers = runtime.serve([bad[0], good[0], bad[1], bad[2], good[1], bad[3], good[2]])
        assert runtime.pool.stats().in_use == 0
    errors = {i: type(answer.error) for i, answer in enumerate(answers) if not answer.is_ok}
    assert errors == {0: UnknownAdapterError, 2: ValueError, 3: ValueError, 5: AdapterMismatchError}
    assert [answers[i].tokens for i in (1, 4, 6)] == [alone(request) for request in good]


def test_no_slot_for_anyone(make_runtime: Any, alone: Any) -> None:
    base = Request([5, 6], None, 4)
    with make_runtime(num_slots=1) as runtime:
        runtime.pool.pin("a")
        answers = runtime.serve([Request([5], "b", 4), base, Request([5], "a", 4)])
    assert isinstance(answers[0].error, NoFreeSlotError)
    assert answers[1].tokens == alone(base)
    assert answers[2].is_ok


def test_a_closed_stream_gives_back_its_slots_and_the_next_one_works(make_runtime: Any, alone: Any) -> None:
    request = Request([5, 6, 7], "b", 6)
    with make_runtime(num_slots=1) as runtime:
        stream = runtime.stream([Request([5, 6], "a", 40), Request([6, 5], "a", 40)])
        assert next(stream).token is not None
        with pytest.raises(RuntimeError, match="one stream at a time"):
            runtime.serve([request])
        stream.close()
        assert runtime.pool.stats().in_use == 0
        assert runtime.serve([request])[0].tokens == alone(request)  # in the slot that the cancelled ones had


def test_an_error_of_the_model_is_said_and_frees_the_slots(make_runtime: Any) -> None:
    with make_runtime() as runtime:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of luck")

        hook = runtime.model.model.layers[1].register_forward_hook(fail)
        answers = runtime.serve([Request([5, 6], "a", 4), Request([5], None, 4)])
        assert all("out of luck" in str(answer.error) for answer in answers)
        assert runtime.pool.stats().in_use == 0
        hook.remove()
    with runtime:  # a new thread
        assert runtime.serve([Request([5, 6], "a", 4)])[0].is_ok


def test_what_it_refuses(make_runtime: Any, llama: Any) -> None:
    with pytest.raises(AdapterMismatchError, match="lm_head: a continuous batch computes it for other rows"):
        ContinuousRuntime(llama, AdapterPool(PoolSpec.from_model(llama, ["lm_head"]), 1, 4))
    with pytest.raises(UnsupportedFeatureError, match="num_return_sequences=2"):
        ContinuousRuntime(llama, AdapterPool(llama, 1, 4), GenerationConfig(do_sample=True, num_return_sequences=2))
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        make_runtime().serve([Request([5])])
    assert not any(module._forward_hooks for module in llama.modules())


def test_leaves_the_model_as_it_was(make_runtime: Any, fresh_llama: Any) -> None:
    threads = threading.active_count()
    runtime = make_runtime()
    with runtime:
        assert runtime.serve([Request([5], "a", 2)])[0].is_ok
    runtime.detach()
    model, other = runtime.model, fresh_llama()
    assert threading.active_count() == threads
    assert model.config._attn_implementation == other.config._attn_implementation
    assert model.generation_config == other.generation_config
    assert not any(module._forward_hooks for module in model.modules())

"""Batches that mix adapters, base requests and bad requests, against each adapter alone in a PeftModel."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pylora import PeftModel
from pylora.serving import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterPool,
    AttachedPool,
    LayerShape,
    NoFreeSlotError,
    PoolSpec,
    Request,
    ServingRuntime,
    Token,
    UnknownAdapterError,
)

Make = Callable[..., Path]
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


def alone(model: Any, folder: Path | None, prompt: list[int], tokens: int) -> list[int]:
    """The greedy answer of one adapter by itself."""
    model = model if folder is None else PeftModel.from_pretrained(model, folder).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def folders(make_adapter: Make) -> dict[str, Path]:
    return {
        "a": make_adapter("a", 1),
        "b": make_adapter("b", 2, r=8, target_modules=["q_proj", "up_proj", "down_proj"]),
        "c": make_adapter("c", 3, r=1, target_modules="all-linear", use_rslora=True),
    }


@pytest.fixture
def runtime(llama: Any, folders: dict[str, Path]) -> ServingRuntime:
    pool = AdapterPool(llama, 3, 8)
    for name, folder in folders.items():
        pool.register(name, folder)
    return ServingRuntime(llama, pool)


@pytest.mark.parametrize("width", [1, 5])
def test_each_row_has_its_own_adapter(
    runtime: ServingRuntime, llama: Any, folders: dict[str, Path], width: int
) -> None:
    """Logits of each row against the adapter alone; the base row has the bits of a batch without adapters."""
    ids = torch.randint(1, 30, (5, width))
    names = ["a", None, "b", "c", "a"]
    with torch.inference_mode():
        base = llama(ids).logits
        with runtime.attached.rows(runtime.pool.acquire(names)):
            mixed = llama(ids).logits
        assert torch.equal(llama(ids).logits, base)
    assert torch.equal(mixed[1], base[1])
    runtime.detach()
    for row, name in enumerate(names):
        if name is not None:
            model = PeftModel.from_pretrained(llama, folders[name])
            with torch.inference_mode():
                expected = model(ids[row : row + 1]).logits[0]
            model.unload()
            torch.testing.assert_close(mixed[row], expected, atol=2e-5, rtol=1e-5)
            assert (mixed[row] - base[row]).abs().max() > 1e-3


def test_served_answers_are_those_of_the_adapter_alone(
    runtime: ServingRuntime, fresh_llama: Callable[[], Any], folders: dict[str, Path]
) -> None:
    names = ["a", None, "b", "c"]
    requests = [Request(p, n, 6 + i) for i, (p, n) in enumerate(zip(PROMPTS, names, strict=True))]
    answers = runtime.serve(requests)
    assert runtime.pool.stats().in_use == 0
    for request, answer in zip(requests, answers, strict=True):
        folder = None if request.adapter is None else folders[request.adapter]
        assert answer.is_ok
        assert answer.tokens == alone(fresh_llama(), folder, list(request.prompt), request.max_new_tokens)


def test_a_stream_gives_the_same_tokens_one_by_one(runtime: ServingRuntime) -> None:
    requests = [Request(PROMPTS[0], "a", 3), Request(PROMPTS[1], None, 7), Request(PROMPTS[2], "nobody", 7)]
    answers = runtime.serve(requests)
    events = list(runtime.stream(requests))
    for index, answer in enumerate(answers):
        own = [event for event in events if event.request == index]
        assert [event.token for event in own] == [*answer.tokens, None]
    assert isinstance(events[0].error, UnknownAdapterError)
    assert len(answers[0].tokens) == 3 < len(answers[1].tokens)
    # as they come: the short request ends before the long one has its last token
    assert events.index(Token(0, None)) < len(events) - 2
    assert events[-1] == Token(1, None)


def test_a_request_ends_at_the_end_token(runtime: ServingRuntime) -> None:
    plain = runtime.serve([Request(PROMPTS[0], "a", 8)])[0].tokens
    end = plain[2]
    answers = runtime.serve([Request(PROMPTS[0], "a", 8), Request(PROMPTS[1], "b", 8)], eos_token_id=end)
    assert answers[0].tokens == plain[: plain.index(end) + 1]
    assert answers[1].is_ok


def test_a_closed_stream_stops_and_gives_back_its_slots(runtime: ServingRuntime) -> None:
    stream = runtime.stream([Request(PROMPTS[0], "a", 10_000)])
    assert next(stream).token is not None
    stream.close()
    assert runtime.pool.stats().in_use == 0


def test_bad_requests_fail_alone(
    runtime: ServingRuntime, fresh_llama: Callable[[], Any], folders: dict[str, Path], make_adapter: Make
) -> None:
    runtime.pool.register("broken", make_adapter("broken"))
    shutil.rmtree(runtime.pool._sources["broken"].path)
    runtime.pool.register("too many", make_adapter("too_many"))
    requests = [
        Request(PROMPTS[0], "a"),
        Request(PROMPTS[0], "nobody"),
        Request([], "a"),
        Request(PROMPTS[0], "a", 0),
        Request(PROMPTS[0], "broken"),
        Request(PROMPTS[1], "b"),
        Request(PROMPTS[2], "c"),
        Request(PROMPTS[3], "too many"),
        Request(PROMPTS[3]),
    ]
    answers = runtime.serve(requests)
    errors = {i: type(answer.error) for i, answer in enumerate(answers) if not answer.is_ok}
    assert errors == {
        1: UnknownAdapterError,
        2: ValueError,
        3: ValueError,
        4: AdapterFileError,
        7: NoFreeSlotError,
    }
    for index in (0, 5, 6, 8):
        request = requests[index]
        folder = None if request.adapter is None else folders[request.adapter]
        assert answers[index].tokens == alone(fresh_llama(), folder, list(request.prompt), 16)
    assert runtime.pool.stats().in_use == 0
    assert runtime.serve([Request(PROMPTS[3], "too many")])[0].is_ok


def test_an_error_of_the_model_is_everyones_and_frees_the_slots(runtime: ServingRuntime) -> None:
    answers = runtime.serve([Request(PROMPTS[0], "a"), Request(PROMPTS[1])], num_beams=2)
    assert all("beam" in str(answer.error) for answer in answers)
    assert runtime.pool.stats().in_use == 0
    assert runtime.serve([Request(PROMPTS[0], "a", 2)])[0].is_ok


def test_another_number_of_rows_than_requests(runtime: ServingRuntime, llama: Any) -> None:
    with (
        runtime.attached.rows([0, 0, -1]),
        pytest.raises(ValueError, match=r"q_proj: input: expected 3 sequences, .* got shape \(2, 4, 16\)"),
    ):
        llama(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="expected slots from -1 to 2, got 3"), runtime.attached.rows([3]):
        pass


def test_attaching_leaves_the_model_as_it_is(
    runtime: ServingRuntime, llama: Any, fresh_llama: Callable[[], Any]
) -> None:
    assert list(llama.state_dict()) == list(fresh_llama().state_dict())
    runtime.detach()
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_pool_of_another_model(llama: Any) -> None:
    pool = AdapterPool(PoolSpec({"model.layers.0.self_attn.q_proj": LayerShape(16, 17)}), 1, 4)
    with pytest.raises(AdapterMismatchError, match="q_proj: expected a dense layer"):
        AttachedPool(llama, pool)
    assert not any(module._forward_hooks for module in llama.modules())


def test_gpt2_with_its_transposed_layers() -> None:
    """transformers' Conv1D has its weight [in, out]; the factors are as for any dense layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    pool = AdapterPool(model, 1, 4)
    layer = pool.spec.layers["transformer.h.0.attn.c_attn"]
    assert layer == (16, 48)
    stack = pool.layers["transformer.h.0.attn.c_attn"]
    a, b = torch.randn(2, 16), torch.randn(48, 2)
    stack.a_pool[0, :2], stack.b_pool[0, :2], stack.ranks[0], stack.scalings[0] = a, b.t(), 2, 0.5
    attached = AttachedPool(model, pool)
    ids = torch.randint(0, 30, (2, 5))
    with torch.inference_mode(), attached.rows([-1, 0]):
        mixed = model(ids).logits
    attached.detach()
    with torch.inference_mode():
        base = model(ids).logits
        model.transformer.h[0].attn.c_attn.weight += 0.5 * (b @ a).t()
        merged = model(ids).logits
    assert torch.equal(mixed[0], base[0])
    torch.testing.assert_close(mixed[1], merged[1], atol=1e-5, rtol=1e-4)

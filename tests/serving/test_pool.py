"""The adapter pool: what is in the slots, and what a call that fails leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pylora.errors import UnsupportedFeatureError
from pylora.serving import (
    AdapterFileError,
    AdapterInUseError,
    AdapterMismatchError,
    AdapterPool,
    LayerShape,
    NoFreeSlotError,
    PoolSpec,
    UnknownAdapterError,
)

Make = Callable[..., Path]


def delta_in(pool: AdapterPool, layer: str, slot: int) -> torch.Tensor:
    """What the pool adds to a layer's weight for a slot."""
    stack = pool.layers[layer]
    rank = int(stack.ranks[slot])
    return stack.scalings[slot] * stack.b_pool[slot, :rank].t() @ stack.a_pool[slot, :rank]


def delta_on_disk(folder: Path, layer: str, scaling: float) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{layer}"
    return scaling * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


Q0, V1, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"


def test_adapters_of_other_ranks_and_targets_side_by_side(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, num_slots=3, max_rank=8)
    plain = make_adapter("plain", 1)
    mixed = make_adapter(
        "mixed", 2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 8}, alpha_pattern={"q_proj": 2}
    )
    stable = make_adapter("stable", 3, use_rslora=True, r=3)
    for name, folder in (("plain", plain), ("mixed", mixed), ("stable", stable)):
        pool.load(name, folder)
    first, second, third = pool.acquire(["plain", "mixed", "stable"])
    torch.testing.assert_close(delta_in(pool, Q0, first), delta_on_disk(plain, Q0, 2.0))
    torch.testing.assert_close(delta_in(pool, V1, first), delta_on_disk(plain, V1, 2.0))
    torch.testing.assert_close(delta_in(pool, Q0, second), delta_on_disk(mixed, Q0, 0.5))
    torch.testing.assert_close(delta_in(pool, UP0, second), delta_on_disk(mixed, UP0, 1.0))
    torch.testing.assert_close(delta_in(pool, Q0, third), delta_on_disk(stable, Q0, 8 / math.sqrt(3)))
    assert pool.layers[UP0].ranks.tolist() == [{second: 8}.get(slot, 0) for slot in range(3)]
    assert pool.layers[V1].ranks[second] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_another_dtype_are_converted(llama: Any, make_adapter: Make, dtype: torch.dtype) -> None:
    folder = make_adapter("a")
    pool = AdapterPool(llama, 1, 4, dtype)
    pool.load("a", folder)
    stored = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{Q0}.lora_B.weight"]
    assert torch.equal(pool.layers[Q0].b_pool[0, :4], stored.t().to(dtype))


def test_least_recently_used_leaves_and_comes_back(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 2, 4)
    for seed, name in enumerate("abc"):
        pool.register(name, make_adapter(name, seed))
    pool.release(pool.acquire(["a", "b", None, "__base__"]))
    pool.release(pool.acquire(["a"]))
    pool.release(pool.acquire(["c"]))
    assert pool.resident == ["a", "c"]
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.registered) == (1, 3, 1, 3)
    assert stats.load_times.count == 3
    assert stats.resident_bytes == 2 * 4 * 4 * (4 * (16 + 16))  # 2 adapters, f32, r 4, 4 layers of 16 to 16


def test_replace_keeps_the_old_version_for_requests_in_flight(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 2, 4)
    old, new = make_adapter("old", 1), make_adapter("new", 2)
    pool.load("a", old)
    in_flight = pool.acquire(["a"])
    pool.replace("a", new)
    later = pool.acquire(["a"])
    torch.testing.assert_close(delta_in(pool, Q0, in_flight[0]), delta_on_disk(old, Q0, 2.0))
    torch.testing.assert_close(delta_in(pool, Q0, later[0]), delta_on_disk(new, Q0, 2.0))
    pool.release(in_flight)
    pool.release(later)
    assert pool.stats().in_use == 0
    shutil.rmtree(new)
    with pytest.raises(AdapterFileError, match="found none"):
        pool.replace("a", new)
    assert pool.resident == ["a"]


def test_slots_that_are_pinned_or_in_use_stay(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 2, 4)
    for name in "abc":
        pool.register(name, make_adapter(name))
    pool.pin("a")
    held = pool.acquire(["b"])
    with pytest.raises(NoFreeSlotError, match="no slot for adapter 'c': of 2 slots, 1 are in use, 1 adapters are pinn"):
        pool.acquire(["b", "c"])
    with pytest.raises(AdapterInUseError, match="it is pinned"):
        pool.evict("a")
    with pytest.raises(AdapterInUseError, match="1 requests in flight"):  # the failed call left no user behind
        pool.evict("b")
    pool.release(held)
    assert pool.evict("b")
    assert not pool.evict("b")
    pool.unpin("a")
    assert len(pool.acquire(["b", "c"])) == 2


def test_removed_adapters_are_unknown_and_their_requests_finish(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 1, 4)
    pool.load("a", make_adapter("a"))
    held = pool.acquire(["a"])
    pool.remove("a")
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'a': 0 are registered"):
        pool.acquire(["a"])
    pool.register("b", make_adapter("b"))
    with pytest.raises(NoFreeSlotError):
        pool.load("b")
    pool.release(held)
    pool.load("b")
    with pytest.raises(ValueError, match="expected a slot in use"):
        pool.release(held)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: an adapter pool cannot serve this"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
    ],
)
def test_variants_are_refused(llama: Any, make_adapter: Make, config: dict[str, Any], message: str) -> None:
    pool = AdapterPool(llama, 1, 4)
    with pytest.raises(UnsupportedFeatureError, match=message):
        pool.load("a", make_adapter("a", **config))
    assert pool.registered == []
    assert pool.stats().failed_loads == 1
    pool.load("b", make_adapter("b"))  # its slot was given back


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(tensors)
    path.unlink()
    save_file(tensors, path)


A_KEY = f"base_model.model.{Q0}.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit_config(f, r=8), AdapterMismatchError, r"lora_A: expected shape \(8, 16\), got \(4, 16\)"),
        (lambda f: edit_weights(f, lambda t: t.pop(A_KEY)), AdapterMismatchError, "expected a lora_A beside it"),
        (
            lambda f: edit_weights(f, lambda t: t.update(other=torch.ones(1))),
            AdapterMismatchError,
            "other: expected only",
        ),
        (
            lambda f: edit_weights(
                f, lambda t: t.update({key.replace("q_proj", "z_proj"): t.pop(key) for key in [*t]})
            ),
            AdapterMismatchError,
            "the pool has no layer 'model.layers.0.self_attn.z_proj'",
        ),
        (
            lambda f: edit_weights(f, lambda t: t.update({A_KEY: torch.zeros(4, 17)})),
            AdapterMismatchError,
            r"lora_A: expected shape \(4, 16\), got \(4, 17\)",
        ),
        (
            lambda f: edit_weights(f, lambda t: t.update({A_KEY: torch.zeros(4, 16, dtype=torch.int8)})),
            AdapterMismatchError,
            "expected floating point numbers, got torch.int8",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), AdapterFileError, "Can't find 'adapter_config.json'"),
        (lambda f: (f / "adapter_config.json").write_text("{"), AdapterFileError, "cannot read the adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), AdapterFileError, "Can't find weights"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-64]
            ),
            AdapterFileError,
            "is it truncated",
        ),
        (lambda f: shutil.rmtree(f), AdapterFileError, "expected a local folder with an adapter, found none"),
    ],
)
def test_adapters_that_do_not_fit_or_are_broken(
    llama: Any, make_adapter: Make, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    pool = AdapterPool(llama, 2, 8)
    pool.load("good", make_adapter("good"))
    folder = make_adapter("bad")
    damage(folder)
    pool.register("bad", folder)
    with pytest.raises(error, match=message):
        pool.acquire(["good", "bad"])
    stats = pool.stats()
    assert (stats.in_use, stats.resident, stats.failed_loads) == (0, 1, 1)
    assert pool.resident == ["good"]


def test_a_rank_above_the_pools(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 1, 2)
    with pytest.raises(AdapterMismatchError, match="rank 4: the pool's max_rank is 2"):
        pool.load("a", make_adapter("a"))


def test_prefetch_goes_on_after_a_broken_file(llama: Any, make_adapter: Make, caplog: Any) -> None:
    folders = {name: make_adapter(name) for name in "abc"}
    with AdapterPool(llama, 3, 4) as pool:
        for name, folder in folders.items():
            pool.register(name, folder)
        shutil.rmtree(folders["b"])
        a, b, c, unknown = pool.prefetch(["a", "b", "c", "d"])
        assert a.result(30) is None
        assert c.result(30) is None
        with pytest.raises(AdapterFileError):
            b.result(30)
        with pytest.raises(UnknownAdapterError):
            unknown.result(30)
        assert pool.resident == ["a", "c"]
    assert "prefetch of adapter 'b' failed" in caplog.text


def test_a_file_that_is_truncated_under_a_load(
    llama: Any, make_adapter: Make, truncating: Callable[[Path, int], None]
) -> None:
    """An error of that request alone, where reading by way of a mapping would end the process."""
    folders = {name: make_adapter(name, seed, target_modules="all-linear") for seed, name in enumerate("ab")}
    with AdapterPool(llama, 2, 4) as pool:
        pool.load("a", folders["a"])
        before = delta_in(pool, Q0, 0).clone()
        weights = folders["b"] / "adapter_model.safetensors"
        whole = weights.read_bytes()
        truncating(weights, len(whole) - 100)
        with pytest.raises(AdapterFileError, match=r"b'.*the file became shorter while it was read"):
            pool.load("b", folders["b"])
        assert pool.resident == ["a"]
        assert torch.equal(delta_in(pool, Q0, 0), before)
        weights.write_bytes(whole[:-100])
        with pytest.raises(AdapterFileError, match="is it truncated"):
            pool.load("b", folders["b"])
        pool.load("c", make_adapter("c", 2))
        assert pool.resident == ["a", "c"]


def test_a_load_waits_for_the_slots_of_other_loads(
    llama: Any, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the only slot being filled, a second adapter waits for it and then takes its place."""
    from pylora.serving import pool as module

    pool = AdapterPool(llama, 1, 4)
    for name in "ab":
        pool.register(name, make_adapter(name))
    started, go_on = threading.Event(), threading.Event()
    read = module.read_adapter

    def slow(*args: Any) -> Any:
        started.set()
        assert go_on.wait(30)
        return read(*args)

    monkeypatch.setattr(module, "read_adapter", slow)
    first = threading.Thread(target=pool.load, args=("a",))
    second = threading.Thread(target=pool.load, args=("b",))
    first.start()
    assert started.wait(30)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    first.join(30)
    second.join(30)
    assert pool.resident == ["b"]


def test_names_and_paths(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 1, 4)
    a, b = make_adapter("a"), make_adapter("b")
    pool.load("a", a)
    pool.load("a", a)
    assert pool.stats().load_times.count == 1
    with pytest.raises(ValueError, match="use replace"):
        pool.load("a", b)
    with pytest.raises(ValueError, match="stands for the base model"):
        pool.load("__base__", a)
    for call in (pool.evict, pool.remove, pool.pin, pool.load):
        with pytest.raises(UnknownAdapterError, match="unknown adapter 'z'"):
            call("z")
    with pytest.raises(UnknownAdapterError):
        pool.replace("z", a)


def test_sizes() -> None:
    spec = PoolSpec({"lin": LayerShape(10, 20)})
    assert AdapterPool(spec, 8, 4, byte_budget=3 * 4 * 30 * 4 + 5).num_slots == 3
    with pytest.raises(ValueError, match="byte_budget: expected 480 or more"):
        AdapterPool(spec, 8, 4, byte_budget=479)
    with pytest.raises(ValueError, match="max_rank: expected at least 1, got 0"):
        AdapterPool(spec, 8, 0)
    with pytest.raises(ValueError, match="expected a floating point dtype"):
        AdapterPool(spec, 8, 4, torch.int32)


def test_spec_of_a_model(llama: Any) -> None:
    layers = PoolSpec.from_model(llama).layers
    assert "lm_head" not in layers
    assert len(layers) == 14
    assert layers[UP0] == (16, 24)
    assert list(PoolSpec.from_model(llama, ["lm_head", "layers.0.self_attn.q_proj"]).layers) == [Q0, "lm_head"]
    with pytest.raises(ValueError, match="expected names of dense layers, got 'proj'"):
        PoolSpec.from_model(llama, ["proj"])


def test_prometheus_text(llama: Any, make_adapter: Make) -> None:
    pool = AdapterPool(llama, 2, 4)
    pool.load("a", make_adapter("a"))
    pool.acquire(["a"])
    text = pool.stats().prometheus()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["pylora_pool_hits_total"] == "1"
    assert samples["pylora_pool_misses_total"] == "1"
    assert samples["pylora_pool_slots_in_use"] == "1"
    assert samples['pylora_pool_load_seconds_bucket{le="+Inf"}'] == samples["pylora_pool_load_seconds_count"] == "1"
    assert float(samples["pylora_pool_load_seconds_sum"]) > 0
    assert text.endswith("\n")
    assert text.count("# TYPE") == 12

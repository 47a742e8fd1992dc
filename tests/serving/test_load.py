"""Many adapters behind few slots, and many threads at once."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pylora import LoraConfig
from pylora.serving import (
    AdapterFileError,
    AdapterInUseError,
    AdapterPool,
    AttachedPool,
    LayerShape,
    NoFreeSlotError,
    PoolSpec,
    UnknownAdapterError,
)

WIDTH, NUM_LAYERS, RANK = 8, 8, 4
SPEC = PoolSpec({f"layers.{i}.lin": LayerShape(WIDTH, WIDTH) for i in range(NUM_LAYERS)})


def write_adapter(folder: Path, seed: int) -> Path:
    """Factors that follow from the seed, so that what an adapter has to give can be said without its file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(NUM_LAYERS):
        stem = f"base_model.model.layers.{i}.lin"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["lin"]).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(WIDTH, WIDTH, bias=False)


class Model(torch.nn.Module):
    """Layers side by side: the output shows each layer's adapter by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([block.lin(x) for block in self.layers], -2)


def expected(seed: int, x: torch.Tensor) -> torch.Tensor:
    """[layers, WIDTH]: B A x of each layer of the adapter of that seed."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(NUM_LAYERS):
        a = torch.randn(RANK, WIDTH, generator=generator)
        out.append(torch.randn(WIDTH, RANK, generator=generator) @ (a @ x))
    return torch.stack(out)


def test_two_thousand_adapters_behind_64_slots(tmp_path: Path) -> None:
    """A zipf load in batches of 16: every row equals its adapter alone, base rows are untouched."""
    count, rng = 2000, random.Random(0)
    pool = AdapterPool(SPEC, 64, RANK)
    for i in range(count):
        pool.register(f"a{i}", write_adapter(tmp_path / str(i), i))
    model = Model()
    attached = AttachedPool(model, pool)
    weights = [(i + 1) ** -1.2 for i in range(count)]
    served: set[int] = set()
    for _ in range(100):
        chosen = [*rng.choices(range(count), weights, k=15), -1]
        x = torch.randn(16, WIDTH)
        slots = pool.acquire([None if i == -1 else f"a{i}" for i in chosen])
        with torch.inference_mode(), attached.rows(slots):
            y = model(x)
        pool.release(slots)
        assert not y[-1].any()
        for row, seed in enumerate(chosen[:-1]):
            torch.testing.assert_close(y[row], expected(seed, x[row]), atol=1e-5, rtol=1e-5)
        served.update(chosen)
    stats = pool.stats()
    assert stats.hits + stats.misses == 1500
    assert stats.hits > stats.misses > 200
    assert stats.resident == 64
    assert stats.evictions == stats.misses - 64
    assert stats.in_use == stats.failed_loads == 0
    assert len(served) > 150


@pytest.fixture
def seconds() -> float:
    """How long the threads go on: three seconds, or what PYLORA_STRESS_SECONDS says."""
    return float(os.environ.get("PYLORA_STRESS_SECONDS", "3"))


@pytest.fixture
def errors() -> Iterator[list[BaseException]]:
    """What the threads of a test caught; the test fails with the first of it."""
    caught: list[BaseException] = []
    yield caught
    if caught:
        raise caught[0]


class Versions:
    """What the adapters' names stand for, as the threads of the test change it.

    A version's number goes into its seed, so that no two versions and no two adapters give the same output. A call that
    began before another ended may have come before or after it, so that what a request may get is a span of versions.
    """

    def __init__(self, pool: AdapterPool, folder: Path, count: int) -> None:
        self._pool, self._folder, self.count = pool, folder, count
        self._begun, self._done = [0] * count, [0] * count
        self._locks = [threading.Lock() for _ in range(count)]
        for i in range(count):
            pool.register(f"a{i}", self._write(i, 0))

    def seed(self, i: int, version: int) -> int:
        return i + self.count * version

    def done(self, i: int) -> int:
        """The oldest version that a request from now on may get."""
        return self._done[i]

    def begun(self, i: int) -> int:
        """The newest version that a request until now may have got."""
        return self._begun[i]

    def _write(self, i: int, version: int) -> Path:
        return write_adapter(self._folder / f"a{i}" / str(version), self.seed(i, version))

    def replace(self, i: int) -> None:
        """Make a new version and delete the old one's files; without a free slot the old one stays."""
        with self._locks[i]:
            version = self._begun[i] + 1
            folder = self._write(i, version)
            self._begun[i] = version
            try:
                self._pool.replace(f"a{i}", folder)
            except NoFreeSlotError:
                self._begun[i] -= 1  # nobody can have got it
                raise
            self._done[i] = version
            shutil.rmtree(self._folder / f"a{i}" / str(version - 1))

    def replace_by_nothing(self, i: int) -> None:
        """A replacement that fails in the middle: the version stays what it was."""
        with pytest.raises((AdapterFileError, NoFreeSlotError)):
            self._pool.replace(f"a{i}", self._folder / "nothing")


class Users:
    """Threads that serve. Counts are per thread, so that no lock of the test orders what the pool does."""

    def __init__(self, pool: AdapterPool, versions: Versions, count: int) -> None:
        self.served, self.refused = [0] * count, [0] * count
        self.spans = 0  # how often more than one version was allowed
        self._pool, self._versions, self._model = pool, versions, Model()
        self._attached = AttachedPool(self._model, pool)

    def serve(self, which: int, rng: random.Random) -> None:
        """A batch of two adapters and a base row, computed twice while its slots are held."""
        chosen = rng.choices(range(self._versions.count), k=2)
        oldest = [self._versions.done(i) for i in chosen]
        try:
            slots = self._pool.acquire([*(f"a{i}" for i in chosen), None])
        except NoFreeSlotError:
            self.refused[which] += 1
            return
        newest = [self._versions.begun(i) for i in chosen]
        x = torch.randn(3, WIDTH)
        with torch.inference_mode(), self._attached.rows(slots):
            first = self._model(x)
            time.sleep(0.0005)  # a replacement or an eviction may come here
            assert torch.equal(self._model(x), first), "a slot in use has changed"
        self._pool.release(slots)
        assert not first[2].any(), "a base row has an adapter's output"
        for row, i in enumerate(chosen):
            span = range(oldest[row], newest[row] + 1)
            self.spans += len(span) > 1
            rights = [expected(self._versions.seed(i, version), x[row]) for version in span]
            assert any(torch.allclose(first[row], right, atol=1e-4) for right in rights), (
                f"a row of a{i} has none of the versions {list(span)}"
            )
        self.served[which] += 1


def test_threads_that_serve_load_evict_replace_and_prefetch(
    tmp_path: Path, seconds: float, errors: list[BaseException]
) -> None:
    """Every row has the version that its name stood for when its slot was acquired, and keeps it while it is held."""
    num_slots, num_users = 5, 3
    pool = AdapterPool(SPEC, num_slots, RANK)
    versions = Versions(pool, tmp_path, 12)
    users = Users(pool, versions, num_users)
    end = time.monotonic() + seconds
    refused = [0] * 2

    def change(which: int, rng: random.Random) -> None:
        i = rng.randrange(versions.count)
        changes: list[Callable[[], object]] = [
            lambda: pool.evict(f"a{i}"),
            lambda: pool.load(f"a{i}"),
            lambda: versions.replace(i),
            lambda: versions.replace_by_nothing(i),
            lambda: [future.exception() for future in pool.prefetch([f"a{i}", "unknown"])],
            lambda: (pool.pin(f"a{i}"), pool.unpin(f"a{i}")),
            lambda: pool.stats().prometheus(),
        ]
        try:
            rng.choice(changes)()
        except (AdapterInUseError, NoFreeSlotError):
            refused[which] += 1

    def guarded(work: Callable[[int, random.Random], None], which: int) -> threading.Thread:
        def run() -> None:
            rng = random.Random(f"{work.__name__} {which}")
            try:
                while time.monotonic() < end and not errors:
                    work(which, rng)
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    threads = [guarded(users.serve, which) for which in range(num_users)] + [guarded(change, k) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    assert not any(thread.is_alive() for thread in threads)
    pool.close()
    if errors:
        return
    stats = pool.stats()
    assert min(users.served) > 5
    assert sum(versions.done(i) for i in range(versions.count)) > 5
    assert stats.in_use == stats.pinned == 0
    assert stats.registered == versions.count
    slots = pool.acquire([f"a{i}" for i in range(num_slots)])  # every slot can still be had
    assert sorted(slots) == list(range(num_slots))
    with pytest.raises(UnknownAdapterError):
        pool.load("unknown")

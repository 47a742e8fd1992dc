"""Adapters on disk, the recently used ones in slots, ready for batches that mix them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from pylora.checkpoint.safetensors_file import ReadingMemory
from pylora.serving.adapter_file import read_adapter
from pylora.serving.errors import NoFreeSlotError, UnknownAdapterError
from pylora.serving.metrics import PoolStats
from pylora.serving.slots import SlotTable
from pylora.serving.spec import PoolSpec
from pylora.serving.stacks import LayerStack, Stacks, slot_bytes

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

logger = logging.getLogger(__name__)

BASE = "__base__"
"""Stands for no adapter, as in PEFT's mixed batches. None does too."""

StrPath = str | os.PathLike[str]


class _Source:
    """Where an adapter's files are. Two sources are the same only if they are one object: a replacement is another."""

    def __init__(self, path: StrPath) -> None:
        self.path = os.path.abspath(os.fspath(path))


class AdapterPool:
    """Keeps adapters in a fixed number of slots and their files at hand.

    Thread-safe. Files are read and copied outside the lock, into a slot that nobody can find yet, so a load stops
    neither requests in flight nor other loads.

    Args:
        model_or_spec: the base model (all dense layers but the output embedding), or a `PoolSpec`.
        num_slots: how many adapters are ready at a time.
        max_rank: the largest rank of an adapter.
        dtype: of the factors in the slots; files of another one are converted.
        byte_budget: bytes that the stacks may take; `num_slots` is lowered to fit.

    Raises:
        ValueError: a number below 1, a dtype that is no floating point one, or a budget below one slot.
    """

    def __init__(
        self,
        model_or_spec: nn.Module | PoolSpec,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        byte_budget: int | None = None,
    ) -> None:
        for name, value in (("num_slots", num_slots), ("max_rank", max_rank)):
            if value < 1:
                raise ValueError(f"AdapterPool: {name}: expected at least 1, got {value}")
        if not dtype.is_floating_point:
            raise ValueError(f"AdapterPool: dtype: expected a floating point dtype, got {dtype}")
        self.spec = model_or_spec if isinstance(model_or_spec, PoolSpec) else PoolSpec.from_model(model_or_spec)
        self.max_rank = max_rank
        self.dtype = dtype
        self._slot_bytes = slot_bytes(self.spec.layers, max_rank, dtype)
        if byte_budget is not None:
            num_slots = min(num_slots, byte_budget // self._slot_bytes)
            if num_slots < 1:
                raise ValueError(
                    f"AdapterPool: byte_budget: expected {self._slot_bytes} or more (a slot), got {byte_budget}"
                )
        self.num_slots = num_slots
        self._stacks = Stacks(self.spec.layers, num_slots, max_rank, dtype)
        self._changed = threading.Condition()  # guards everything below
        self._table = SlotTable(num_slots)
        self._sources: dict[str, _Source] = {}
        self._bytes = [0] * num_slots
        self._counts = PoolStats(num_slots=num_slots, capacity_bytes=num_slots * self._slot_bytes)
        self._worker: ThreadPoolExecutor | None = None
        self._memories: list[ReadingMemory] = []  # for files to read; as many as were read at once

    # Names and files

    def register(self, name: str, path: StrPath) -> None:
        """Make an adapter known. It is loaded when a request first asks for it.

        Raises:
            ValueError: the name stands for the base model, or has another path already (`replace` changes it).
        """
        source = _Source(path)
        with self._changed:
            self._register(name, source)

    def _register(self, name: str, source: _Source) -> None:
        if name == BASE:
            raise ValueError(f"register: name: {BASE!r} stands for the base model")
        known = self._sources.setdefault(name, source)
        if known.path != source.path:
            raise ValueError(f"register: name: adapter {name!r} is known with the path {known.path!r}; use replace")

    def load(self, name: str, path: StrPath | None = None) -> None:
        """Bring an adapter into a slot.

        Args:
            name: what requests call it.
            path: its local folder; None for one that is registered. A new name is not kept where loading fails.

        Raises:
            UnknownAdapterError: no path, and the name is not registered.
            ValueError: as `register`.
            NoFreeSlotError: every slot is in use or pinned.
            AdapterFileError, AdapterMismatchError, UnsupportedFeatureError: as `read_adapter`.
        """
        source = None if path is None else _Source(path)
        with self._changed:
            is_new = source is not None and name not in self._sources
            if source is not None:
                self._register(name, source)
        try:
            self.release([self._obtain(name)])
        except Exception:
            with self._changed:
                if is_new and self._sources.get(name) is source:
                    del self._sources[name]
            raise

    def replace(self, name: str, path: StrPath) -> None:
        """Give an adapter other files. Requests in flight finish on the old ones; later ones get the new.

        The new adapter is loaded into another slot first. Where that fails, the old one stays.

        Raises: as `load`.
        """
        source = _Source(path)
        with self._changed:
            slot = None
            while slot is None:
                known = self._known(name)
                if self._table.is_loading(name):
                    self._changed.wait()
                else:
                    slot = self._claim(name)
        self._fill(slot, source)
        with self._changed:
            if self._sources.get(name) is not known:
                self._abandon(slot)
                raise UnknownAdapterError(f"replace: adapter {name!r} was removed meanwhile")
            self._sources[name] = source
            self._table.commit(slot)
            self._changed.notify_all()

    def remove(self, name: str) -> None:
        """Forget an adapter and its path. Requests in flight finish; its slot is free after them.

        Raises:
            UnknownAdapterError: it is not known.
        """
        with self._changed:
            self._known(name)
            del self._sources[name]
            self._table.unpin(name)
            if self._table.slot_of(name) is not None:
                self._table.retire(name)
            self._changed.notify_all()

    def _known(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            raise UnknownAdapterError(f"unknown adapter {name!r}: {len(self._sources)} are registered")
        return source

    # Slots

    def acquire(self, names: Sequence[str | None]) -> list[int]:
        """Bring adapters into slots and hold them there until `release`.

        Args:
            names: one for each request; the same one may stand several times. None and "__base__": no adapter.

        Returns:
            the slot of each, -1 for no adapter. A slot counts one user for each time it stands here.

        Raises:
            UnknownAdapterError, NoFreeSlotError, AdapterFileError, AdapterMismatchError, UnsupportedFeatureError: of
                the first adapter that cannot be had. None is held then.
        """
        slots: list[int] = []
        try:
            for name in names:
                slots.append(-1 if name is None or name == BASE else self._obtain(name))
        except BaseException:
            self.release(slots)
            raise
        return slots

    def release(self, slots: Iterable[int]) -> None:
        """Give back what `acquire` returned; -1 is passed over.

        Raises:
            ValueError: a slot has fewer users than that. Nothing is given back then.
        """
        held = [slot for slot in slots if slot != -1]
        with self._changed:
            self._table.drop(held)
            self._changed.notify_all()

    def _obtain(self, name: str) -> int:
        """The slot of an adapter, with one more user."""
        is_first_look = True
        while True:
            with self._changed:
                source = self._known(name)
                is_ready = self._table.slot_of(name) is not None
                if is_first_look:
                    self._counts.hits += is_ready
                    self._counts.misses += not is_ready
                    is_first_look = False
                if is_ready:
                    return self._table.hold(name)
                if self._table.is_loading(name):
                    self._changed.wait()
                    continue
                slot = self._claim(name)
                if slot is None:
                    continue
            self._fill(slot, source)
            with self._changed:
                if self._sources.get(name) is not source:  # removed or replaced meanwhile: these are the wrong files
                    self._abandon(slot)
                    continue
                self._table.commit(slot)
                self._changed.notify_all()
                return self._table.hold(name)

    def _claim(self, name: str) -> int | None:
        """A slot to load into, under the lock; None after a wait for other loads, when all has to be looked at anew."""
        try:
            slot, evicted = self._table.claim(name)
        except NoFreeSlotError:
            if not self._table.any_loading:
                raise
            self._changed.wait()
            return None
        self._counts.evictions += evicted is not None
        return slot

    def _abandon(self, slot: int) -> None:
        self._table.abandon(slot)
        self._changed.notify_all()

    def _fill(self, slot: int, source: _Source) -> None:
        """Read an adapter into a claimed slot, without the lock. The slot is free again where that fails."""
        start = time.perf_counter()
        try:
            memory = self._take_memory()
            written = self._stacks.write(slot, read_adapter(source.path, self.spec.layers, self.max_rank, memory))
        except BaseException:
            with self._changed:
                self._counts.failed_loads += 1
                self._abandon(slot)
            raise
        with self._changed:
            self._memories.append(memory)
            self._bytes[slot] = written
            self._counts.load_times.add(time.perf_counter() - start)

    def _take_memory(self) -> ReadingMemory:
        with self._changed:
            return self._memories.pop() if self._memories else ReadingMemory()

    def pin(self, name: str) -> None:
        """Load an adapter if need be, and keep it in its slot until `unpin`. Raises: as `load` without a path."""
        slot = self._obtain(name)
        try:
            with self._changed:
                self._table.pin(name)
        finally:
            self.release([slot])

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again. Nothing happens where it is not pinned."""
        with self._changed:
            self._table.unpin(name)

    def evict(self, name: str) -> bool:
        """Free an adapter's slot. It stays registered and is loaded again when asked for.

        Returns:
            whether it was in a slot.

        Raises:
            UnknownAdapterError: it is not known.
            AdapterInUseError: requests in flight use it, or it is pinned. It stays.
        """
        with self._changed:
            self._known(name)
            was_there = self._table.evict(name)
            self._counts.evictions += was_there
            self._changed.notify_all()
            return was_there

    def prefetch(self, names: Iterable[str]) -> list[Future[None]]:
        """Load adapters on a background thread, in this order.

        Returns:
            a future for each. What goes wrong is logged and raised by its `result()`; the other loads go on.
        """
        with self._changed:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="pylora-prefetch")
            worker = self._worker
        return [worker.submit(self._prefetch, name) for name in names]

    def _prefetch(self, name: str) -> None:
        try:
            self.load(name)
        except Exception as error:
            logger.warning("prefetch of adapter %r failed: %s", name, error)
            raise

    # What is there

    @property
    def layers(self) -> dict[str, LayerStack]:
        """The stacks by layer, for the ops."""
        return self._stacks.layers

    @property
    def registered(self) -> list[str]:
        """Names with a path."""
        with self._changed:
            return list(self._sources)

    @property
    def resident(self) -> list[str]:
        """Names in slots, least recently used first."""
        with self._changed:
            return self._table.resident

    def stats(self) -> PoolStats:
        """The pool's state and counts; `stats().prometheus()` is their text for Prometheus."""
        with self._changed:
            ready = self._table.resident
            slots = [slot for name in ready if (slot := self._table.slot_of(name)) is not None]
            return PoolStats(
                hits=self._counts.hits,
                misses=self._counts.misses,
                evictions=self._counts.evictions,
                failed_loads=self._counts.failed_loads,
                num_slots=self.num_slots,
                resident=len(ready),
                in_use=sum(self._table.users(slot) > 0 for slot in range(self.num_slots)),
                pinned=len(self._table.pinned),
                registered=len(self._sources),
                resident_bytes=sum(self._bytes[slot] for slot in slots),
                capacity_bytes=self._counts.capacity_bytes,
                load_times=self._counts.load_times.copy(),
            )

    def close(self) -> None:
        """End the background thread. Loads that have not begun are cancelled."""
        with self._changed:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

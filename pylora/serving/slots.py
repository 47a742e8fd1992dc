"""Which adapter is in which slot, who uses it, and which one goes next. Names and numbers only: no tensors, no locks.

The life of a slot::

    free --claim--> loading --commit--> ready --evict or claim by another--> free
                       |                  |
                       +--abandon--> free +--replaced or removed--> retired --last drop--> free

A name is found only in a ready slot. A retired slot serves those who hold it and nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from pylora.serving.errors import AdapterInUseError, NoFreeSlotError, UnknownAdapterError


@dataclass
class _Slot:
    name: str
    users: int = 0


class SlotTable:
    """The slots of a pool. Every method either does all it says or raises and changes nothing.

    Args:
        num_slots: how many there are.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"SlotTable: num_slots: expected at least 1, got {num_slots}")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._loading: dict[int, str] = {}
        self._ready: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._slots: dict[int, _Slot] = {}  # ready and retired ones
        self._pinned: set[str] = set()

    def slot_of(self, name: str) -> int | None:
        """The ready slot of an adapter."""
        return self._ready.get(name)

    def is_loading(self, name: str) -> bool:
        """Whether a slot is being filled for it."""
        return name in self._loading.values()

    @property
    def any_loading(self) -> bool:
        """Whether any slot is being filled."""
        return bool(self._loading)

    @property
    def resident(self) -> list[str]:
        """Names in ready slots, least recently used first."""
        return list(self._ready)

    @property
    def pinned(self) -> frozenset[str]:
        """Pinned names."""
        return frozenset(self._pinned)

    def users(self, slot: int) -> int:
        """How many hold a slot."""
        return self._slots[slot].users if slot in self._slots else 0

    def claim(self, name: str) -> tuple[int, str | None]:
        """Take a slot to load `name` into: a free one, else that of the least recently used adapter nobody holds.

        Returns:
            the slot, and the adapter that had to leave it.

        Raises:
            NoFreeSlotError: every slot is held, pinned, retired with users, or being loaded into.
        """
        evicted = None
        if not self._free:
            evicted = next((each for each in self._ready if self._is_idle(each)), None)
            if evicted is None:
                raise NoFreeSlotError(f"no slot for adapter {name!r}: {self._describe()}")
            self._free_ready(evicted)
        slot = self._free.pop()
        self._loading[slot] = name
        return slot, evicted

    def commit(self, slot: int) -> None:
        """The adapter is in its slot: it is found there from now on. A slot that had it before is retired."""
        name = self._loading.pop(slot)
        if name in self._ready:
            self.retire(name)
        self._ready[name] = slot
        self._slots[slot] = _Slot(name)

    def abandon(self, slot: int) -> None:
        """Loading failed: the slot is free again."""
        del self._loading[slot]
        self._free.append(slot)

    def hold(self, name: str) -> int:
        """Count one more user of a ready adapter, which is the most recently used one from now on.

        Raises:
            UnknownAdapterError: it is not in a ready slot.
        """
        slot = self._ready.get(name)
        if slot is None:
            raise UnknownAdapterError(f"adapter {name!r} is in no slot")
        self._ready.move_to_end(name)
        self._slots[slot].users += 1
        return slot

    def drop(self, slots: list[int]) -> None:
        """Count one user less for each entry. A retired slot becomes free with its last user.

        Raises:
            ValueError: a slot has fewer users than it is named here.
        """
        for slot in set(slots):
            if slots.count(slot) > self.users(slot):
                raise ValueError(
                    f"release: slots: expected a slot in use, got {slot} {slots.count(slot)} times with "
                    f"{self.users(slot)} users"
                )
        for slot in slots:
            entry = self._slots[slot]
            entry.users -= 1
            if not entry.users and self._ready.get(entry.name) != slot:
                del self._slots[slot]
                self._free.append(slot)

    def pin(self, name: str) -> None:
        """Keep a ready adapter, and what replaces it, from being evicted."""
        if name not in self._ready:
            raise UnknownAdapterError(f"pin: adapter {name!r} is in no slot")
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Undo `pin`; nothing happens where it was not pinned."""
        self._pinned.discard(name)

    def evict(self, name: str) -> bool:
        """Free the slot of an adapter that nobody holds.

        Returns:
            whether it had one.

        Raises:
            AdapterInUseError: it is held or pinned.
        """
        slot = self._ready.get(name)
        if slot is None:
            return False
        if not self._is_idle(name):
            why = "it is pinned" if name in self._pinned else f"{self.users(slot)} requests in flight use it"
            raise AdapterInUseError(f"evict: adapter {name!r} stays in slot {slot}: {why}")
        self._free_ready(name)
        return True

    def retire(self, name: str) -> None:
        """Let a ready adapter be found no more. Its slot becomes free when nobody holds it. A pin stays."""
        slot = self._ready.pop(name)
        if not self._slots[slot].users:
            del self._slots[slot]
            self._free.append(slot)

    def _is_idle(self, name: str) -> bool:
        return name not in self._pinned and not self._slots[self._ready[name]].users

    def _free_ready(self, name: str) -> None:
        slot = self._ready.pop(name)
        del self._slots[slot]
        self._free.append(slot)

    def _describe(self) -> str:
        held = sum(1 for entry in self._slots.values() if entry.users)
        return (
            f"of {self.num_slots} slots, {held} are in use, {len(self._pinned)} adapters are pinned and "
            f"{len(self._loading)} are being loaded"
        )

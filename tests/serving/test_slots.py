"""The slot table against a model of it: a few dictionaries that say the same in the plainest way."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pylora.serving.errors import AdapterInUseError, NoFreeSlotError, UnknownAdapterError
from pylora.serving.slots import SlotTable

NAMES = st.sampled_from("abcdef")
NUM_SLOTS = 3


class Machine(RuleBasedStateMachine):
    """Keeps per slot what is in it and how many hold it, and per name when it was last used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(NUM_SLOTS)
        self.ready: dict[str, int] = {}
        self.order: list[str] = []  # least recently used first
        self.loading: dict[int, str] = {}
        self.users: dict[int, int] = {}  # of ready and retired slots
        self.pinned: set[str] = set()

    def free(self) -> set[int]:
        return set(range(NUM_SLOTS)) - set(self.users) - set(self.loading)

    def idle(self) -> list[str]:
        return [name for name in self.order if name not in self.pinned and not self.users[self.ready[name]]]

    def forget(self, name: str) -> None:
        slot = self.ready.pop(name)
        self.order.remove(name)
        if not self.users[slot]:
            del self.users[slot]

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        if name in self.loading.values():
            return  # a pool never loads one name twice at a time
        free, idle = self.free(), self.idle()
        if not free and not idle:
            with pytest.raises(NoFreeSlotError, match=f"no slot for adapter '{name}': of 3 slots"):
                self.table.claim(name)
            return
        slot, evicted = self.table.claim(name)
        if free:
            assert slot in free
            assert evicted is None
        else:
            assert evicted == idle[0]
            assert slot == self.ready[idle[0]]
            self.forget(idle[0])
        self.loading[slot] = name

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), succeeds=st.booleans())
    def finish(self, data: st.DataObject, succeeds: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.loading)))
        name = self.loading.pop(slot)
        if not succeeds:
            self.table.abandon(slot)
            return
        self.table.commit(slot)
        if name in self.ready:
            self.forget(name)
        self.ready[name] = slot
        self.order.append(name)
        self.users[slot] = 0

    @rule(name=NAMES)
    def hold(self, name: str) -> None:
        if name not in self.ready:
            with pytest.raises(UnknownAdapterError, match="is in no slot"):
                self.table.hold(name)
            return
        assert self.table.hold(name) == self.ready[name]
        self.users[self.ready[name]] += 1
        self.order.remove(name)
        self.order.append(name)

    @rule(slots=st.lists(st.integers(0, NUM_SLOTS - 1), max_size=3))
    def drop(self, slots: list[int]) -> None:
        if any(slots.count(slot) > self.users.get(slot, 0) for slot in slots):
            with pytest.raises(ValueError, match="release: slots: expected a slot in use"):
                self.table.drop(slots)
            return
        self.table.drop(slots)
        for slot in slots:
            self.users[slot] -= 1
            if not self.users[slot] and slot not in self.ready.values():
                del self.users[slot]

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name not in self.ready:
            with pytest.raises(UnknownAdapterError):
                self.table.pin(name)
            return
        self.table.pin(name)
        self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        self.table.unpin(name)
        self.pinned.discard(name)

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        if name not in self.ready:
            assert not self.table.evict(name)
        elif name in self.idle():
            assert self.table.evict(name)
            self.forget(name)
        else:
            with pytest.raises(AdapterInUseError, match=r"pinned|in flight"):
                self.table.evict(name)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ready)))
        self.table.retire(name)
        self.forget(name)

    @invariant()
    def same(self) -> None:
        assert self.table.resident == self.order
        assert {name: self.table.slot_of(name) for name in self.order} == self.ready
        assert [self.table.users(slot) for slot in range(NUM_SLOTS)] == [
            self.users.get(slot, 0) for slot in range(NUM_SLOTS)
        ]
        assert self.table.any_loading == bool(self.loading)
        assert self.table.pinned == self.pinned
        assert len(set(self.ready.values())) == len(self.ready)


TestSlotTable = Machine.TestCase
TestSlotTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="num_slots: expected at least 1, got 0"):
        SlotTable(0)


def test_a_replaced_adapter_keeps_its_slot_until_its_last_user_is_gone() -> None:
    table = SlotTable(2)
    old, _ = table.claim("a")
    table.commit(old)
    table.hold("a")
    table.hold("a")
    new, _ = table.claim("a")
    table.commit(new)
    assert table.slot_of("a") == new != old
    table.hold("a")
    table.drop([old])
    with pytest.raises(NoFreeSlotError, match="of 2 slots, 2 are in use"):
        table.claim("b")
    table.drop([old])
    assert table.claim("b") == (old, None)

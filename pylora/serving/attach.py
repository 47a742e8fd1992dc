"""Ties a pool to the dense layers of a model, which stays as it is but for a hook on each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from pylora.serving.errors import AdapterMismatchError
from pylora.serving.plan import PackedPlan, RowPlan
from pylora.serving.pool import AdapterPool
from pylora.serving.spec import shape_of
from pylora.serving.stacks import LayerStack


class AttachedPool:
    """A model whose forward adds, for each row of the batch, the adapter that its request asked for.

    Outside `rows` and `packed` the model computes as before. Module names, parameters and state dict are never changed.
    Each thread has a batch of its own.

    Args:
        model: the base model.
        pool: its adapters.

    Raises:
        AdapterMismatchError: the model lacks a layer of the pool, or has it with other widths. Nothing is attached.
    """

    def __init__(self, model: nn.Module, pool: AdapterPool) -> None:
        self.model = model
        self.pool = pool
        self._plan: ContextVar[RowPlan | PackedPlan | None] = ContextVar("pylora_row_plan", default=None)
        modules = dict(model.named_modules())
        for name, shape in pool.spec.layers.items():
            found = shape_of(modules.get(name))
            if found != shape:
                raise AdapterMismatchError(f"{name}: expected a dense layer of {shape}, got {found} in the model")
        self._hooks = [
            modules[name].register_forward_hook(partial(self._add, name, stack)) for name, stack in pool.layers.items()
        ]

    def _add(self, name: str, stack: LayerStack, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        plan = self._plan.get()
        if plan is None or plan.is_base:
            return None
        if y.is_contiguous():
            plan.add_rows(name, y, args[0], stack)
            return None
        y = y.contiguous()
        plan.add_rows(name, y, args[0], stack)
        return y

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Inside, row i of every batch uses `slots[i]`, as `AdapterPool.acquire` returned them; -1 for no adapter.

        Who calls it holds the slots until it is over.

        Raises:
            ValueError: a slot that the pool does not have.
        """
        self._check(slots)
        with self._using(RowPlan(slots)):
            yield

    @contextmanager
    def packed(self, slots: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
        """Inside, every batch is one row of tokens: `lengths[i]` of them, side by side, use `slots[i]`.

        Who calls it holds the slots until it is over.

        Raises:
            ValueError: a slot that the pool does not have.
        """
        self._check(slots)
        with self._using(PackedPlan(slots, lengths)):
            yield

    def _check(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not -1 <= slot < self.pool.num_slots:
                raise ValueError(f"rows: slots: expected slots from -1 to {self.pool.num_slots - 1}, got {slot}")

    @contextmanager
    def _using(self, plan: RowPlan | PackedPlan) -> Iterator[None]:
        token = self._plan.set(plan)
        try:
            yield
        finally:
            self._plan.reset(token)

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

"""What `isinstance(model, peft.PeftModel)` is told; the alternatives are in docs/decisions/0005-isinstance-peft.md."""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from typing import Any

from pylora.layers import BaseTunerLayer

_TRUE_CLASS: Any = object.__dict__["__class__"]


class AnswersAsPeft:
    """Mixin of `PeftModel`: once PEFT is imported, its objects pass for PEFT's in `isinstance`.

    `type(model)` is pylora's class always. `model.__class__`, which `isinstance` asks too, is a class made from that
    one and PEFT's of the same name: it has the name and the methods of pylora's, and is never instantiated. PEFT is not
    imported for it.
    """

    @property
    def __class__(self) -> Any:
        return _answer(type(self))

    @__class__.setter
    def __class__(self, value: type) -> None:  # torch's fully_shard and parametrizations set it
        _TRUE_CLASS.__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object's, but for `copyreg.__newobj__`, which pickle lets through only with the `__class__`."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if isinstance(reduced, tuple) and reduced[0] is getattr(copyreg, "__newobj__"):  # noqa: B009 (mypy has none)
            return (_new, *reduced[1:])
        return reduced


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _answer(cls: type) -> type:
    theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
    return cls if theirs is None or issubclass(cls, theirs) else _both(cls, theirs)


@functools.cache
def _both(cls: type, theirs: type) -> type:
    """The class that `cls` and PEFT's of its name, or of the nearest base's, have in common."""
    peft = sys.modules["peft"]
    named = next((getattr(peft, each.__name__) for each in cls.__mro__ if hasattr(peft, each.__name__)), theirs)
    # TRL refuses adapters on the output layer, which it computes without calling, by asking for this class.
    importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer.register(BaseTunerLayer)
    attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, named), attributes)

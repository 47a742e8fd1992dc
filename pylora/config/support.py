"""Which configured mechanisms pylora does not have yet.

Any LoraConfig can be built, read and written. Applying one to a model first goes through `require_supported`, so that
nothing a configuration asks for is silently left out. The change that brings a mechanism deletes its row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pylora.errors import UnsupportedFeatureError


def _given(value: Any) -> bool:
    return value is not None


# Schemes that PEFT has and `pylora.init` does not, by PEFT's spelling rules. Unknown names the registry refuses.
_LATER_INIT = re.compile(r"corda.*|(?i:mica)|eva|lora_ga")


def _is_later_init(scheme: Any) -> bool:
    return isinstance(scheme, str) and _LATER_INIT.fullmatch(scheme) is not None


# (attribute of the configuration, whether a value asks for the missing mechanism)
_MISSING: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("init_lora_weights", _is_later_init),
    ("lora_ga_config", _given),
    ("megatron_config", bool),
    ("velora_config", _given),
    ("use_qalora", bool),
    ("monteclora_config", _given),
    ("use_bdlora", _given),
    ("arrow_config", _given),
    ("kasa_config", _given),
)


# Schemes whose adapters, once trained, are plain LoRA on an unchanged base weight. MiCA also keeps B from training.
_PLAIN_ONCE_TRAINED = ("eva", "lora_ga")


@contextmanager
def as_trained(config: Any) -> Iterator[None]:
    """For the time of a load, ask for the default start where the file's weights make a missing one needless.

    Afterwards the configuration is what it was. A base weight that a scheme changes has to be changed all the same, so
    those schemes are asked for as they are.
    """
    scheme = getattr(config, "init_lora_weights", None)
    plain = scheme in _PLAIN_ONCE_TRAINED or (str(scheme).lower() == "mica" and config.inference_mode)
    if not plain:
        yield
        return
    settings = config.lora_ga_config
    config.init_lora_weights, config.lora_ga_config = True, None
    try:
        yield
    finally:
        config.init_lora_weights, config.lora_ga_config = scheme, settings


def require_supported(config: Any) -> None:
    """Check that pylora has a mechanism for everything that `config` asks for.

    Raises:
        UnsupportedFeatureError: it has not; the message names the first such field and its value.
    """
    for name, asks_for_it in _MISSING:
        value = getattr(config, name, None)
        if asks_for_it(value):
            raise UnsupportedFeatureError(
                f"{type(config).__name__}: {name}={value!r}: pylora has no mechanism for this yet"
            )


# Schemes whose adapters belong to a base weight from which they have taken something.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def belongs_to_changed_base(config: Any) -> bool:
    """Whether an adapter of this configuration fits no untouched base: its initialisation changed the weights."""
    scheme = getattr(config, "init_lora_weights", True)
    return isinstance(scheme, str) and scheme.startswith(_CHANGES_BASE)

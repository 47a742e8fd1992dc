"""Which configured mechanisms pylora does not have yet.

Any LoraConfig can be built, read and written. Applying one to a model first goes through `require_supported`, so that
nothing a configuration asks for is silently left out. The change that brings a mechanism deletes its row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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

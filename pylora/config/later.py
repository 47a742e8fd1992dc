"""Names of PEFT's LoRA whose mechanisms pylora does not have yet, for code that imports them beside those it uses.

Each is a class, so that `isinstance` and annotations work; making an instance, or calling what PEFT has as a function,
raises. The change that brings a mechanism takes its names out of here, as it takes its row out of `support.py`.
"""

from __future__ import annotations

from typing import Any, NoReturn

from pylora.errors import UnsupportedFeatureError

LATER = frozenset(
    (
        "ArrowLinearVariant",
        "BdLoraLinearVariant",
        "KasaLinearVariant",
        "MiCAEmbeddingVariant",
        "MiCALinearVariant",
        "MontecloraLinearVariant",
        "MontecloraSampler",
        "MontecloraTrainerMixin",
        "QALoraLinearVariant",
        "VeloraLinearVariant",
        "create_arrow_model",
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
        "replace_lora_weights_loftq",
    )
)


class _Later(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedFeatureError(f"{cls.__name__}: pylora has no mechanism for this yet")


def __getattr__(name: str) -> type:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _Later(name, (), {"__module__": __name__, "__doc__": "Not in pylora yet; see pylora/config/later.py."})
    globals()[name] = value
    return value

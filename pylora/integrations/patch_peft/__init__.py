"""pylora's kernels under PEFT's own models: `patch_peft()`, and `unpatch_peft()` to take it back.

Methods of PEFT's classes are replaced, so that models that exist, and code that calls PEFT itself (transformers, TRL,
diffusers), compute by pylora's ops. The replacements are pylora's own methods, called with PEFT's layers, whose
attributes have the same names. What they do not serve goes to the methods that were there.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from typing import Any

from pylora.errors import PeftWarning
from pylora.integrations.patch_peft.replacements import Replacements

# Those that the tests have run with: layers of another version may ask something else of their methods. 0.20 and before
# scale the adapters twice in the `svd` combinations, where pylora's arithmetic would give another result.
PEFT_VERSIONS = ("0.21.0", "0.21.1", "0.21.2")

_changes = Replacements()
_lock = threading.Lock()


def patch_peft() -> bool:
    """Let PEFT's models compute by pylora's kernels, from here on and in the whole process.

    Served are `peft.tuners.lora.Linear` (nn.Linear and Conv1D) with plain LoRA and DoRA: forward, backward, dropout,
    batches with `adapter_names`; `merge`, `unmerge` and `merge_and_unload` of dense layers, embeddings and
    convolutions on the CPU; the arithmetic of `add_weighted_adapter`. All else, hooked and replaced modules among it,
    PEFT computes as before. Models, adapters and files stay PEFT's. Numerics are pylora's (docs/differences.md): sums
    are rounded once, and dropout drops other elements for the same seed.

    Returns:
        True, also where it has been called before. False, with a `PeftWarning`, and nothing is changed, where the
        installed PEFT is of a version that pylora does not know.

    Raises:
        ImportError: PEFT is not installed.
        PyloraBuildError: The native extension cannot be used.

    Call it before `torch.compile`: graphs that have been compiled keep the methods that they were compiled with.

    Example:
        >>> import peft, pylora
        >>> model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
        >>> pylora.patch_peft()
        >>> model(**batch).loss.backward()  # by pylora's ops
    """
    with _lock:
        if _changes:
            return True
        peft = importlib.import_module("peft")
        if peft.__version__ not in PEFT_VERSIONS:
            _warn(f"peft: expected version {' or '.join(PEFT_VERSIONS)}, got {peft.__version__}")
            return False
        try:
            _patch()
        except AttributeError as error:  # another library has changed these classes
            _changes.undo()
            _warn(str(error))
            return False
        except BaseException:
            _changes.undo()
            raise
        return True


def unpatch_peft() -> None:
    """Give PEFT its own methods back, the very objects; does nothing where `patch_peft` is not in effect.

    Adapters that are merged can be unmerged still, by PEFT's subtraction.
    """
    with _lock:
        if _changes:
            from pylora.integrations.patch_peft.merge import forget_merges

            _changes.undo()
            forget_merges()


def _warn(reason: str) -> None:
    warnings.warn(f"patch_peft: {reason}. PEFT stays as it is.", PeftWarning, stacklevel=3)


def _patch() -> None:
    from pylora.integrations.patch_peft.calls import patch_calls
    from pylora.integrations.patch_peft.dora import patch_dora
    from pylora.integrations.patch_peft.forward import patch_forward
    from pylora.integrations.patch_peft.merge import patch_merging
    from pylora.integrations.patch_peft.weighted import patch_weighted

    layer, model, variants, dora = (_module(f"tuners.lora.{name}") for name in ("layer", "model", "variants", "dora"))
    patch_dora(_changes, dora, variants)
    patch_forward(_changes, layer, variants)
    patch_merging(_changes, layer, variants, model)
    patch_weighted(_changes, model)
    patch_calls(_changes, _module("peft_model"), model)


def _module(name: str) -> Any:
    return importlib.import_module(f"peft.{name}")

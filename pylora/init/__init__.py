"""Initialisation of adapters: tensors in, filled in place."""

from pylora.init import basic, loftq, olora, orthogonal, pissa  # noqa: F401 (they register their schemes)
from pylora.init.base_update import as_it_will_be, at_end, base_updates_at_end
from pylora.init.left_out import draws_left_out
from pylora.init.registry import (
    BaseAccess,
    Factors,
    InitScheme,
    changes_base_weight,
    find_init,
    init_adapter,
    is_left_out,
    only_draws,
    register_init,
)
from pylora.init.truncated_svd import SingularTriplets, top_singular_triplets

__all__ = [
    "BaseAccess",
    "Factors",
    "InitScheme",
    "SingularTriplets",
    "as_it_will_be",
    "at_end",
    "base_updates_at_end",
    "changes_base_weight",
    "draws_left_out",
    "find_init",
    "init_adapter",
    "is_left_out",
    "only_draws",
    "register_init",
    "top_singular_triplets",
]

"""Serving many adapters on one base model: a pool of slots, and a runtime that mixes adapters in a batch."""

from pylora.serving.attach import AttachedPool
from pylora.serving.continuous import ContinuousRuntime
from pylora.serving.errors import (
    AdapterFileError,
    AdapterInUseError,
    AdapterMismatchError,
    NoFreeSlotError,
    PoolError,
    UnknownAdapterError,
)
from pylora.serving.metrics import LoadTimes, PoolStats
from pylora.serving.pool import BASE, AdapterPool
from pylora.serving.requests import Answer, Request, Token
from pylora.serving.runtime import ServingRuntime
from pylora.serving.spec import LayerShape, PoolSpec

__all__ = [
    "BASE",
    "AdapterFileError",
    "AdapterInUseError",
    "AdapterMismatchError",
    "AdapterPool",
    "Answer",
    "AttachedPool",
    "ContinuousRuntime",
    "LayerShape",
    "LoadTimes",
    "NoFreeSlotError",
    "PoolError",
    "PoolSpec",
    "PoolStats",
    "Request",
    "ServingRuntime",
    "Token",
    "UnknownAdapterError",
]

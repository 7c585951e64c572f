"""Every way to pass an argument that the figures compare: one class each, one registry.

To add one, write a class like those of ``rpc`` or ``objects`` and put it into REGISTRY.
"""

from __future__ import annotations

from .base import Variant
from .clusters import RayCompiled, RayPut, SparkBroadcast
from .net import ByCopyingServer, ByServer
from .objects import ByHand, ObjectStore
from .rpc import ByRef, ByValue, EagerCopy, OnePage

REGISTRY: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        ByValue(),
        ByRef(),
        OnePage(),
        EagerCopy(),
        ByServer(),
        ByCopyingServer(),
        ObjectStore(),
        ByHand(),
        RayPut(),
        RayCompiled(),
        SparkBroadcast(),
    )
}

__all__ = ["REGISTRY", "Variant"]

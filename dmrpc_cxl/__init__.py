"""DmRPC over a pooled (CXL) memory device: what users import.

A map of the package:

==================  ====================================================================================
``host``            Host: the paper's Table II and arrays that live in DM
``rpc``             attach; services and clients; arguments that go by value or by Ref
``errors``          every exception, in one tree
``fabric``          making, checking and removing devices; launching a fabric
``coordinator``     the service that hands out page ownership in batches
``cli``             the ``dmrpc`` command
``_native``         the DM layer itself, in C (csrc/)
==================  ====================================================================================

The names below are loaded when they are first used: tools that only look at a device do without numpy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .errors import DmError

if TYPE_CHECKING:
    from ._native import Buffer, Ref
    from .rpc import (
        AnyRef,
        Call,
        CallFuture,
        Forwarder,
        Host,
        Passing,
        Server,
        attach,
        current_call,
        first_done,
        move,
        pass_on,
    )

__all__ = [
    "AnyRef",
    "Buffer",
    "Call",
    "CallFuture",
    "DmError",
    "Forwarder",
    "Host",
    "Passing",
    "Ref",
    "Server",
    "__version__",
    "attach",
    "current_call",
    "first_done",
    "move",
    "pass_on",
]
__version__ = importlib.metadata.version("dmrpc")

_HOMES = {"Buffer": "._native", "Ref": "._native"}
_LAZY = frozenset(__all__) - {"DmError", "__version__"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES.get(name, ".rpc"), __name__)
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | _LAZY)

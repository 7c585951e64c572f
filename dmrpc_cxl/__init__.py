"""DmRPC over a pooled (CXL) memory device: what users import.

A map of the package:

==================  ====================================================================================
``host``            attach, Host: the paper's Table II and arrays that live in DM
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
    from .host import Buffer, Host, Ref, attach

__all__ = ["Buffer", "DmError", "Host", "Ref", "__version__", "attach"]
__version__ = importlib.metadata.version("dmrpc")

_FROM_HOST = ("Buffer", "Host", "Ref", "attach")


def __getattr__(name: str) -> Any:
    if name not in _FROM_HOST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(".host", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_FROM_HOST))

"""Where large data goes when it leaves a message: the pool, or memory servers; and what both ends of a call reach.

A host has one place or both. What a service's host has stands in its WELCOME; what a caller has, of these, stands in the flags
of each CALL, so that it survives forwarders. Of the places that both reach the pool comes first: a load costs less than a
round trip. If there is none, everything goes by value.

=========  =========================================================  ========================
place      reached by                                                 in WELCOME
=========  =========================================================  ========================
POOL       every host of the fabric that was attached with a device   ``pool``
SERVERS    every client of the same memory servers                    ``net:`` and their group
=========  =========================================================  ========================

Paper: IV (one interface, two kinds of disaggregated memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .._native import Ref
from .frames import NO_POOL, SERVERS_TOO

if TYPE_CHECKING:
    from dmrpc_net.memory import Memory

    from ..host import Host as PoolHost

__all__ = [
    "POOL",
    "SERVERS",
    "Attachment",
    "Place",
    "Pool",
    "Servers",
    "common",
    "flags_of",
    "reach_of",
]

POOL, SERVERS = 1, 2
GIL_BYTES = 65536  # copies from here on go through numpy, which lets other threads run


class Attachment(Protocol):
    """What services and clients need of the process they are in: a name service, and memory."""

    @property
    def fabric(self) -> str:
        """Its name."""

    @property
    def fabric_id(self) -> int:
        """Its random number."""

    @property
    def secret(self) -> bytes:
        """What proves to others that this process may use the fabric."""

    @property
    def id(self) -> int:
        """Host id, 1 and up."""

    @property
    def detached(self) -> bool:
        """Whether it has left."""

    def find_places(self) -> dict[type, Place]:
        """Return where this process's large data may go, by the class of Refs; the one that is preferred first."""

    def publish(self, name: str, endpoint: Any) -> None:
        """Publish a service."""

    def withdraw(self, name: str) -> None:
        """Take it back."""

    def lookup(self, name: str) -> dict[str, Any]:
        """Find a service."""

    def drop_refs(self, data: Any) -> int:
        """Drop the Refs of a message that nobody took over, whoever holds them."""

    def ref_is_held(self, data: Any) -> bool:
        """Tell whether a Ref that was sent is still this process's."""

    def view_ref(self, ref: Any) -> Any:
        """Take a Ref over, and return a buffer that shows what it has."""

    def take_ref(self, data: bytes) -> Any:
        """Take a Ref over, and return it."""

    def ralloc(self, size: int, *, zero: bool = True) -> Any:
        """Return a Buffer that can be sent by Ref."""

    def create_ref(self, target: Any, *, move: bool = False) -> Any:
        """Return a Ref to what a Buffer holds."""


class Place(Protocol):
    """Memory that Refs lead to."""

    bit: int
    name: str
    host: Any
    """What Buffers that lie there have as their ``host``."""

    def holds(self, target: npt.NDArray[Any] | memoryview) -> bool:
        """Tell whether an array lies there already."""

    def copy(self, array: npt.NDArray[Any]) -> Any:
        """Return a Ref to a copy."""

    def share(self, view: memoryview) -> Any:
        """Return a Ref to what lies there already."""

    def token(self, ref: Any) -> bytes:
        """Return the bytes that stand for a Ref in a frame."""


class Pool:
    """The memory pool of a fabric, through a host."""

    bit = POOL
    name = "pool"

    def __init__(self, host: PoolHost) -> None:
        self.host = host
        self.holds = host.contains
        self.share = host.create_ref
        self.token = Ref.to_bytes

    def copy(self, source: npt.NDArray[Any]) -> Ref:
        """Copy an array into fresh frames and give those away."""
        host = self.host
        buffer = host.ralloc(source.nbytes, zero=False)
        if source.nbytes < GIL_BYTES and source.flags.c_contiguous:
            with memoryview(buffer) as to:
                to[:] = memoryview(source.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        else:
            target = buffer.numpy(source.dtype, source.shape)
            np.copyto(target, source)
            del target
        if host.emulates_latency:
            host.charge(source.nbytes)
        return host.create_ref(buffer, move=True)


class Servers:
    """Memory servers, through this process's Memory."""

    bit = SERVERS

    def __init__(self, memory: Memory) -> None:
        self.host = memory
        self.name = f"net:{memory.group.hex()}"
        self.holds = memory.holds
        self.copy = memory.place
        self.share = memory.share
        self.token = memory.token_of


def common(places: dict[type, Place], theirs: Sequence[str]) -> int:
    """Return which of a host's places are among those of a WELCOME."""
    reach = 0
    for place in places.values():
        if place.name in theirs:
            reach |= place.bit
    return reach


def flags_of(reach: int) -> int:
    """Return the flags of a CALL whose results may lie there."""
    return (0 if reach & POOL else NO_POOL) | (SERVERS_TOO if reach & SERVERS else 0)


def reach_of(flags: int) -> int:
    """Return where the results of a CALL may lie."""
    return (0 if flags & NO_POOL else POOL) | (SERVERS if flags & SERVERS_TOO else 0)

"""How pictures travel: a class for each way. Services and client are the same for all.

A variant says three things: what of a picture stands in the request, how the last service gets at the picture, and how the result
goes back. Services in between pass on what there is. An instance works for one process. Add a class to VARIANTS, and
every program of this package knows the new variant.

========  =============================================================================================
value     the picture is in every message
cxl       the library decides: a small picture is in the message, a large one is written into DM once
          and given away; messages carry a Ref
cxl-copy  the client keeps the picture in DM, and what is sent is an eager copy of it; small ones as cxl
net       the library decides as well, but large pictures are written to a memory server and read from there: all
          hosts of such a run have memory servers instead of the pool
store     the picture is copied into an object store, which never changes it, and the message has its
          number; small ones as value
========  =============================================================================================

In the mode "fresh" all of that happens for each picture. In "pre-shared" the client has placed the pictures before, and the last
services have them mapped: a request says where. That is how the measurements in the paper were made.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.rpc.marshal import Transfer

from . import store
from .bmp import Bytes, NotABitmap
from .messages import Reply, Request
from .work import EMPTY

Mode: TypeAlias = Literal["fresh", "pre-shared"]
MODES: tuple[Mode, ...] = ("fresh", "pre-shared")


class Variant(ABC):
    """One way for pictures to travel, seen from one process."""

    name: ClassVar[str]
    about: ClassVar[str]
    transfer: ClassVar[Transfer] = "auto"
    """Of calls; their replies go the same way."""
    modes: ClassVar[tuple[Mode, ...]] = ("fresh",)
    needs: ClassVar[tuple[str, ...]] = ()
    """Hosts besides the seven services that have to run: hosts.py."""
    memory: ClassVar[Literal["pool", "servers", "either"]] = "pool"
    """Where large data of its hosts has to be; either: it goes into no messages by reference."""

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        self.host = host
        self.bytes_copied = self.bytes_placed = 0
        """In DM, by this class itself: beside what the DM layer counts."""

    @abstractmethod
    def place(self, request: Request, file: Bytes) -> Any:
        """Put a picture into a request; what is returned is kept until take() or drop()."""

    def open(self, request: Request) -> Bytes:
        """Return the picture of a request to the one who looks at it; let go of when nobody refers to it.

        Raises:
            NotABitmap: there is none, or not all of it.
        """
        return _there(request)

    def done(self, request: Request) -> None:  # noqa: B027 - nothing, unless a variant has something to do
        """Say that the picture of a request, which was opened, is not looked at any more."""

    def give(self, reply: Reply, result: Bytes) -> None:
        """Put a result into a reply."""
        reply.result = result

    def take(self, reply: Reply, kept: Any) -> Bytes:
        """Return the result of a reply to the client, and free what was kept for the request."""
        return EMPTY if reply.result is None else reply.result

    def drop(self, kept: Any) -> None:  # noqa: B027 - nothing, unless a variant has something to do
        """Free what was kept for a request that gave no result."""

    def keep(self, handle: int, region: Bytes) -> None:
        """Have pictures mapped for requests to come that name the handle."""
        raise ValueError(f"{self.name} keeps no pictures for later: send one with each request")

    def forget(self, handle: int) -> None:  # noqa: B027 - nothing, unless a variant has something to do
        """Let go of what keep() was given."""

    def close(self) -> None:  # noqa: B027 - nothing, unless a variant has something to do
        """Let go of everything."""


class Value(Variant):
    """In every message."""

    name = "value"
    about = "by value"
    transfer = "value"
    memory = "either"

    def place(self, request: Request, file: Bytes) -> None:
        """See Variant."""
        request.image = file


class Cxl(Variant):
    """By reference, as the library does it by itself."""

    name = "cxl"
    about = "by reference"
    modes = MODES

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        super().__init__(host)
        self._regions: dict[int, Bytes] = {}  # pre-shared, by handle

    def place(self, request: Request, file: Bytes) -> Any:
        """See Variant; the library copies a large picture into DM and gives that away."""
        request.image = file

    def open(self, request: Request) -> Bytes:
        """See Variant."""
        if not request.handle:
            return _there(request)
        region = self._regions.get(request.handle)
        if region is None:
            raise NotABitmap("no pictures are shared under that handle")
        return region[request.offset : request.offset + request.image_bytes]

    def keep(self, handle: int, region: Bytes) -> None:
        """See Variant."""
        self._regions[handle] = region

    def forget(self, handle: int) -> None:
        """See Variant."""
        self._regions.pop(handle, None)

    def close(self) -> None:
        """See Variant."""
        self._regions.clear()


class CxlCopy(Cxl):
    """By reference, but what is sent is copied at once."""

    name = "cxl-copy"
    about = "by reference, copied eagerly"
    modes = ("fresh",)

    def place(self, request: Request, file: Bytes) -> Any:
        """See Variant."""
        if file.nbytes < self.host.threshold:
            request.image = file
            return None
        kept = self.host.array(file)
        self.bytes_copied += kept.nbytes
        request.image = dmrpc_cxl.move(self.host.array(kept))  # type: ignore[assignment]
        return kept


class Net(Cxl):
    """By reference to a memory server; what is pre-shared stays there, and each picture is read when it is asked for."""

    name = "net"
    about = "by reference to a memory server"
    memory = "servers"

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        super().__init__(host)
        self._rooms = threading.local()  # for a picture each: workers have several threads

    def place(self, request: Request, file: Bytes) -> Any:
        """See Variant."""
        if file.nbytes >= self.host.threshold:
            self.bytes_placed += file.nbytes
        return super().place(request, file)

    def open(self, request: Request) -> Bytes:
        """See Variant."""
        if not request.handle:
            return super().open(request)
        region = self._regions.get(request.handle)
        if region is None:
            raise NotABitmap("no pictures are shared under that handle")
        from dmrpc_net.memory import Memory  # only where there are memory servers

        nbytes = request.image_bytes
        room: Bytes | None = getattr(self._rooms, "room", None)
        if room is None or room.nbytes < nbytes:
            room = self._rooms.room = np.zeros(nbytes, np.uint8)
        buffer = Memory.buffer_of(region)
        assert buffer is not None
        memory: Any = self.host.memory  # type: ignore[attr-defined]
        memory.client.get(buffer.ref, room[:nbytes], offset=request.offset, size=nbytes, keep=True)
        return room[:nbytes]


class Store(Variant):
    """Through an object store."""

    name = "store"
    about = "object store"
    transfer = "value"
    memory = "either"
    needs = (store.NAME,)

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        super().__init__(host)
        self._connected: store.Objects | None = None
        self._lock = threading.Lock()

    @property
    def _objects(self) -> store.Objects:
        with self._lock:
            if self._connected is None:
                self._connected = store.Objects(self.host)
            return self._connected

    def place(self, request: Request, file: Bytes) -> int:
        """See Variant."""
        if file.nbytes < self.host.threshold:
            request.image = file
        else:
            request.handle = self._objects.put(file)
        return request.handle

    def open(self, request: Request) -> Bytes:
        """See Variant."""
        if not request.handle:
            return _there(request)
        try:
            return self._objects.look(request.handle)
        except LookupError as error:
            raise NotABitmap(str(error)) from None

    def done(self, request: Request) -> None:
        """See Variant."""
        if request.handle:
            self._objects.release(request.handle)

    def give(self, reply: Reply, result: Bytes) -> None:
        """See Variant."""
        if result.nbytes < self.host.threshold:
            reply.result = result
        else:
            reply.handle = self._objects.put(result)

    def take(self, reply: Reply, kept: int) -> Bytes:
        """See Variant."""
        self.drop(kept)
        if not reply.handle:
            return super().take(reply, None)
        result = self._objects.look(reply.handle).copy()
        self._objects.release(reply.handle)
        self._objects.delete(reply.handle)
        return result

    def drop(self, kept: int) -> None:
        """See Variant."""
        if kept:
            self._objects.delete(kept)

    def close(self) -> None:
        """See Variant."""
        if self._connected is not None:
            self._connected.close()


def _there(request: Request) -> Bytes:
    """Return the picture in a request; raise NotABitmap when there is none."""
    if request.image is None or request.image.nbytes != request.image_bytes:
        raise NotABitmap(f"not the {request.image_bytes} bytes that the request speaks of")
    return request.image


VARIANTS: dict[str, type[Variant]] = {kind.name: kind for kind in (Value, Cxl, CxlCopy, Net, Store)}


def memory_of(names: Iterable[str]) -> Literal["pool", "servers"]:
    """Return where large data of the hosts of a run has to be, so that it can measure these variants.

    Raises:
        ValueError: some need the pool, some memory servers.
    """
    wanted: dict[str, list[str]] = {"pool": [], "servers": [], "either": []}
    for name in names:
        wanted[VARIANTS[name].memory].append(name)
    if wanted["pool"] and wanted["servers"]:
        raise ValueError(
            f"{', '.join(wanted['servers'])} runs on hosts that have memory servers instead of the pool, "
            f"{', '.join(wanted['pool'])} on hosts with the pool: run them one after the other, each with value"
        )
    return "servers" if wanted["servers"] else "pool"


class Ways:
    """Every variant, ready for use in one process."""

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        self._host = host
        self._made: dict[str, Variant] = {}

    def __getitem__(self, name: str) -> Variant:
        """Return a variant; KeyError: there is none of that name."""
        if name not in self._made:
            self._made[name] = VARIANTS[name](self._host)
        return self._made[name]

    def close(self) -> None:
        """Let go of everything."""
        for variant in self._made.values():
            variant.close()
        self._made.clear()

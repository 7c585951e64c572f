"""An object store, as data-processing systems have one on each machine: a stand-in, to compare with.

A process of its own hands out room in shared memory and knows which objects there are. Whoever has data asks it for room, copies
the data in and seals the object, which never changes from then on. Others ask where it is, and look at it there. Room is taken
back when an object was deleted and nobody looks at it any more.

It does what such a store does when all goes well. It does not notice that a process which looks at an object has died.
"""

from __future__ import annotations

import bisect
import collections
import mmap
import os
import threading
from typing import Any

import msgspec
import numpy as np

import dmrpc_cxl
from dmrpc_cxl.rpc.endpoint import Transport

from .bmp import Bytes

NAME = "store"
ALIGNMENT = 4096


class StoreFull(MemoryError):
    """There is no room for an object of that size."""


class UnknownObject(LookupError):
    """There is no such object, or it is not sealed."""


class Place(msgspec.Struct, array_like=True):
    """Where an object is."""

    number: int
    offset: int
    nbytes: int


class _Object:
    __slots__ = ("deleted", "place", "readers", "sealed")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.readers = 0
        self.sealed = False
        self.deleted = False


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ObjectStore:
    """The process that keeps the books."""

    def __init__(self, size: int) -> None:
        self._size = _rounded(size)
        self._memory = os.memfd_create("image-pipeline-store", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, self._size)
        self._free = [(0, self._size)]  # offset and size, in order, none beside another
        self._objects: dict[int, _Object] = {}
        self._next = 1
        self._lock = threading.Lock()

    def where(self) -> tuple[str, int]:
        """Return path and size of the shared memory; it is gone when this process ends."""
        return f"/proc/{os.getpid()}/fd/{self._memory}", self._size

    def nr_objects(self) -> int:
        """Return how many objects there are."""
        return len(self._objects)

    def create(self, nbytes: int) -> Place:
        """Make room for an object.

        Raises:
            StoreFull: there is none.
        """
        wanted = _rounded(nbytes)
        with self._lock:
            for at, (offset, size) in enumerate(self._free):
                if size >= wanted:
                    rest = (offset + wanted, size - wanted)
                    self._free[at : at + 1] = [rest] if rest[1] else []
                    break
            else:
                raise StoreFull(f"no room for {nbytes} bytes")
            place = Place(self._next, offset, nbytes)
            self._next += 1
            self._objects[place.number] = _Object(place)
            return place

    def seal(self, number: int) -> None:
        """Let others look at an object."""
        with self._lock:
            self._objects[number].sealed = True

    def get(self, number: int) -> Place:
        """Return where an object is; release() says that it is not looked at any more.

        Raises:
            UnknownObject: there is none of that number.
        """
        with self._lock:
            found = self._objects.get(number)
            if found is None or not found.sealed or found.deleted:
                raise UnknownObject(f"no object {number}")
            found.readers += 1
            return found.place

    def release(self, number: int) -> None:
        """Take back one get()."""
        with self._lock:
            found = self._objects[number]
            found.readers -= 1
            self._end_of(found)

    def delete(self, number: int) -> None:
        """Take the room of an object back, once nobody looks at it."""
        with self._lock:
            found = self._objects[number]
            found.deleted = True
            self._end_of(found)

    def _end_of(self, found: _Object) -> None:
        if found.readers or not found.deleted:
            return
        del self._objects[found.place.number]
        offset, size = found.place.offset, _rounded(found.place.nbytes)
        at = bisect.bisect(self._free, (offset, 0))
        if at < len(self._free) and self._free[at][0] == offset + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            offset, before = self._free.pop(at - 1)
            size += before
            at -= 1
        self._free.insert(at, (offset, size))


class Objects:
    """The store, seen from another process."""

    def __init__(self, host: dmrpc_cxl.Host, transport: Transport = "auto") -> None:
        self._told: collections.deque[dmrpc_cxl.CallFuture] = collections.deque()
        self._lock = threading.Lock()
        self._store: Any = host.connect(NAME, ObjectStore, transport=transport, transfer="value")
        path, size = self._store.where()
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory: Bytes = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        finally:
            os.close(fd)

    def put(self, data: Bytes) -> int:
        """Copy data in; return the number of the object.

        Raises:
            RemoteError: the store is full; also a MemoryError.
        """
        place = self._store.create(data.nbytes)
        self._memory[place.offset : place.offset + data.nbytes] = data
        self._store.seal(place.number)
        return int(place.number)

    def look(self, number: int) -> Bytes:
        """Return an object, where it is, not to be changed; until release().

        Raises:
            RemoteError: there is none of that number; also a LookupError.
        """
        place = self._store.get(number)
        found = self._memory[place.offset : place.offset + place.nbytes]
        found.flags.writeable = False
        return found

    def release(self, number: int) -> None:
        """Say that look() is over; without waiting."""
        self._tell(self._store.future.release(number))

    def delete(self, number: int) -> None:
        """Give an object up; without waiting."""
        self._tell(self._store.future.delete(number))

    def _tell(self, future: dmrpc_cxl.CallFuture) -> None:
        # A future that nobody refers to cancels its call: they are kept until they have ended.
        with self._lock:
            self._told.append(future)
            while self._told[0].done():
                self._told.popleft().result()
                if not self._told:
                    return

    def close(self) -> None:
        """End the connection, when the store knows all it was told."""
        while self._told:
            self._told.popleft().result()
        self._store.close()

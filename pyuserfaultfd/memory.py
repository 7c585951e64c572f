"""Where a buffer lives: the step from Python objects to the addresses of userfaultfd."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MemoryRange(NamedTuple):
    """A range of virtual addresses; unpacks into the arguments of the operations, ``*range``."""

    address: int
    length: int

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.address + self.length


def address_of(buffer: Buffer) -> MemoryRange:
    """Return where a writable buffer lies: an mmap, a NumPy array, a memoryview of those.

    Nothing is held on to. The answer is good for as long as the caller keeps the buffer alive, and
    an mmap can still be closed. Only an mmap is sure to begin on a page boundary and to share no
    page with other objects, so memory to be registered should come from mmap.

    Raises:
        TypeError: the buffer is read-only, or no buffer at all.
        BufferError: the buffer is not contiguous.

    >>> import mmap
    >>> memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    >>> address, length = address_of(memory)
    >>> address % mmap.PAGESIZE, length // mmap.PAGESIZE
    (0, 3)
    >>> memory.close()
    """
    with memoryview(buffer) as view:
        if view.readonly:
            raise TypeError("address_of() needs a writable buffer")
        if not view.c_contiguous:
            raise BufferError("address_of() needs a contiguous buffer")
        if not view.nbytes:
            raise ValueError("an empty buffer has no address")
        with view.cast("B") as flat:
            return MemoryRange(ctypes.addressof(ctypes.c_char.from_buffer(flat)), flat.nbytes)


@contextmanager
def readable_bytes(buffer: Buffer) -> Iterator[MemoryRange]:
    """Lend the address of a buffer's bytes for reading, while the ``with`` block runs.

    A writable buffer is used where it lies. A read-only one is copied first: Python tells nobody
    where those bytes are.
    """
    with memoryview(buffer) as view:
        nbytes = view.nbytes
        whole = ctypes.c_char * nbytes
        if view.readonly or not view.c_contiguous:
            holder = whole.from_buffer_copy(view.tobytes())
            yield MemoryRange(ctypes.addressof(holder), nbytes)
        else:
            with view.cast("B") as flat:
                holder = whole.from_buffer(flat)
                try:
                    yield MemoryRange(ctypes.addressof(holder), nbytes)
                finally:
                    del holder  # a ctypes array keeps its buffer exported while it lives

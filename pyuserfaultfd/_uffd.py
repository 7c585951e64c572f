"""UserFaultFD: the operations on ranges, and reading events.

Facts about the kernel, and what they force on us:

- poll(2) on a blocking userfaultfd reports an error at once. Hence descriptors are non-blocking
  unless asked otherwise, and waiting is done in poll.
- A readable descriptor may have nothing to read a moment later: the fault was resolved, or another
  reader took it. Hence reading starts again with what is left of the timeout.
- An event that was read and then dropped leaves a thread asleep for ever. Hence the asynchronous
  iterator reads one event at a time: what it has not handed out is still with the kernel.
- COPY and its like may stop early with EAGAIN, and tell how far they came. Hence they return the
  number of bytes, always the full length, and anything else is an exception that has the number.
- The operations name addresses of the process that opened the descriptor. A server in another
  process passes its own address for one thing only: the source of a copy.
"""

from __future__ import annotations

import asyncio
import operator
import os
import select
import struct
import time
from collections.abc import AsyncGenerator
from errno import EAGAIN, EINVAL
from typing import TYPE_CHECKING

from . import _abi, _system
from ._abi import Ioctl, RegisterMode
from ._descriptor import Descriptor
from .errors import InvalidRange, UnknownEvent, from_errno
from .events import Event, decode
from .memory import readable_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LONGEST_POLL_MS = 2**31 - 1


class UserFaultFD(Descriptor):
    """A userfaultfd: page faults of registered memory, reported to and resolved by a program.

    >>> import mmap
    >>> from pyuserfaultfd import address_of
    >>> memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
    >>> address, length = address_of(memory)
    >>> with UserFaultFD() as uffd:
    ...     granted = uffd.register(address, length)
    ...     assert Ioctl.COPY in granted
    ...     uffd.copy(address, b"x" * mmap.PAGESIZE) == mmap.PAGESIZE
    True
    >>> memory[:4]
    b'xxxx'

    Here the page is filled before it is touched. Had it been touched first, the thread would have
    slept in the kernel with the GIL in its hands; see the README on who must serve faults.
    """

    _waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    # ------------------------------------------------------------ ranges

    def register(
        self, address: int, length: int, mode: RegisterMode = RegisterMode.MISSING
    ) -> Ioctl:
        """Begin to report faults in a range, which must be mapped.

        Args:
            address: a multiple of the page size.
            length: bytes, a multiple of the page size.
            mode: which faults.

        Returns:
            The operations that the kernel offers there.

        Raises:
            InvalidRange: not aligned, not mapped, or memory of a kind that has no such faults.
            RangeBusy: another userfaultfd has some of it.
        """
        answer = self._operate(
            "register", _abi.UFFDIO_REGISTER, _abi.REGISTER_STRUCT, address, length, int(mode), 0
        )
        return Ioctl(_abi.REGISTER_STRUCT.unpack(answer)[-1])

    def unregister(self, address: int, length: int) -> None:
        """Stop reporting faults in a range, lift its write protection and wake who sleeps in it."""
        self._operate("unregister", _abi.UFFDIO_UNREGISTER, _abi.RANGE_STRUCT, address, length)

    def wake(self, address: int, length: int) -> None:
        """Wake the threads that sleep in a range, after operations with ``wake=False``."""
        self._operate("wake", _abi.UFFDIO_WAKE, _abi.RANGE_STRUCT, address, length)

    def copy(
        self,
        destination: int,
        source: int | Buffer,
        length: int | None = None,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> int:
        """Fill missing pages with a copy of the caller's memory.

        Args:
            destination: where the pages are missing.
            source: an address in the calling process, or a buffer.
            length: bytes; None is the whole buffer.
            wake: wake who waits for these pages.
            write_protect: map them write-protected; the range is registered with RegisterMode.WP.

        Returns:
            The length.

        Raises:
            AlreadyMapped: the first page is there already.
            PartialResult: some pages were filled, or none because an event waits to be read.
            NotRegistered: the destination is not registered.
            InvalidRange: not aligned, or the source cannot be read.
        """
        mode = (0 if wake else _abi.MODE_DONTWAKE) | (_abi.COPY_MODE_WP if write_protect else 0)
        if isinstance(source, int):
            if length is None:
                raise TypeError("copy() from an address needs a length")
            return self._copy(destination, source, length, mode)
        with readable_bytes(source) as lent:
            if length is not None and length > lent.length:
                raise ValueError(f"the source has {lent.length} bytes, {length} were to be copied")
            return self._copy(
                destination, lent.address, lent.length if length is None else length, mode
            )

    def _copy(self, destination: int, source: int, length: int, mode: int) -> int:
        return self._fill(
            "copy", _abi.UFFDIO_COPY, _abi.COPY_STRUCT, destination, length, (source, length, mode)
        )

    def zeropage(self, address: int, length: int, *, wake: bool = True) -> int:
        """Fill missing pages with zeros, and return the length. Raises as :meth:`copy` does."""
        mode = 0 if wake else _abi.MODE_DONTWAKE
        return self._fill(
            "zeropage", _abi.UFFDIO_ZEROPAGE, _abi.FILL_STRUCT, address, length, (length, mode)
        )

    def continue_(
        self, address: int, length: int, *, wake: bool = True, write_protect: bool = False
    ) -> int:
        """Map pages that are in the page cache already, after a minor fault, and return the length.

        Raises as :meth:`copy` does; InvalidRange also where the page cache has no such page.
        """
        mode = (0 if wake else _abi.MODE_DONTWAKE) | (_abi.CONTINUE_MODE_WP if write_protect else 0)
        return self._fill(
            "continue", _abi.UFFDIO_CONTINUE, _abi.FILL_STRUCT, address, length, (length, mode)
        )

    def poison(self, address: int, length: int, *, wake: bool = True) -> int:
        """Make missing pages deadly: whoever touches one gets SIGBUS. Return the length.

        Linux 6.6, Feature.POISON. Raises as :meth:`copy` does.
        """
        mode = 0 if wake else _abi.MODE_DONTWAKE
        return self._fill(
            "poison", _abi.UFFDIO_POISON, _abi.FILL_STRUCT, address, length, (length, mode)
        )

    def move(
        self,
        destination: int,
        source: int,
        length: int,
        *,
        wake: bool = True,
        allow_holes: bool = False,
    ) -> int:
        """Fill missing pages by moving others there, without a copy; the source is missing then.

        Linux 6.8, Feature.MOVE. Both ranges are private anonymous memory of the calling process, so
        this cannot be done on behalf of another one.

        Args:
            destination: where pages are missing.
            source: where the pages are now.
            length: bytes.
            wake: wake who waits for these pages.
            allow_holes: skip what is missing in the source.

        Returns:
            The length.

        Raises:
            RangeBusy: a source page is shared with a forked process, or pinned.
            InvalidRange: the wrong kind of memory, or a hole in the source.
            AlreadyMapped: the first page of the destination is there already.
            PartialResult: as in :meth:`copy`.
        """
        mode = (0 if wake else _abi.MODE_DONTWAKE) | (
            _abi.MOVE_MODE_ALLOW_SRC_HOLES if allow_holes else 0
        )
        return self._fill(
            "move", _abi.UFFDIO_MOVE, _abi.MOVE_STRUCT, destination, length, (source, length, mode)
        )

    def writeprotect(
        self, address: int, length: int, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Set or clear the write protection of a range registered with RegisterMode.WP.

        Args:
            address: a multiple of the page size.
            length: bytes, a multiple of the page size.
            protect: set it or clear it.
            wake: when clearing, wake who waits to write. Setting it wakes nobody.

        Raises:
            NotRegistered: not registered, or not in that mode.
            PartialResult: an event waits to be read, and nothing was done.
        """
        if protect:
            mode = _abi.WRITEPROTECT_MODE_WP
        else:
            mode = 0 if wake else _abi.WRITEPROTECT_MODE_DONTWAKE
        self._operate(
            "writeprotect",
            _abi.UFFDIO_WRITEPROTECT,
            _abi.WRITEPROTECT_STRUCT,
            address,
            length,
            mode,
        )

    def _operate(
        self, name: str, request: int, layout: struct.Struct, address: int, length: int, *rest: int
    ) -> bytes:
        """Do an operation whose structure begins with the range; return what the kernel wrote."""
        data = _pack(name, layout, address, length, *rest)
        code, answer = _system.ioctl(self.fileno(), request, data)
        if code:
            raise from_errno(code, name, address=address, length=length)
        return answer

    def _fill(
        self,
        name: str,
        request: int,
        layout: struct.Struct,
        address: int,
        length: int,
        rest: tuple[int, ...],
    ) -> int:
        """Do an operation whose structure ends with the bytes done, or a negative errno."""
        data = _pack(name, layout, address, *rest, 0)
        code, answer = _system.ioctl(self.fileno(), request, data)
        if code:
            done = max(0, layout.unpack(answer)[-1])
            raise from_errno(code, name, address=address, length=length, bytes_done=done)
        return length

    # ------------------------------------------------------------ events

    def read(self, timeout: float | None = None, *, max_events: int = 64) -> list[Event]:
        """Wait for events, and return all that are there, up to ``max_events``.

        Args:
            timeout: seconds; 0 only looks, None waits without limit.
            max_events: at least 1.

        Returns:
            The events in order, or an empty list when the time is over.

        Raises:
            UnknownEvent: one has no name here; the exception holds the others.
            ValueError: a timeout for a blocking descriptor, which can only be read without.

        >>> with UserFaultFD() as uffd:
        ...     uffd.read(timeout=0)
        []
        """
        if max_events < 1:
            raise ValueError("max_events is at least 1")
        fd = self.fileno()
        if os.get_blocking(fd) and timeout is not None:
            raise ValueError("a blocking userfaultfd cannot be polled; open it with nonblock=True")
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while True:
            found = self._read_now(max_events)
            if found:
                return found
            milliseconds: float | None = None
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                milliseconds = min(left * 1000, _LONGEST_POLL_MS)
            poll.poll(milliseconds)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Iterate over events as they come, without end, on the running event loop.

        Close the descriptor to end the iteration (from the loop's own thread). Only one task may
        wait at a time. An event counts as read when the iterator hands it out, so a cancelled task
        loses none.

        >>> async def serve(uffd, page):
        ...     async for event in uffd.events():
        ...         if isinstance(event, PageFault):
        ...             uffd.copy(event.page, page)
        """
        fd = self.fileno()
        loop = asyncio.get_running_loop()
        if os.get_blocking(fd):
            raise ValueError("a blocking userfaultfd cannot be polled; open it with nonblock=True")
        while not self.closed:
            for event in self._read_now(1):
                yield event
                break
            else:
                await self._readable(loop, fd)

    async def _readable(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        if self._waiter is not None:
            raise RuntimeError("another task is already waiting for events of this userfaultfd")
        ready: asyncio.Future[None] = loop.create_future()
        self._waiter = (loop, ready)
        # Only while waiting: a reader that stays would be called again and again until the event is
        # read.
        loop.add_reader(fd, _finish, ready)
        try:
            await ready
        finally:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, ready = waiter
            if not loop.is_closed():
                loop.remove_reader(self._fd)
                _finish(ready)

    def close(self) -> None:
        """Close the descriptor; if it is the last one, protection ends and sleepers wake.

        Closing twice is allowed. An iteration over :meth:`events` ends.
        """
        self._stop_waiting()
        super().close()

    def detach(self) -> int:
        """Give the descriptor up without closing it, and return its number."""
        self._stop_waiting()
        return super().detach()

    def _read_now(self, max_events: int) -> list[Event]:
        """Read up to ``max_events``; none if there are none and the descriptor is non-blocking."""
        size = _abi.MESSAGE_STRUCT.size
        try:
            block = os.read(self.fileno(), size * max_events)
        except OSError as error:
            code = error.errno or EINVAL
            if code == EAGAIN:
                return []
            raise from_errno(code, "read") from None
        found: list[Event] = []
        unknown: UnknownEvent | None = None
        for start in range(0, len(block), size):
            try:
                found.append(decode(block[start : start + size], self._adopt_child))
            except UnknownEvent as error:
                unknown = unknown or error
        if unknown is not None:
            unknown.others = tuple(found)
            raise unknown
        return found

    def _adopt_child(self, fd: int) -> UserFaultFD:
        return type(self).from_fd(fd, self.features)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _pack(name: str, layout: struct.Struct, *fields: int) -> bytes:
    values = [operator.index(field) for field in fields]
    try:
        return layout.pack(*values)
    except struct.error:
        raise InvalidRange(
            EINVAL,
            f"{name}: addresses and lengths are integers from 0 to 2**64 - 1",
            operation=name,
        ) from None

"""What a userfaultfd reports, as a closed set of immutable values.

The kernel sends fixed-size messages: a byte that says which event, and a union. Here each member of
the union is a class with only its own fields. A message that fits none of them is an error and
never skipped, for some thread may be asleep until it is answered.

    PageFault   a thread touched a page, and sleeps until the page is resolved
    Fork        the process forked; here is the child's descriptor   Feature.EVENT_FORK
    Remap       mremap(2) moved a range to another address           Feature.EVENT_REMAP
    Remove      madvise(2) is about to drop pages of a range         Feature.EVENT_REMOVE
    Unmap       munmap(2) took a range away                          Feature.EVENT_UNMAP

Except for a PageFault, reading the event is the answer: the thread that caused it goes on at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from . import _abi
from .errors import UnknownEvent

if TYPE_CHECKING:
    from ._uffd import UserFaultFD


@dataclass(frozen=True)
class PageFault:
    """A thread touched a registered page and sleeps until the fault is resolved.

    With neither ``wp`` nor ``minor`` the page is missing.
    """

    address: int
    """The address touched; its page's address unless Feature.EXACT_ADDRESS was asked for."""
    write: bool
    """The access was a write."""
    wp: bool
    """The page is there, but write-protected."""
    minor: bool
    """The page is in the page cache, but not mapped."""
    thread_id: int | None = None
    """Who sleeps, by its gettid(2) in its own pid namespace. None without Feature.THREAD_ID."""

    @property
    def missing(self) -> bool:
        """Whether there is no page at all."""
        return not (self.wp or self.minor)

    @property
    def page(self) -> int:
        """The address of the base page that holds ``address``.

        >>> PageFault(0x7F00_0000_1234, write=True, wp=False, minor=False).page % _abi.PAGE_SIZE
        0
        """
        return self.address - self.address % _abi.PAGE_SIZE


@dataclass(frozen=True)
class Fork:
    """The process forked, and the child's copy of the registered ranges is served by ``uffd``.

    Whoever reads the event owns ``uffd``, and closes it. As long as it is open, the child's faults
    wait for an answer from there.
    """

    uffd: UserFaultFD


@dataclass(frozen=True)
class Remap:
    """A registered range moved: what was at ``source`` is now at ``destination``.

    Where Feature.EVENT_UNMAP is enabled too, an Unmap of the old range follows.
    """

    source: int
    destination: int
    length: int


@dataclass(frozen=True)
class Remove:
    """The pages from ``start`` up to ``end`` are being dropped; the range stays registered."""

    start: int
    end: int


@dataclass(frozen=True)
class Unmap:
    """The range from ``start`` up to ``end`` is no longer mapped, nor registered."""

    start: int
    end: int


Event: TypeAlias = PageFault | Fork | Remap | Remove | Unmap


_KNOWN_FLAGS = _abi.PAGEFAULT_FLAG_WRITE | _abi.PAGEFAULT_FLAG_WP | _abi.PAGEFAULT_FLAG_MINOR


def decode(message: bytes, adopt: Callable[[int], UserFaultFD]) -> Event:
    """Turn one message of the kernel into an event.

    Args:
        message: 32 bytes.
        adopt: wraps the descriptor that came with a fork.

    Raises:
        UnknownEvent: this module has no name for the event, or for one of its flags.

    >>> message = _abi.MESSAGE_STRUCT.pack(_abi.EVENT_UNMAP, 0x1000, 0x3000, 0)
    >>> decode(message, adopt=lambda fd: None)
    Unmap(start=4096, end=12288)
    """
    kind, first, second, third = _abi.MESSAGE_STRUCT.unpack(message)
    if kind == _abi.EVENT_PAGEFAULT:
        _, flags, address, thread_id = _abi.PAGEFAULT_STRUCT.unpack(message)
        unknown = flags & ~_KNOWN_FLAGS
        if unknown:
            raise UnknownEvent.of(
                f"page fault at {address:#x} with unknown flags {unknown:#x}", message
            )
        return PageFault(
            address,
            write=bool(flags & _abi.PAGEFAULT_FLAG_WRITE),
            wp=bool(flags & _abi.PAGEFAULT_FLAG_WP),
            minor=bool(flags & _abi.PAGEFAULT_FLAG_MINOR),
            thread_id=thread_id or None,
        )
    if kind == _abi.EVENT_FORK:
        _, descriptor = _abi.FORK_STRUCT.unpack(message)
        return Fork(adopt(descriptor))
    if kind == _abi.EVENT_REMAP:
        return Remap(first, second, third)
    if kind == _abi.EVENT_REMOVE:
        return Remove(first, second)
    if kind == _abi.EVENT_UNMAP:
        return Unmap(first, second)
    raise UnknownEvent.of(f"event of unknown kind {kind:#x}", message)

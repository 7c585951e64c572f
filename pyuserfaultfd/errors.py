"""All exceptions of the package, and the one place that turns an errno into one of them.

    UserfaultfdError (OSError)
    ├── PermissionDenied (PermissionError)   the process may not have one; says what to change
    ├── NotSupported                         this kernel or this architecture has no such thing
    │   └── FeatureUnavailable               names the features and the Linux that brought them
    ├── InvalidDescriptor (ValueError)       that descriptor is no userfaultfd
    │   └── ClosedError                      it was one, and close() or detach() was called
    ├── InvalidRange (ValueError)            addresses, lengths, or memory of the wrong kind
    │   └── NotRegistered                    the range is not registered, or not in that mode
    ├── AlreadyMapped (FileExistsError)      a page is there already
    ├── RangeBusy                            another userfaultfd has the range, or a page is in use
    ├── PartialResult (BlockingIOError)      stopped early; ``bytes_done`` were done
    ├── OutOfMemory (MemoryError)
    ├── ProcessGone (ProcessLookupError)     the process whose memory it is has ended
    └── UnknownEvent                         the kernel reports what this package cannot name

``errno`` is the kernel's own. ``operation``, ``address`` and ``length`` tell what was attempted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _abi

if TYPE_CHECKING:
    from .events import Event


class UserfaultfdError(OSError):
    """Any failure of a userfaultfd, and those that have no class of their own."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        operation: str = "",
        address: int | None = None,
        length: int | None = None,
    ) -> None:
        """Keep what the kernel said and what was asked of it."""
        super().__init__(code, message)
        self.operation = operation
        self.address = address
        self.length = length


class PermissionDenied(UserfaultfdError, PermissionError):
    """The process may not open a userfaultfd, or not one with those powers."""


class NotSupported(UserfaultfdError):
    """This kernel, or this architecture, does not have what was asked for."""


class FeatureUnavailable(NotSupported):
    """The kernel lacks features that were required.

    ``missing`` is a :class:`~pyuserfaultfd.Feature`.
    """

    missing = _abi.Feature(0)

    @classmethod
    def lacking(cls, missing: _abi.Feature) -> FeatureUnavailable:
        """Make the error for these features.

        >>> print(FeatureUnavailable.lacking(_abi.Feature.MOVE))
        [Errno 22] the running kernel lacks MOVE (Linux 6.8)
        """
        names = [
            f"{feature.name} (Linux {since})"
            for feature, since in _abi.FEATURE_SINCE.items()
            if feature in missing
        ]
        unnamed = int(missing) & ~sum(int(feature) for feature in _abi.FEATURE_SINCE)
        if unnamed:
            names.append(f"{unnamed:#x} (not known to this package)")
        error = cls(
            errno.EINVAL, f"the running kernel lacks {', '.join(names)}", operation="handshake"
        )
        error.missing = missing
        return error


class InvalidDescriptor(UserfaultfdError, ValueError):
    """A descriptor that is no userfaultfd."""


class ClosedError(InvalidDescriptor):
    """Used after close() or detach()."""


class InvalidRange(UserfaultfdError, ValueError):
    """The kernel refuses the addresses, the length, or the memory that lies there."""


class NotRegistered(InvalidRange):
    """The range is not registered with this userfaultfd, or not in the mode needed."""


class AlreadyMapped(UserfaultfdError, FileExistsError):
    """The first page of the range is there already, so there is nothing to fill in."""


class RangeBusy(UserfaultfdError):
    """Another userfaultfd has the range; or, for a move, a page is shared or pinned."""


class PartialResult(UserfaultfdError, BlockingIOError):
    """The kernel stopped early; the rest is to be tried again from ``address + bytes_done``.

    Either the next page cannot be resolved (trying again says why), or the memory map of the
    process is about to change: an event waits to be read first.
    """

    bytes_done = 0


class OutOfMemory(UserfaultfdError, MemoryError):
    """There is no memory for the pages."""


class ProcessGone(UserfaultfdError, ProcessLookupError):
    """The process whose memory this is has ended."""


class UnknownEvent(UserfaultfdError):
    """The kernel reports an event that this package has no name for.

    ``raw`` is the kernel's message. ``others`` are the events that came in the same read, before
    and after; they are reported nowhere else.
    """

    raw = b""
    others: Sequence[Event] = ()

    @classmethod
    def of(cls, message: str, raw: bytes) -> UnknownEvent:
        """Make the error for one message."""
        error = cls(errno.EPROTO, message, operation="read")
        error.raw = raw
        return error


# ---------------------------------------------------------------- errno -> exception

_CLASSES: dict[int, type[UserfaultfdError]] = {
    errno.EPERM: PermissionDenied,
    errno.EACCES: PermissionDenied,
    errno.ENOSYS: NotSupported,
    errno.EINVAL: InvalidRange,
    errno.EFAULT: InvalidRange,
    errno.ENOENT: NotRegistered,
    errno.EEXIST: AlreadyMapped,
    errno.EBUSY: RangeBusy,
    errno.EAGAIN: PartialResult,
    errno.ENOMEM: OutOfMemory,
    errno.ESRCH: ProcessGone,
    errno.EBADF: InvalidDescriptor,
    errno.ENOTTY: InvalidDescriptor,
}

# The same errno means different things to different operations: (class, what it means).
_SPECIAL: dict[tuple[str, int], tuple[type[UserfaultfdError], str]] = {
    ("register", errno.EINVAL): (
        InvalidRange,
        "nothing is mapped there, the mode is empty, or memory of that kind has no such faults "
        "(all kinds: private anonymous, shmem, hugetlbfs; minor faults: only the last two)",
    ),
    ("register", errno.ENOMEM): (InvalidRange, "nothing is mapped there or above"),
    ("register", errno.EPERM): (InvalidRange, "the process has no right to write to that mapping"),
    ("register", errno.EBUSY): (RangeBusy, "registered with another userfaultfd"),
    ("unregister", errno.EINVAL): (
        InvalidRange,
        "nothing is mapped there, or it is registered with another userfaultfd",
    ),
    ("unregister", errno.ENOMEM): (InvalidRange, "nothing is mapped there or above"),
    ("copy", errno.EFAULT): (InvalidRange, "the source cannot be read"),
    ("copy", errno.ENOENT): (
        NotRegistered,
        "the destination is not registered, or not one mapping",
    ),
    ("zeropage", errno.ENOENT): (NotRegistered, "not registered, or not one mapping"),
    ("zeropage", errno.EINVAL): (
        InvalidRange,
        "not one mapping, or hugetlbfs, which has no zero page",
    ),
    ("continue", errno.EFAULT): (InvalidRange, "no page there in the page cache, to continue with"),
    ("continue", errno.ENOENT): (NotRegistered, "not registered, or not one mapping"),
    ("continue", errno.EINVAL): (InvalidRange, "not one mapping of shmem or hugetlbfs"),
    ("writeprotect", errno.ENOENT): (NotRegistered, "not registered in write-protect mode"),
    ("move", errno.EINVAL): (
        InvalidRange,
        "both ranges must be private anonymous memory of the calling process, the destination "
        "registered, and they must not overlap",
    ),
    ("move", errno.ENOENT): (InvalidRange, "the source has holes"),
    ("move", errno.EBUSY): (RangeBusy, "a source page is shared with another process, or pinned"),
    ("read", errno.EINVAL): (InvalidDescriptor, "its handshake has not been done"),
    ("read", errno.EMFILE): (
        UserfaultfdError,
        "a fork waits to be read, but no descriptor is free for the child's userfaultfd",
    ),
}


def from_errno(
    code: int,
    operation: str,
    *,
    address: int | None = None,
    length: int | None = None,
    bytes_done: int = 0,
    detail: str = "",
) -> UserfaultfdError:
    """Make the exception for a failed operation; the only place where an errno is interpreted.

    Args:
        code: the errno.
        operation: the name of the method, or "open", "handshake", "read".
        address: where the operation was to begin.
        length: how many bytes it was to cover.
        bytes_done: how many it did.
        detail: what the caller knows beyond that.

    >>> raise from_errno(errno.EEXIST, "copy", address=0x1000, length=4096)
    Traceback (most recent call last):
    pyuserfaultfd.errors.AlreadyMapped: [Errno 17] copy of 4096 bytes at 0x1000: File exists
    """
    kind, meaning = _SPECIAL.get((operation, code), (_CLASSES.get(code, UserfaultfdError), ""))
    where = "" if length is None else f" of {length} bytes"
    where += "" if address is None else f" at {address:#x}"
    reasons = [meaning, detail]
    if kind is InvalidRange and code == errno.EINVAL:
        reasons[:0] = _misalignments(address, length)
    if kind is PartialResult:
        reasons.append(f"{bytes_done} bytes done")
    told = "; ".join(reason for reason in reasons if reason)
    message = f"{operation}{where}: {os.strerror(code)}" + (f" ({told})" if told else "")
    error = kind(code, message, operation=operation, address=address, length=length)
    if isinstance(error, PartialResult):
        error.bytes_done = bytes_done
    return error


def _misalignments(address: int | None, length: int | None) -> list[str]:
    found = []
    if address is not None and address % _abi.PAGE_SIZE:
        found.append(f"the address is not a multiple of the page size, {_abi.PAGE_SIZE}")
    if length is not None and length % _abi.PAGE_SIZE:
        found.append(f"the length is not a multiple of the page size, {_abi.PAGE_SIZE}")
    if length == 0:
        found.append("the range is empty")
    return found

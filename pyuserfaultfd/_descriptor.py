"""The life of a descriptor: opened or adopted, handed over or closed, once.

A userfaultfd fails open. When its last descriptor closes, all registrations end without a word, the
sleepers wake, and stores go through. So a descriptor that is dropped without close() is worth a
ResourceWarning, and use after close() an error that says so.
"""

from __future__ import annotations

import errno
import os
import warnings
from types import TracebackType
from typing import TypeVar

from . import _system
from ._abi import Feature, Method
from .errors import ClosedError, FeatureUnavailable, InvalidDescriptor

_Self = TypeVar("_Self", bound="Descriptor")


class Descriptor:
    """Owns one descriptor of a userfaultfd."""

    _fd = -1

    def __init__(
        self,
        features: Feature = Feature(0),  # noqa: B008 - immutable
        *,
        optional: Feature = Feature(0),  # noqa: B008
        method: Method = Method.AUTO,
        user_mode_only: bool | None = False,
        cloexec: bool = True,
        nonblock: bool = True,
    ) -> None:
        """Open a userfaultfd for the calling process's memory, and do the handshake.

        Args:
            features: what must be enabled.
            optional: what is enabled where the kernel has it.
            method: by system call or by device; ``self.method`` tells which it became.
            user_mode_only: True leaves out the faults that the kernel takes for the process, which
                gets EFAULT instead; this needs no permission. False includes them. None includes
                them where the process may; ``self.user_mode_only`` tells what it became.
            cloexec: close it in programs that are executed.
            nonblock: needed for poll, for timeouts and for ``events()``.

        Raises:
            PermissionDenied: with what stands in the way, and how to allow it.
            FeatureUnavailable: the kernel lacks some of ``features``.
            NotSupported: the kernel has no userfaultfd.

        >>> from pyuserfaultfd import Feature, UserFaultFD
        >>> with UserFaultFD(optional=Feature.THREAD_ID) as uffd:
        ...     Feature.THREAD_ID in uffd.features, uffd.user_mode_only
        (True, False)
        """
        if optional:
            optional &= supported_features(method, user_mode_only=user_mode_only)
        opened = _system.open_descriptor(
            method, user_mode_only=user_mode_only, cloexec=cloexec, nonblock=nonblock
        )
        try:
            _system.handshake(opened.fd, features | optional)
        except BaseException as error:
            os.close(opened.fd)
            if isinstance(error, InvalidDescriptor):
                # A refused handshake tells nothing; only a second descriptor can be asked what
                # there is.
                # By int, for the inverse of a flag has no bits without a name.
                known = int(supported_features(method, user_mode_only=user_mode_only))
                missing = Feature(int(features) & ~known)
                if missing:
                    raise FeatureUnavailable.lacking(missing) from None
            raise
        self._own(opened.fd, features | optional, opened.method, opened.user_mode_only)

    @classmethod
    def from_fd(cls: type[_Self], fd: int, features: Feature | None = None) -> _Self:
        """Take ownership of a descriptor whose handshake is done, as one received over a socket is.

        Args:
            fd: the descriptor.
            features: what it was opened with; None asks the kernel, through /proc.

        Raises:
            InvalidDescriptor: it is no userfaultfd, by what /proc says; ``fd`` stays the caller's.

        >>> from pyuserfaultfd import Feature, UserFaultFD
        >>> with UserFaultFD(Feature.THREAD_ID) as uffd:
        ...     with UserFaultFD.from_fd(os.dup(uffd.fileno())) as other:
        ...         print(other.features.name)
        THREAD_ID
        """
        if features is None:
            _, features = _system.inspect(fd)
        adopted = cls.__new__(cls)
        adopted._own(fd, features, None, None)
        return adopted

    def _own(
        self, fd: int, features: Feature, method: Method | None, user_mode_only: bool | None
    ) -> None:
        self._fd = fd
        self.features = features
        self.method = method
        self.user_mode_only = user_mode_only

    def fileno(self) -> int:
        """Return the descriptor's number, for poll, select and sending it over a socket.

        Raises:
            ClosedError: after close() or detach().
        """
        if self._fd < 0:
            raise ClosedError(errno.EBADF, "the userfaultfd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether close() or detach() has been called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; if it is the last one, protection ends and sleepers wake.

        Closing twice is allowed.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """Give the descriptor up without closing it, and return its number."""
        fd, self._fd = self.fileno(), -1
        return fd

    def waiting(self) -> _system.Waiting:
        """Return how many threads sleep in a fault of this userfaultfd, as /proc tells it.

        >>> from pyuserfaultfd import UserFaultFD
        >>> with UserFaultFD() as uffd:
        ...     uffd.waiting()
        Waiting(unread=0, total=0)
        """
        return _system.inspect(self.fileno())[0]

    def __enter__(self: _Self) -> _Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the descriptor."""
        self.close()

    def __repr__(self) -> str:
        """Show the descriptor's number and the features."""
        if self._fd < 0:
            return f"<{type(self).__name__} closed>"
        return f"<{type(self).__name__} fd={self._fd} features={self.features!r}>"

    def __del__(self) -> None:
        """Warn about a descriptor that nobody closed, and close it."""
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()


def supported_features(
    method: Method = Method.AUTO, *, user_mode_only: bool | None = None
) -> Feature:
    """Ask the running kernel for all its features, through a descriptor of its own.

    Bits that this package does not know come along unnamed. Having a feature and being permitted to
    enable it are two things: Feature.EVENT_FORK needs CAP_SYS_PTRACE.

    >>> bool(supported_features() & Feature.EVENT_UNMAP)
    True
    """
    opened = _system.open_descriptor(
        method, user_mode_only=user_mode_only, cloexec=True, nonblock=True
    )
    try:
        return _system.handshake(opened.fd, Feature(0))
    finally:
        os.close(opened.fd)

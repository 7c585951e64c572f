"""What the services say to each other: a request, its reply, and the errors in place of one.

A request has a header of a few fixed fields, and the picture. Services in between read the header. How the picture travels is
not written here: the RPC layer puts a small one into the message and passes a large one by reference, or a variant keeps it
elsewhere and sends a handle.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

import msgspec

from dmrpc_cxl.errors import (
    Overloaded,
    PeerLost,
    RefConsumed,
    RemoteError,
    ServiceNotFound,
    WrongArguments,
)

from .bmp import Bytes
from .work import Op, Work


class Header(msgspec.Struct, array_like=True):
    """What services in between read of a request: its first fields, which all have a fixed meaning."""

    req_id: int
    op: Op
    work: Work
    user_id: int
    token: str
    """Proves that the user sent this request: users.py."""
    variant: str
    """How the picture travels: variants.py."""
    image_bytes: int


class Request(Header, array_like=True):
    """A picture, and what is to be done to it."""

    image: Bytes | None = None
    handle: int = 0
    """Of a picture that is kept elsewhere, by a variant that does so."""
    offset: int = 0
    """Where in that the picture begins."""


class Reply(msgspec.Struct, array_like=True):
    """What came of a request."""

    req_id: int
    result_bytes: int = 0
    checksum: int = 0
    result: Bytes | None = None
    handle: int = 0
    """Of a result that is kept elsewhere."""


class Pipeline:
    """The methods of every service, and so of the chain of them."""

    def process(self, request: Request) -> Reply:
        """Have a picture processed."""
        raise NotImplementedError

    def keep(self, request: Request) -> None:
        """Have pictures kept by the service that op names, for requests with the same handle."""
        raise NotImplementedError

    def forget(self, request: Request) -> None:
        """End that."""
        raise NotImplementedError


# ---------------------------------------------------------------- what goes wrong


class Status(IntEnum):
    """How a request ended, in one number."""

    OK = 200
    BLOCKED = 403
    UNSUPPORTED = 415
    NO_WORKER = 503


class RequestFailed(Exception):
    """A request came back without a result."""

    status: ClassVar[Status]


class Blocked(RequestFailed, PermissionError):
    """The firewall does not know the user, or the token is not the user's."""

    status = Status.BLOCKED


class UnsupportedImage(RequestFailed, ValueError):
    """This is no picture that the services understand, or no request."""

    status = Status.UNSUPPORTED


class NoWorker(RequestFailed, ConnectionError):
    """A service that is needed cannot be reached, or died with the picture in hand."""

    status = Status.NO_WORKER


_RAISED_THERE = {
    f"{kind.__module__}.{kind.__qualname__}": kind for kind in (Blocked, UnsupportedImage)
}
_GONE = (PeerLost, ServiceNotFound, Overloaded, RefConsumed)


def failure_of(error: BaseException) -> RequestFailed | None:
    """Return what an error of a call means to a client; None: nothing that is foreseen.

    What a service raised arrives as RemoteError with the name of its type. RefConsumed: whoever had the picture died.
    """
    if isinstance(error, RemoteError) and error.remote_type in _RAISED_THERE:
        return _RAISED_THERE[error.remote_type](str(error))
    if isinstance(error, WrongArguments):
        return UnsupportedImage(str(error))
    return NoWorker(str(error)) if isinstance(error, _GONE) else None

"""What the services say to each other: a request, its reply, and what a client is told when it gets no picture.

A request has a header of a few fixed fields, and the picture. Services in between read the header. How the picture travels is
not written here: the RPC layer puts a small one into the message and passes a large one by reference, or a variant keeps it
elsewhere and sends a handle.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

import msgspec

from .bmp import Bytes
from .work import EMPTY, Op, Work


class Status(IntEnum):
    """How a request ended."""

    OK = 200
    BLOCKED = 403
    UNSUPPORTED = 415
    NO_WORKER = 503


class Request(msgspec.Struct, array_like=True):
    """A picture, and what is to be done to it."""

    req_id: int
    op: Op
    work: Work
    user_id: int
    token: str
    """Proves that the user sent this request: users.py."""
    variant: str
    """How the picture travels: variants.py."""
    image_bytes: int
    image: Bytes = EMPTY
    handle: int = 0
    """Of a picture that is kept elsewhere, by a variant that does so."""
    offset: int = 0
    """Where in that the picture begins."""


class Reply(msgspec.Struct, array_like=True):
    """What became of a request."""

    req_id: int
    status: Status
    result_bytes: int = 0
    result: Bytes = EMPTY
    handle: int = 0
    checksum: int = 0
    why: str = ""


class Pipeline:
    """The methods of every service, and so of the chain of them."""

    def process(self, request: Request) -> Reply:
        """Have a picture processed."""
        raise NotImplementedError

    def keep(self, request: Request) -> Reply:
        """Have pictures kept by the service that op names, for requests with the same handle."""
        raise NotImplementedError

    def forget(self, request: Request) -> Reply:
        """End that."""
        raise NotImplementedError


# ---------------------------------------------------------------- what a client raises


class RequestFailed(Exception):
    """A request came back without a result."""

    status: ClassVar[Status]


class Blocked(RequestFailed, PermissionError):
    """The firewall does not know the user, or the token is not the user's."""

    status = Status.BLOCKED


class UnsupportedImage(RequestFailed, ValueError):
    """This is no picture that the services understand."""

    status = Status.UNSUPPORTED


class NoWorker(RequestFailed, ConnectionError):
    """A service that is needed cannot be reached, or died with the picture in hand."""

    status = Status.NO_WORKER


_FAILURES = {kind.status: kind for kind in (Blocked, UnsupportedImage, NoWorker)}


def failure_of(reply: Reply) -> RequestFailed | None:
    """Return what to raise for a reply; None: it has a result."""
    if reply.status == Status.OK:
        return None
    return _FAILURES[reply.status](f"request {reply.req_id}: {int(reply.status)} {reply.why}")

"""What is kept and what is said: posts, and the request and the reply that pass through all services in front.

A post is kept encoded, by msgpack, and stays so until whoever asked for it looks at it. A list of posts that follow each other in
memory is itself a msgpack list: see assemble().
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

import dmrpc_cxl
from dmrpc_cxl.errors import (
    Overloaded,
    PeerLost,
    RefConsumed,
    RemoteError,
    ServiceNotFound,
    ServiceStopping,
)

Bytes: TypeAlias = npt.NDArray[np.uint8]


class PostType(IntEnum):
    """What a post is."""

    POST = 0
    REPOST = 1
    REPLY = 2
    DM = 3


class Creator(msgspec.Struct, array_like=True):
    """Who wrote a post."""

    user_id: int
    username: str


class UserMention(msgspec.Struct, array_like=True):
    """Somebody named in a text."""

    user_id: int
    username: str


class Media(msgspec.Struct, array_like=True):
    """A picture or a film, kept elsewhere."""

    media_id: int
    media_type: str
    content: bytes = b""
    """Of the profile "media" only; elsewhere somebody else keeps it."""


class Url(msgspec.Struct, array_like=True):
    """A link, and what stands for it in the text."""

    shortened_url: str
    expanded_url: str


class Text(msgspec.Struct, array_like=True):
    """A text with its links shortened, and what is in it."""

    text: str
    user_mentions: list[UserMention]
    urls: list[Url]


class Post(msgspec.Struct, array_like=True):
    """A post as it is kept."""

    post_id: int
    creator: Creator
    req_id: int
    text: str
    user_mentions: list[UserMention]
    media: list[Media]
    urls: list[Url]
    timestamp: int
    """Milliseconds since 1970."""
    post_type: PostType


class Kind(IntEnum):
    """What is asked for."""

    COMPOSE = 0
    HOME_TIMELINE = 1
    USER_TIMELINE = 2
    REGISTER = 3
    FOLLOW = 4


class Header(msgspec.Struct, array_like=True):
    """What services in front read of a request."""

    kind: Kind
    req_id: int
    variant: str
    """How a list of posts travels: variants.py."""


class Request(Header, array_like=True):
    """A request, as it passes from the load balancer to the service that carries it out."""

    user_id: int = 0
    start: int = 0
    stop: int = 0
    body: Bytes | None = None
    """Of writes: a Compose, Register or Follow, encoded."""


class Reply(msgspec.Struct, array_like=True):
    """What came of it: a list of posts, in one piece or each for itself."""

    req_id: int
    posts: Bytes | None = None
    each: list[dmrpc_cxl.AnyRef] = []


class Compose(msgspec.Struct, array_like=True):
    """A post to be."""

    username: str
    user_id: int
    text: str
    media_ids: list[int]
    media_types: list[str]
    post_type: PostType
    contents: list[bytes] = []
    """Of the media, if they are kept with the post; as many, or none."""


class Register(msgspec.Struct, array_like=True):
    """A user to be."""

    first_name: str
    last_name: str
    username: str
    password: str
    user_id: int


class Follow(msgspec.Struct, array_like=True):
    """Who wants to follow whom: by names, or by numbers where the names are empty."""

    user_name: str = ""
    followee_name: str = ""
    user_id: int = -1
    followee_id: int = -1


class BadRequest(ValueError):
    """A request that makes no sense; says why."""


class Taken(ValueError):
    """There is such a user already."""


class Unknown(LookupError):
    """There is no such user or post."""


class Unavailable(ConnectionError):
    """A service that is needed cannot be reached, or died before it was done."""


_OURS = (BadRequest, Taken, Unknown, Unavailable)
_GONE = (PeerLost, ServiceNotFound, Overloaded, RefConsumed)  # the last: whoever had the posts died


def _names(kinds: tuple[type[Exception], ...]) -> dict[str, type[Exception]]:
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}


_BY_NAME = {**_names(_OURS), **dict.fromkeys(_names((*_GONE, ServiceStopping)), Unavailable)}


def failure_of(error: BaseException) -> Exception | None:
    """Return what an error of a call means here, wherever it was raised; None: nothing that is foreseen."""
    if isinstance(error, RemoteError):
        kind = _BY_NAME.get(error.remote_type)
        return None if kind is None else kind(str(error))
    return Unavailable(str(error)) if isinstance(error, _GONE) else None


class Front:
    """The one method of the services in front, and of those behind them."""

    def handle(self, request: Request) -> Reply:
        """Carry a request out.

        Raises:
            BadRequest, Taken, Unknown, Unavailable: to the caller as RemoteError, also of the built-in type.
        """
        raise NotImplementedError


Record = TypeVar("Record", bound=msgspec.Struct)


def encoded(what: msgspec.Struct) -> Bytes:
    """Return a record as bytes."""
    return np.frombuffer(msgspec.msgpack.encode(what), np.uint8)


def decoded(body: Bytes | None, kind: type[Record]) -> Record:
    """Read the body of a request.

    Raises:
        BadRequest: it is none of that kind.
    """
    if body is None:
        raise BadRequest(f"a {kind.__name__.lower()} request without a body")
    try:
        return msgspec.msgpack.decode(body.data, type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"not a {kind.__name__.lower()} request: {error}") from None


def list_head(n: int) -> bytes:
    """Return what a msgpack list of n items begins with."""
    if n < 16:
        return bytes([0x90 | n])
    return b"\xdc" + n.to_bytes(2, "big") if n < 1 << 16 else b"\xdd" + n.to_bytes(4, "big")


def assemble(posts: Sequence[bytes | memoryview]) -> bytes:
    """Return encoded posts as one encoded list."""
    return b"".join((list_head(len(posts)), *posts))

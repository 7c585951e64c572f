"""The wire protocol of the RPC layer, without I/O.

Everything on a connection is a frame::

    0     4    5     6        8         16           24       28         32       36          40
    ┌─────┬────┬─────┬────────┬─────────┬────────────┬────────┬──────────┬────────┬───────────┬──────┬──────────┬──────┬────────┐
    │size │kind│flags│nr_refs │ call id │time left us│ method │meta bytes│  body  │inline from│ Refs │ metadata │ body │ inline │
    └─────┴────┴─────┴────────┴─────────┴────────────┴────────┴──────────┴────────┴───────────┴──────┴──────────┴──────┴────────┘
      u32   u8   u8     u16       u64        u64         u32       u32       u32       u32      40 each

Little-endian. ``size`` counts the whole frame. Refs stand before everything that would have to be decoded, so that whoever
passes a frame on, or gives up on it, can find them. ``inline from`` is where arrays sent by value begin, a multiple of 64
(0: there are none); the body, msgpack unless PICKLED, says what they are.

What goes where::

    client                                   server
    HELLO    who, which protocol, secret ──▶
                                         ◀── WELCOME  the methods of the service     or ERROR
    CALL     id, method, arguments       ──▶
                                         ◀── REPLY    id, result                     or ERROR  id, what went wrong
    CANCEL   id                          ──▶
    DISCARD  id: nobody took the reply   ──▶
                                         ◀── GOAWAY   no new calls, please

A frame that breaks a rule raises RemoteProtocolError; the connection is of no use afterwards.
"""

from __future__ import annotations

import enum
import struct
from typing import TypeVar

import msgspec

from .._native import FRAME_LIMITS, Frame
from .._native import frame_head as head
from .._native import parse_frame as parse
from ..errors import RemoteProtocolError

__all__ = [
    "HEADER_BYTES",
    "PROTOCOL",
    "REF_BYTES",
    "Code",
    "ErrorBody",
    "Flag",
    "Frame",
    "Hello",
    "Kind",
    "Welcome",
    "head",
    "parse",
    "short",
]

PROTOCOL = 2
HEADER_BYTES = FRAME_LIMITS["header_bytes"]
REF_BYTES = FRAME_LIMITS["ref_bytes"]
MAX_REFS = FRAME_LIMITS["max_refs"]
MAX_FRAME_BYTES = FRAME_LIMITS["max_bytes"]
MAX_META_BYTES = FRAME_LIMITS["max_meta_bytes"]
INLINE_ALIGNMENT = FRAME_LIMITS["alignment"]
MAGIC = b"DmRPC\r\n\x00"


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    CALL = 3
    REPLY = 4
    ERROR = 5
    CANCEL = 6
    DISCARD = 7
    GOAWAY = 8


class Flag(enum.IntFlag):
    """How a body is to be read, and how the caller wants its result."""

    PICKLED = 1
    BLOBS = 2  # bytes went by Ref or inline: see marshal.py
    VALUE = 4  # results by value
    REF = 8  # results by Ref
    COPY = 12  # results by Ref, copied eagerly
    NO_POOL = 16  # ... but not to the pool: the caller does not reach it
    SERVERS = 32  # ... and to memory servers, if need be


# Plain integers for what every call does: operators of IntFlag cost as much as the rest of a small call.
CALL, REPLY, ERROR = int(Kind.CALL), int(Kind.REPLY), int(Kind.ERROR)
PICKLED, BLOBS = int(Flag.PICKLED), int(Flag.BLOBS)
SPECIAL_FLAGS = PICKLED | BLOBS
KNOWN_FLAGS = FRAME_LIMITS["known_flags"]
TRANSFER_MASK = 12
NO_POOL, SERVERS_TOO = int(Flag.NO_POOL), int(Flag.SERVERS)


class Code(enum.IntEnum):
    """Why a call failed: the ``method`` field of an ERROR frame."""

    REMOTE = 1  # the method raised
    UNKNOWN_METHOD = 2
    BAD_ARGUMENTS = 3
    OVERLOADED = 4
    DEADLINE = 5
    CANCELLED = 6
    STOPPING = 7
    DENIED = 8
    VERSION = 9
    BAD_RESULT = 10  # it could not be sent
    BAD_REF = 11  # an argument's Ref could not be accepted
    PEER = 12  # a forwarder lost its backend
    NOT_ALLOWED = 13  # pickled arguments to a service that does not take them
    UNKNOWN_SERVICE = 14


def short(kind: int, call_id: int = 0) -> bytes:
    """Return a frame that is all header: CANCEL, DISCARD, GOAWAY."""
    return head(kind, call_id)


def readdress(frame: Frame, call_id: int) -> None:
    """Give a frame that is passed on another call id, in place."""
    struct.pack_into("<Q", frame.data, 8, call_id)


# ---------------------------------------------------------------- bodies that the layer itself reads


class Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """First frame of a client."""

    magic: bytes
    protocol: int
    fabric_id: int
    secret: bytes
    service: str
    transport: str  # "ring" or "tcp"


class Method(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a client has to know of a method; its id is its place in the list."""

    name: str
    parameters: tuple[str, ...]
    nr_required: int
    signature: str
    doc: str | None = None


class Welcome(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Answer to HELLO."""

    protocol: int
    service: str
    methods: tuple[Method, ...]
    host_id: int
    pickle: bool
    max_frame: int
    reach: tuple[str, ...] = ("pool",)  # where Refs may lie: see places.py


class ErrorBody(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What went wrong with a call."""

    type: str
    message: str
    traceback: str = ""
    builtins: tuple[str, ...] = ()  # the built-in exceptions it is one of, most derived first


_hello = msgspec.msgpack.Decoder(Hello)
_welcome = msgspec.msgpack.Decoder(Welcome)
_error = msgspec.msgpack.Decoder(ErrorBody)
_meta = msgspec.msgpack.Decoder(dict[str, str])
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(body: Hello | Welcome | ErrorBody | dict[str, str]) -> bytes:
    """Return a body of the layer itself."""
    return _encoder.encode(body)


def _decode(decoder: msgspec.msgpack.Decoder[T], raw: bytes | memoryview, what: str) -> T:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"{what} that cannot be read: {error}") from None


def read_hello(frame: Frame) -> Hello:
    """Read the body of HELLO."""
    if frame.kind != Kind.HELLO:
        raise RemoteProtocolError(f"HELLO comes first, not a frame of kind {frame.kind}")
    hello: Hello = _decode(_hello, frame.body, "a HELLO")
    if hello.magic != MAGIC:
        raise RemoteProtocolError("a HELLO of another protocol")
    return hello


def read_welcome(frame: Frame) -> Welcome:
    """Read the body of WELCOME."""
    return _decode(_welcome, frame.body, "a WELCOME")


def read_error(frame: Frame) -> ErrorBody:
    """Read the body of ERROR."""
    return _decode(_error, frame.body, "an ERROR")


def read_meta(frame: Frame) -> dict[str, str]:
    """Read the metadata of a CALL."""
    return read_meta_bytes(frame.meta) if frame.meta_bytes else {}


def read_meta_bytes(meta: bytes | memoryview) -> dict[str, str]:
    """Read metadata."""
    return _decode(_meta, meta, "metadata") if meta else {}

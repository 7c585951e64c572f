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
from typing import NamedTuple

import msgspec

from ..errors import LocalProtocolError, RemoteProtocolError

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
    "parse",
    "short",
]

PROTOCOL = 1
HEADER = struct.Struct("<IBBHQQIIII")
HEADER_BYTES = HEADER.size
REF_BYTES = 40
MAX_REFS = 0xFFFF
MAX_FRAME_BYTES = 1 << 30
MAX_META_BYTES = 64 << 10
INLINE_ALIGNMENT = 64
MAGIC = b"DmRPC\r\n\x00"

assert HEADER_BYTES == 40


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


KNOWN_FLAGS = 15
TRANSFER_MASK = 12


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


class Frame(NamedTuple):
    """A checked frame; everything but ``data`` is read off its header."""

    kind: int
    flags: int
    nr_refs: int
    call_id: int
    time_left_us: int
    method: int
    meta_bytes: int
    body_bytes: int
    inline_at: int
    data: bytearray | bytes | memoryview

    @property
    def refs(self) -> memoryview:
        """The Refs, 40 bytes each."""
        return memoryview(self.data)[HEADER_BYTES : HEADER_BYTES + REF_BYTES * self.nr_refs]

    @property
    def meta(self) -> memoryview:
        """The call's metadata, msgpack; may be empty."""
        at = HEADER_BYTES + REF_BYTES * self.nr_refs
        return memoryview(self.data)[at : at + self.meta_bytes]

    @property
    def body(self) -> memoryview:
        """The arguments, the result or the error."""
        at = HEADER_BYTES + REF_BYTES * self.nr_refs + self.meta_bytes
        return memoryview(self.data)[at : at + self.body_bytes]


_KINDS = frozenset(Kind)


def parse(data: bytearray | bytes | memoryview) -> Frame:
    """Read and check the header of a whole frame.

    Raises:
        RemoteProtocolError: it says something that cannot be.
    """
    try:
        size, *fields = HEADER.unpack_from(data)
    except struct.error:
        raise RemoteProtocolError(f"a frame of {len(data)} bytes has no header") from None
    frame = Frame(*fields, data)
    end = HEADER_BYTES + REF_BYTES * frame.nr_refs + frame.meta_bytes + frame.body_bytes
    inline_at = frame.inline_at
    if size != len(data):
        raise RemoteProtocolError(f"a frame of {len(data)} bytes says that it has {size}")
    if frame.kind not in _KINDS:
        raise RemoteProtocolError(f"a frame of unknown kind {frame.kind}")
    if frame.flags & ~KNOWN_FLAGS:
        raise RemoteProtocolError(f"a frame with unknown flags {frame.flags:#x}")
    if frame.meta_bytes > MAX_META_BYTES:
        raise RemoteProtocolError(
            f"{frame.meta_bytes} bytes of metadata; {MAX_META_BYTES} are allowed"
        )
    if inline_at:
        if inline_at % INLINE_ALIGNMENT or not end <= inline_at <= size:
            raise RemoteProtocolError(f"inline data cannot begin at byte {inline_at} of {size}")
    elif end != size:
        raise RemoteProtocolError(f"the parts of a frame of {size} bytes have {end}")
    return frame


def head(
    kind: int,
    call_id: int,
    *,
    flags: int = 0,
    refs: bytes | bytearray = b"",
    meta: bytes = b"",
    body: bytes = b"",
    method: int = 0,
    time_left_us: int = 0,
    inline_bytes: int = 0,
) -> bytes:
    """Return a frame up to its inline part, which has inline_bytes.

    Raises:
        LocalProtocolError: it would be larger than a frame can be.
    """
    nr_refs = len(refs) // REF_BYTES
    end = HEADER_BYTES + len(refs) + len(meta) + len(body)
    inline_at = (
        (end + INLINE_ALIGNMENT - 1) // INLINE_ALIGNMENT * INLINE_ALIGNMENT if inline_bytes else 0
    )
    size = inline_at + inline_bytes if inline_bytes else end
    if size > MAX_FRAME_BYTES or nr_refs > MAX_REFS or len(meta) > MAX_META_BYTES:
        raise LocalProtocolError(
            f"a message of {size} bytes with {nr_refs} Refs and {len(meta)} bytes of metadata; allowed are "
            f"{MAX_FRAME_BYTES}, {MAX_REFS} and {MAX_META_BYTES}: send large arguments by Ref, and fewer of them"
        )
    packed = HEADER.pack(
        size, kind, flags, nr_refs, call_id, time_left_us, method, len(meta), len(body), inline_at
    )
    if inline_bytes:
        return b"".join((packed, refs, meta, body, bytes(inline_at - end)))
    if refs or meta:
        return b"".join((packed, refs, meta, body))
    return packed + body


def short(kind: int, call_id: int = 0) -> bytes:
    """Return a frame that is all header: CANCEL, DISCARD, GOAWAY."""
    return HEADER.pack(HEADER_BYTES, kind, 0, 0, call_id, 0, 0, 0, 0, 0)


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


def encode(body: Hello | Welcome | ErrorBody | dict[str, str]) -> bytes:
    """Return a body of the layer itself."""
    return _encoder.encode(body)


def _decode(decoder: msgspec.msgpack.Decoder[object], raw: memoryview, what: str) -> object:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"{what} that cannot be read: {error}") from None


def read_hello(frame: Frame) -> Hello:
    """Read the body of HELLO."""
    if frame.kind != Kind.HELLO:
        raise RemoteProtocolError(f"HELLO comes first, not a frame of kind {frame.kind}")
    hello: Hello = _decode(_hello, frame.body, "a HELLO")  # type: ignore[assignment]
    if hello.magic != MAGIC:
        raise RemoteProtocolError("a HELLO of another protocol")
    return hello


def read_welcome(frame: Frame) -> Welcome:
    """Read the body of WELCOME."""
    return _decode(_welcome, frame.body, "a WELCOME")  # type: ignore[return-value]


def read_error(frame: Frame) -> ErrorBody:
    """Read the body of ERROR."""
    return _decode(_error, frame.body, "an ERROR")  # type: ignore[return-value]


def read_meta(frame: Frame) -> dict[str, str]:
    """Read the metadata of a CALL."""
    if not frame.meta_bytes:
        return {}
    return _decode(_meta, frame.meta, "metadata")  # type: ignore[return-value]

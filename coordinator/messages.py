"""What the messages of csrc/wire.h carry: one codec for each payload, and the tables that say which
belongs where.

Numbers and layouts come from the header through `_native.WIRE`. The names of the fields stand here
once more, so that tools that read Python know them; that they are the header's is checked when this
module is imported.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from dmrpc_cxl._native import WIRE
from dmrpc_cxl.errors import LocalProtocolError, RemoteProtocolError

from .extents import Run

MAGIC: int = WIRE["magic"]
VERSION: int = WIRE["version"]
MAX_PAYLOAD: int = WIRE["max_payload"]

_TYPES: Mapping[str, int] = WIRE["types"]
_STATUS: Mapping[str, int] = WIRE["status"]


class MsgType(IntEnum):
    """Message types."""

    HELLO = _TYPES["HELLO"]
    REGISTER = _TYPES["REGISTER"]
    REJOIN = _TYPES["REJOIN"]
    GUARD = _TYPES["GUARD"]
    GRANT = _TYPES["GRANT"]
    RETURN = _TYPES["RETURN"]
    LEAVE = _TYPES["LEAVE"]
    PUBLISH = _TYPES["PUBLISH"]
    WITHDRAW = _TYPES["WITHDRAW"]
    LOOKUP = _TYPES["LOOKUP"]
    LIST = _TYPES["LIST"]
    STATS = _TYPES["STATS"]
    HOSTS = _TYPES["HOSTS"]
    SHUTDOWN = _TYPES["SHUTDOWN"]
    WAIT = _TYPES["WAIT"]
    CHECK = _TYPES["CHECK"]
    NOTIFY_RECALL = _TYPES["NOTIFY_RECALL"]
    NOTIFY_FENCED = _TYPES["NOTIFY_FENCED"]


class Status(IntEnum):
    """Status of a reply."""

    OK = _STATUS["OK"]
    BAD_REQUEST = _STATUS["BAD_REQUEST"]
    DENIED = _STATUS["DENIED"]
    VERSION_MISMATCH = _STATUS["VERSION_MISMATCH"]
    NO_FRAMES = _STATUS["NO_FRAMES"]
    NO_HOST_SLOT = _STATUS["NO_HOST_SLOT"]
    NOT_REGISTERED = _STATUS["NOT_REGISTERED"]
    FENCED = _STATUS["FENCED"]
    NOT_FOUND = _STATUS["NOT_FOUND"]
    EXISTS = _STATUS["EXISTS"]
    QUOTA = _STATUS["QUOTA"]
    INTERNAL = _STATUS["INTERNAL"]
    SHUTTING_DOWN = _STATUS["SHUTTING_DOWN"]
    TABLE_FULL = _STATUS["TABLE_FULL"]


class Header(NamedTuple):
    """struct dm_msg_header."""

    magic: int
    version: int
    type: int
    status: int
    length: int
    request: int


class Hello(NamedTuple):
    """struct dm_msg_hello."""

    fabric_id: int
    secret: bytes


class HelloReply(NamedTuple):
    """struct dm_msg_hello_reply."""

    epoch: int


class Register(NamedTuple):
    """struct dm_msg_register; the name is UTF-8, ended by a zero byte unless it fills its field."""

    token: int
    start_time: int
    pid: int
    low: int
    high: int
    batch: int
    name: bytes


class Registered(NamedTuple):
    """struct dm_msg_registered."""

    incarnation: int
    epoch: int
    host: int
    low: int
    high: int
    batch: int
    batch_max: int
    frame_limit: int


class Rejoin(NamedTuple):
    """struct dm_msg_rejoin."""

    incarnation: int
    host: int
    reserved: int = 0


class Grant(NamedTuple):
    """struct dm_msg_grant."""

    want: int
    min_run: int = 0


class Recall(NamedTuple):
    """struct dm_msg_recall."""

    want: int
    keep: int = 0


# ---------------------------------------------------------------- codecs


class Codec(NamedTuple):
    """How one payload is written and read, and how long it may be."""

    shortest: int
    longest: int
    multiple_of: int
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]

    def fits(self, length: int) -> bool:
        """Tell whether a payload can have that length."""
        return self.shortest <= length <= self.longest and length % self.multiple_of == 0


def _layout(name: str, fields: tuple[str, ...]) -> struct.Struct:
    """Return the layout of a C struct, which has these fields."""
    layout, known = WIRE["structs"][name]
    if fields != known:
        raise ImportError(f"{name} has the fields {known} in wire.h, but {fields} here")
    return struct.Struct(layout)


HEADER = _layout("header", Header._fields)
RUN = _layout("run", Run._fields)


def _fixed(name: str, body: type[NamedTuple]) -> Codec:
    """Make the codec of a C struct."""
    packer = _layout(name, body._fields)

    def encode(value: Any) -> bytes:
        try:
            return packer.pack(*value)
        except (struct.error, TypeError) as error:
            raise LocalProtocolError(f"cannot send {value!r}: {error}") from None

    def decode(payload: bytes) -> Any:
        return body(*packer.unpack(payload))

    return Codec(packer.size, packer.size, 1, encode, decode)


def _encode_runs(runs: Any) -> bytes:
    try:
        payload = b"".join(RUN.pack(pfn, count) for pfn, count in runs)
    except (struct.error, TypeError, ValueError) as error:
        raise LocalProtocolError(f"cannot send these runs: {error}") from None
    if len(payload) > MAX_PAYLOAD:
        raise LocalProtocolError(f"a message has {MAX_PAYLOAD // RUN.size} runs at most")
    return payload


def _encode_some_runs(runs: Any) -> bytes:
    payload = _encode_runs(runs)
    if not payload:
        raise LocalProtocolError("this message has one run at least")
    return payload


def _decode_runs(payload: bytes) -> list[Run]:
    return [Run(*fields) for fields in RUN.iter_unpack(payload)]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _encode_json(value: Any) -> bytes:
    try:
        payload = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise LocalProtocolError(f"cannot send this as JSON: {error}") from None
    if not isinstance(value, dict):
        raise LocalProtocolError("a payload is a JSON object")
    if len(payload) > MAX_PAYLOAD:
        raise LocalProtocolError(f"{len(payload)} bytes of JSON do not fit into a message")
    return payload


def _decode_json(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the payload is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError("the payload is not a JSON object")
    return value


def _encode_nothing(value: Any) -> bytes:
    if value is not None:
        raise LocalProtocolError("this message carries nothing")
    return b""


EMPTY = Codec(0, 0, 1, _encode_nothing, lambda payload: None)
JSON = Codec(2, MAX_PAYLOAD, 1, _encode_json, _decode_json)
RUNS = Codec(0, MAX_PAYLOAD, RUN.size, _encode_runs, _decode_runs)
SOME_RUNS = Codec(RUN.size, MAX_PAYLOAD, RUN.size, _encode_some_runs, _decode_runs)
HELLO = _fixed("hello", Hello)
HELLO_REPLY = _fixed("hello_reply", HelloReply)
REGISTER = _fixed("register", Register)
REGISTERED = _fixed("registered", Registered)
REJOIN = _fixed("rejoin", Rejoin)
GRANT = _fixed("grant", Grant)
RECALL = _fixed("recall", Recall)


# ---------------------------------------------------------------- which payload belongs where

REQUESTS: Mapping[MsgType, Codec] = {
    MsgType.HELLO: HELLO,
    MsgType.REGISTER: REGISTER,
    MsgType.REJOIN: REJOIN,
    MsgType.GUARD: REJOIN,
    MsgType.GRANT: GRANT,
    MsgType.RETURN: RUNS,
    MsgType.LEAVE: EMPTY,
    MsgType.PUBLISH: JSON,
    MsgType.WITHDRAW: JSON,
    MsgType.LOOKUP: JSON,
    MsgType.LIST: JSON,
    MsgType.STATS: JSON,
    MsgType.HOSTS: JSON,
    MsgType.SHUTDOWN: JSON,
    MsgType.WAIT: JSON,
    MsgType.CHECK: JSON,
}
REPLIES: Mapping[MsgType, Codec] = {
    **{kind: JSON for kind, codec in REQUESTS.items() if codec is JSON},
    MsgType.HELLO: HELLO_REPLY,
    MsgType.REGISTER: REGISTERED,
    MsgType.REJOIN: REGISTERED,
    MsgType.GUARD: EMPTY,
    MsgType.GRANT: SOME_RUNS,
    MsgType.RETURN: EMPTY,
    MsgType.LEAVE: EMPTY,
}
NOTICES: Mapping[MsgType, Codec] = {
    MsgType.NOTIFY_RECALL: RECALL,
    MsgType.NOTIFY_FENCED: EMPTY,
}

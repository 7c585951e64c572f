"""The coordinator's protocol without I/O: bytes in, messages out, and who may say what when.

Either end of a connection owns one object, `CoordinatorSide` or `PeerSide`: bytes that arrive are
given to `feed`, complete messages are taken with `next_message`, and what is to be sent comes back
as bytes. What the other end does wrong raises Malformed, a RemoteProtocolError, and nothing else;
the connection is of no use afterwards. What this end does wrong raises LocalProtocolError.

States of a connection, as both ends see it::

              HELLO         REGISTER, REJOIN
    STRANGER ------> GUEST ------------------> HOST      one request at a time, each is answered
                       |  <------------------   |
                       |         LEAVE          |
                       +-----------+------------+
                                   | GUARD
                                   v
                                 GUARD                   only the coordinator speaks: NOTIFY_*
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from dmrpc_cxl.errors import LocalProtocolError, RemoteProtocolError

from .messages import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    NOTICES,
    REPLIES,
    REQUESTS,
    VERSION,
    Codec,
    Header,
    MsgType,
    Status,
)


class State(Enum):
    """How far a connection has come."""

    STRANGER = "stranger"
    GUEST = "guest"
    HOST = "host"
    GUARD = "guard"


_ANY_TIME = frozenset(REQUESTS) - {MsgType.HELLO}

ALLOWED: Mapping[State, frozenset[MsgType]] = {
    State.STRANGER: frozenset({MsgType.HELLO}),
    State.GUEST: _ANY_TIME,  # what needs a host is answered with NOT_REGISTERED
    State.HOST: _ANY_TIME,
    State.GUARD: frozenset(),
}
"""Which requests a peer may send in which state; any other one ends the connection."""

AFTER: Mapping[MsgType, State] = {
    MsgType.HELLO: State.GUEST,
    MsgType.REGISTER: State.HOST,
    MsgType.REJOIN: State.HOST,
    MsgType.LEAVE: State.GUEST,
    MsgType.GUARD: State.GUARD,
}
"""State that follows when a request of this type was answered with OK; any other type changes
nothing.
"""

NEEDS_HOST = frozenset(
    {MsgType.GRANT, MsgType.RETURN, MsgType.LEAVE, MsgType.PUBLISH, MsgType.WITHDRAW}
)
"""Requests that only a connection in state HOST gets anything for."""


class Malformed(RemoteProtocolError):
    """Bytes that break the protocol, with what a reply to them needs."""

    def __init__(
        self, text: str, status: Status = Status.BAD_REQUEST, header: Header | None = None
    ) -> None:
        """Describe the offence; `header` is that of the offending message, if there was one."""
        super().__init__(text)
        self.status = status
        self.header = header

    def __reduce__(self) -> tuple[type[Malformed], tuple[str, Status, Header | None]]:
        """Pickle: an exception's own way keeps only what its base class was given."""
        return Malformed, (str(self), self.status, self.header)


class Request(NamedTuple):
    """A request, as it reaches the coordinator."""

    type: MsgType
    request: int
    body: Any


class Reply(NamedTuple):
    """An answer, as it reaches the peer; `text` says why when `status` is not OK."""

    type: MsgType
    request: int
    status: Status
    body: Any
    text: str


class Notice(NamedTuple):
    """What the coordinator says on a guard connection."""

    type: MsgType
    body: Any


def _pack(kind: int, status: int, payload: bytes, request: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, status, len(payload), request) + payload


class _Side(ABC):
    """What both ends have in common: cutting the stream into messages, and the state."""

    def __init__(self) -> None:
        self.state = State.STRANGER
        self._buffer = bytearray()
        self._header: Header | None = None
        self._codec: Codec | None = None
        self._broken: Malformed | None = None
        self._pending: tuple[MsgType, int] | None = None  # the request that is not answered yet

    @property
    def in_message(self) -> bool:
        """Tell whether a message has begun to arrive and is not complete."""
        return self._header is not None or bool(self._buffer)

    @property
    def buffered(self) -> int:
        """Number of bytes that arrived and were not looked at."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes that arrived."""
        self._buffer += data

    def _next(self) -> tuple[Header, Any] | None:
        """Cut the next message off the buffer; None when it is not complete.

        A header is judged as soon as it is there, so nobody makes this end wait for, or keep, a
        payload that cannot be right.
        """
        if self._broken is not None:
            raise self._broken
        try:
            if self._header is None:
                if len(self._buffer) < HEADER.size:
                    self._judge_beginning()
                    return None
                header = Header._make(HEADER.unpack_from(self._buffer))
                del self._buffer[: HEADER.size]
                self._codec = self._judge(header)
                self._header = header
            if len(self._buffer) < self._header.length:
                return None
            header, codec, self._header = self._header, self._codec, None
            payload = bytes(self._buffer[: header.length])
            del self._buffer[: header.length]
            return header, self._decode(header, codec, payload)
        except Malformed as error:
            self._broken = error
            self._buffer.clear()
            raise

    def _judge_beginning(self) -> None:
        """Refuse what does not even begin like a message, before a whole header of it is there."""
        magic = MAGIC.to_bytes(4, "little")
        if not magic.startswith(self._buffer[:4]):
            raise Malformed("this is not the coordinator's protocol")

    def _judge(self, header: Header) -> Codec | None:
        """Check a header. Returns the codec of its payload, None for the text of a refusal."""
        if header.magic != MAGIC:
            raise Malformed("this is not the coordinator's protocol")
        if header.version != VERSION:
            raise Malformed(
                f"version {header.version} of the coordinator's protocol, here it is {VERSION}: "
                "the coordinator and all hosts have to run the same release",
                Status.VERSION_MISMATCH,
                header,
            )
        if header.length > MAX_PAYLOAD:
            raise Malformed(f"a payload of {header.length} bytes", header=header)
        codec = self._accept(header)
        if codec is not None and not codec.fits(header.length):
            raise Malformed(
                f"a payload of {header.length} bytes for type {header.type}", header=header
            )
        return codec

    @abstractmethod
    def _accept(self, header: Header) -> Codec | None:
        """Check that the message may come now. Returns the codec of its payload."""

    def _decode(self, header: Header, codec: Codec | None, payload: bytes) -> Any:
        if codec is None:
            return payload.decode(errors="replace")
        try:
            return codec.decode(payload)
        except RemoteProtocolError as error:
            raise Malformed(str(error), header=header) from None


class CoordinatorSide(_Side):
    """The coordinator's end of a connection."""

    def next_message(self) -> Request | None:
        """Return the next complete request, None when there is none.

        Raises:
            Malformed: the peer broke the protocol.
        """
        found = self._next()
        if found is None:
            return None
        header, body = found
        kind = MsgType(header.type)
        self._pending = (kind, header.request)
        return Request(kind, header.request, body)

    def reply(self, request: Request, body: Any = None) -> bytes:
        """Answer a request with OK."""
        payload = REPLIES[request.type].encode(body)
        self._answered(request)
        self.state = AFTER.get(request.type, self.state)
        return _pack(request.type, Status.OK, payload, request.request)

    def refuse(self, request: Request, status: Status, text: str) -> bytes:
        """Answer a request with another status, and say why."""
        if status is Status.OK:
            raise LocalProtocolError("OK is not a refusal")
        self._answered(request)
        return _pack(request.type, status, _text(text), request.request)

    def complain(self, error: Malformed) -> bytes:
        """Answer what broke the protocol; the connection is closed afterwards."""
        kind, request = (error.header.type, error.header.request) if error.header else (0, 0)
        return _pack(kind, error.status, _text(str(error)), request)

    def notify(self, kind: MsgType, body: Any = None) -> bytes:
        """Say something on a guard connection."""
        if self.state is not State.GUARD:
            raise LocalProtocolError("notices are for guard connections")
        return _pack(kind, Status.OK, NOTICES[kind].encode(body), 0)

    def _answered(self, request: Request) -> None:
        if self._pending != (request.type, request.request):
            raise LocalProtocolError(f"{request.type.name} {request.request} is not waiting")
        self._pending = None

    def _accept(self, header: Header) -> Codec | None:
        if self._pending is not None:
            raise Malformed("a request while another one is being served", header=header)
        if header.type not in ALLOWED[self.state]:
            raise Malformed(f"type {header.type} from a {self.state.value}", header=header)
        if header.status != Status.OK:
            raise Malformed(f"a request with status {header.status}", header=header)
        return REQUESTS[MsgType(header.type)]


class PeerSide(_Side):
    """The other end: a host's or a tool's."""

    def __init__(self) -> None:
        """Begin before HELLO."""
        super().__init__()
        self._last_request = 0

    def request(self, kind: MsgType, body: Any = None) -> bytes:
        """Ask for something.

        Raises:
            LocalProtocolError: not now, or not with that payload.
        """
        if kind not in ALLOWED[self.state]:
            raise LocalProtocolError(f"{kind.name} as a {self.state.value}")
        if self._pending is not None:
            raise LocalProtocolError(f"{self._pending[0].name} is not answered yet")
        payload = REQUESTS[kind].encode(body)
        self._last_request += 1
        self._pending = (kind, self._last_request)
        return _pack(kind, Status.OK, payload, self._last_request)

    def next_message(self) -> Reply | Notice | None:
        """Return the next complete answer or notice, None when there is none.

        Raises:
            Malformed: the coordinator broke the protocol.
        """
        found = self._next()
        if found is None:
            return None
        header, body = found
        kind = MsgType(header.type)
        if kind in NOTICES:
            return Notice(kind, body)
        self._pending = None
        status = Status(header.status)
        if status is not Status.OK:
            return Reply(kind, header.request, status, None, body)
        self.state = AFTER.get(kind, self.state)
        return Reply(kind, header.request, status, body, "")

    def _accept(self, header: Header) -> Codec | None:
        if header.type in set(NOTICES):
            if self.state is not State.GUARD:
                raise Malformed("a notice on a connection that guards nothing", header=header)
            if header.status != Status.OK:
                raise Malformed(f"a notice with status {header.status}", header=header)
            return NOTICES[MsgType(header.type)]
        if self._pending is None:
            raise Malformed("an answer that nobody asked for", header=header)
        if header.status not in set(Status):
            raise Malformed(f"unknown status {header.status}", header=header)
        if (header.type, header.request) != self._pending:
            # A coordinator that could not make out what it was sent answers with zeros.
            if header.status == Status.OK or header.type != 0:
                raise Malformed("an answer to another request", header=header)
            raise Malformed("the coordinator could not read our request", header=header)
        return REPLIES[MsgType(header.type)] if header.status == Status.OK else None


def _text(text: str) -> bytes:
    return text.encode(errors="replace")[:4096]

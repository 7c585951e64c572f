"""The coordinator's protocol against any bytes, in memory and on real sockets."""

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from dmrpc_cxl.coordinator.extents import Run
from dmrpc_cxl.coordinator.messages import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    NOTICES,
    REPLIES,
    REQUESTS,
    RUN,
    VERSION,
    Grant,
    Hello,
    HelloReply,
    MsgType,
    Recall,
    Register,
    Registered,
    Rejoin,
    Status,
)
from dmrpc_cxl.coordinator.protocol import (
    AFTER,
    ALLOWED,
    CoordinatorSide,
    Malformed,
    Notice,
    PeerSide,
    Reply,
    Request,
    State,
)
from dmrpc_cxl.errors import LocalProtocolError, RemoteProtocolError

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
RUNS = st.lists(st.builds(Run, U32, U32), min_size=1, max_size=50)
TEXT = st.text(max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(
    TEXT,
    st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=4,
    ),
    max_size=4,
)

BODIES = {
    Hello: st.builds(Hello, U64, st.binary(min_size=32, max_size=32)),
    HelloReply: st.builds(HelloReply, U64),
    Register: st.builds(
        Register, U64, U64, U32, U32, U32, U32, st.binary(min_size=64, max_size=64)
    ),
    Registered: st.builds(Registered, U64, U64, U32, U32, U32, U32, U32, U32),
    Rejoin: st.builds(Rejoin, U64, U32, U32),
    Grant: st.builds(Grant, U32, U32),
    Recall: st.builds(Recall, U32, U32),
}
FIXED = {
    MsgType.HELLO: (Hello, HelloReply),
    MsgType.REGISTER: (Register, Registered),
    MsgType.REJOIN: (Rejoin, Registered),
    MsgType.GUARD: (Rejoin, None),
    MsgType.GRANT: (Grant, list),
    MsgType.RETURN: (list, None),
    MsgType.LEAVE: (None, None),
    MsgType.NOTIFY_RECALL: (Recall, None),
    MsgType.NOTIFY_FENCED: (None, None),
}


def bodies(kind, answer=False):
    """Make what a request of that type carries, or its answer."""
    body = FIXED.get(kind, (dict, dict))[answer]
    if body is None:
        return st.none()
    return RUNS if body is list else JSON if body is dict else BODIES[body]


def reach(state):
    """Both ends of a connection in that state."""
    coordinator, peer = CoordinatorSide(), PeerSide()
    path = {
        State.STRANGER: [],
        State.GUEST: [MsgType.HELLO],
        State.HOST: [MsgType.HELLO, MsgType.REJOIN],
        State.GUARD: [MsgType.HELLO, MsgType.GUARD],
    }[state]
    for kind in path:
        body = Hello(1, bytes(32)) if kind is MsgType.HELLO else Rejoin(1, 1)
        coordinator.feed(peer.request(kind, body))
        answer = {MsgType.HELLO: HelloReply(1), MsgType.REJOIN: Registered(*range(8))}.get(kind)
        peer.feed(coordinator.reply(next_request(coordinator), answer))
        peer.next_message()
    assert coordinator.state is peer.state is state
    return coordinator, peer


def chopped(data, cuts):
    """Cut bytes into pieces at these places."""
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def next_request(coordinator: CoordinatorSide) -> Request:
    request = coordinator.next_message()
    assert request is not None
    return request


def next_from(peer: PeerSide) -> Any:
    return peer.next_message()


def exhaust(side: CoordinatorSide | PeerSide, stream: bytes, cuts: list[int]) -> None:
    """Feed bytes in pieces, and refuse every request; the first error of the other end is the end."""
    complaint = HEADER.pack(MAGIC, VERSION, 0, Status.BAD_REQUEST, 0, 0)
    try:
        for piece in chopped(stream, cuts):
            side.feed(piece)
            while (message := side.next_message()) is not None:
                if isinstance(message, Request):
                    assert isinstance(side, CoordinatorSide)
                    assert message.type in ALLOWED[side.state]
                    side.refuse(message, Status.INTERNAL, "no")
    except Malformed as error:
        if isinstance(side, CoordinatorSide):
            complaint = side.complain(error)
    assert HEADER.unpack_from(complaint)[3] != Status.OK


# ---------------------------------------------------------------- round trips


def test_every_type_of_the_header_file_has_its_codecs():
    assert set(REQUESTS) | set(NOTICES) == set(MsgType)
    assert set(REPLIES) == set(REQUESTS)
    assert set().union(*ALLOWED.values()) == set(REQUESTS)


@given(st.sampled_from(sorted(REQUESTS)), st.data(), st.lists(st.integers(0), max_size=5))
def test_a_request_and_its_answer_arrive_as_they_were_sent_however_they_are_cut(kind, data, cuts):
    coordinator, peer = reach(State.STRANGER if kind is MsgType.HELLO else State.HOST)
    body, answer = data.draw(bodies(kind)), data.draw(bodies(kind, answer=True))
    found = []
    for piece in chopped(peer.request(kind, body), cuts):
        coordinator.feed(piece)
        found.append(coordinator.next_message())
    (request,) = [message for message in found if message is not None]
    assert (request.type, request.body) == (kind, body)
    assert coordinator.next_message() is None
    assert not coordinator.in_message
    for piece in chopped(coordinator.reply(request, answer), cuts):
        peer.feed(piece)
    reply = peer.next_message()
    assert reply == Reply(kind, request.request, Status.OK, answer, "")
    assert peer.state is coordinator.state is AFTER.get(kind, State.HOST)


@given(
    st.sampled_from(sorted(set(REQUESTS) - {MsgType.HELLO})),
    st.data(),
    st.sampled_from(sorted(set(Status) - {Status.OK})),
    st.text(max_size=300),
)
def test_a_refusal_arrives_with_its_reason_and_changes_no_state(kind, data, status, text):
    assume(text.isprintable())
    coordinator, peer = reach(State.HOST)
    coordinator.feed(peer.request(kind, data.draw(bodies(kind))))
    request = coordinator.next_message()
    peer.feed(coordinator.refuse(request, status, text))
    assert peer.next_message() == Reply(kind, request.request, status, None, text)
    assert peer.state is coordinator.state is State.HOST


@given(st.sampled_from(sorted(NOTICES)), st.data())
def test_a_notice_arrives_on_a_guard_connection_and_can_be_sent_on_no_other(kind, data):
    body = data.draw(bodies(kind))
    coordinator, peer = reach(State.GUARD)
    peer.feed(coordinator.notify(kind, body))
    assert peer.next_message() == Notice(kind, body)
    for state in set(State) - {State.GUARD}:
        with pytest.raises(LocalProtocolError):
            reach(state)[0].notify(kind, body)


# ---------------------------------------------------------------- who may say what when


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", MsgType)
def test_both_ends_agree_on_what_may_be_asked_in_each_state(state, kind):
    coordinator, peer = reach(state)
    examples: dict[MsgType, Any] = {
        MsgType.HELLO: Hello(1, bytes(32)),
        MsgType.REGISTER: Register(1, 1, 1, 0, 0, 0, bytes(64)),
        MsgType.REJOIN: Rejoin(1, 1),
        MsgType.GUARD: Rejoin(1, 1),
        MsgType.GRANT: Grant(1),
        MsgType.RETURN: [Run(0, 1)],
        MsgType.LEAVE: None,
    }
    body = examples.get(kind, {})
    if kind in ALLOWED[state]:
        coordinator.feed(peer.request(kind, body))
        assert coordinator.next_message() == Request(kind, peer._last_request, body)
        return
    with pytest.raises(LocalProtocolError):
        peer.request(kind, body)
    codec = REQUESTS.get(kind)
    payload = codec.encode(body) if codec else b""
    coordinator.feed(HEADER.pack(MAGIC, VERSION, kind, 0, len(payload), 1) + payload)
    with pytest.raises(Malformed):
        coordinator.next_message()


def test_a_second_request_before_the_answer_ends_the_connection():
    coordinator, peer = reach(State.GUEST)
    data = peer.request(MsgType.STATS, {})
    with pytest.raises(LocalProtocolError):
        peer.request(MsgType.STATS, {})
    coordinator.feed(data + data)
    assert next_request(coordinator).type is MsgType.STATS
    with pytest.raises(Malformed):
        coordinator.next_message()


@pytest.mark.parametrize(
    ("field", "value"),
    [("magic", 1), ("version", VERSION + 1), ("type", 999), ("status", 1), ("length", 1)],
)
def test_a_stranger_is_judged_by_the_header_alone(field, value):
    coordinator = CoordinatorSide()
    header = {"magic": MAGIC, "version": VERSION, "type": MsgType.HELLO, "status": 0, "length": 40}
    coordinator.feed(HEADER.pack(*{**header, field: value}.values(), 7))
    with pytest.raises(Malformed) as caught:
        coordinator.next_message()
    wrong_version = field == "version"
    assert (caught.value.status is Status.VERSION_MISMATCH) == wrong_version


def test_no_payload_above_the_limit_is_waited_for():
    coordinator, _ = reach(State.GUEST)
    coordinator.feed(HEADER.pack(MAGIC, VERSION, MsgType.LIST, 0, MAX_PAYLOAD + 1, 1))
    with pytest.raises(Malformed):
        coordinator.next_message()


def test_other_protocols_are_recognised_by_their_first_bytes():
    coordinator = CoordinatorSide()
    coordinator.feed(b"GE")
    with pytest.raises(Malformed):
        coordinator.next_message()


def test_a_broken_connection_stays_broken():
    coordinator, peer = reach(State.GUEST)
    coordinator.feed(bytes(HEADER.size))
    for _ in range(2):
        with pytest.raises(Malformed):
            coordinator.next_message()
        coordinator.feed(peer.request(MsgType.STATS, {}) if peer._pending is None else b"")


@pytest.mark.parametrize(
    "payload",
    [b"[]", b"{", b'{"a":NaN}', b'{"a":"\xff"}', b"null", b"[" * 100_000, b'{"a":' * 50_000],
)
def test_a_payload_that_is_no_json_object_is_malformed(payload):
    coordinator, _ = reach(State.GUEST)
    coordinator.feed(HEADER.pack(MAGIC, VERSION, MsgType.LIST, 0, len(payload), 1) + payload)
    with pytest.raises(Malformed):
        coordinator.next_message()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (MsgType.GRANT, Grant(-1)),
        (MsgType.GRANT, None),
        (MsgType.RETURN, [(1, 2, 3)]),
        (MsgType.RETURN, [(0, 1)] * (MAX_PAYLOAD // RUN.size + 1)),
        (MsgType.LEAVE, {}),
        (MsgType.LIST, None),
        (MsgType.LIST, []),
        (MsgType.LIST, {"prefix": b"bytes"}),
        (MsgType.LIST, {"prefix": float("nan")}),
        (MsgType.LIST, {"prefix": "x" * MAX_PAYLOAD}),
    ],
)
def test_what_cannot_be_sent_is_the_senders_fault_and_leaves_the_connection_usable(kind, body):
    coordinator, peer = reach(State.HOST)
    with pytest.raises(LocalProtocolError):
        peer.request(kind, body)
    coordinator.feed(peer.request(MsgType.STATS, {}))
    assert next_request(coordinator).type is MsgType.STATS


# ---------------------------------------------------------------- any bytes


HEADERS = st.builds(
    HEADER.pack,
    st.just(MAGIC) | U32,
    st.just(VERSION) | st.integers(0, 2**16 - 1),
    st.sampled_from(list(MsgType)) | st.integers(0, 2**16 - 1),
    st.just(0) | st.sampled_from(list(Status)) | U32,
    st.integers(0, 100) | st.sampled_from([MAX_PAYLOAD, MAX_PAYLOAD + 1]) | U32,
    st.integers(0, 4) | U64,
)
STREAMS = st.lists(HEADERS | st.binary(max_size=100), max_size=6).map(b"".join)


@given(st.sampled_from(State), STREAMS, st.lists(st.integers(0), max_size=4))
def test_any_bytes_give_the_coordinator_requests_or_a_remote_protocol_error(state, stream, cuts):
    side, _ = reach(state)
    exhaust(side, stream, cuts)
    assert side.state is state


@given(st.sampled_from(State), st.booleans(), STREAMS, st.lists(st.integers(0), max_size=4))
def test_any_bytes_give_the_peer_answers_or_a_remote_protocol_error(state, asked, stream, cuts):
    _, side = reach(state)
    if asked and state in (State.GUEST, State.HOST):
        side.request(MsgType.LIST, {})
    exhaust(side, stream, cuts)


@given(st.sampled_from(sorted(REQUESTS)), st.data())
def test_one_flipped_bit_gives_a_request_an_error_or_a_wait_and_nothing_else(kind, data):
    coordinator, peer = reach(State.STRANGER if kind is MsgType.HELLO else State.HOST)
    message = bytearray(peer.request(kind, data.draw(bodies(kind))))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    coordinator.feed(bytes(message))
    with suppress(RemoteProtocolError):
        coordinator.next_message()


class Conversation(RuleBasedStateMachine):
    """Two ends that keep to the rules never complain about each other, and agree on the state."""

    def __init__(self):
        super().__init__()
        self.coordinator, self.peer = CoordinatorSide(), PeerSide()
        self.request: Any = None

    @precondition(lambda self: self.request is None and self.peer.state is not State.GUARD)
    @rule(data=st.data())
    def ask(self, data):
        kind = data.draw(st.sampled_from(sorted(ALLOWED[self.peer.state])))
        body = data.draw(bodies(kind))
        self.coordinator.feed(self.peer.request(kind, body))
        self.request = next_request(self.coordinator)
        assert self.request.body == body

    @precondition(lambda self: self.request is not None)
    @rule(data=st.data())
    def answer(self, data):
        body = data.draw(bodies(self.request.type, answer=True))
        self.peer.feed(self.coordinator.reply(self.request, body))
        assert next_from(self.peer).body == body
        self.request = None

    @precondition(lambda self: self.request is not None)
    @rule()
    def refuse(self):
        self.peer.feed(self.coordinator.refuse(self.request, Status.INTERNAL, "no"))
        assert next_from(self.peer).text == "no"
        self.request = None

    @precondition(lambda self: self.peer.state is State.GUARD)
    @rule(body=BODIES[Recall])
    def recall(self, body):
        self.peer.feed(self.coordinator.notify(MsgType.NOTIFY_RECALL, body))
        assert next_from(self.peer).body == body

    def teardown(self):
        assert self.coordinator.state is self.peer.state


TestConversation = Conversation.TestCase

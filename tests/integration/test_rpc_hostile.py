"""Peers that break the rules: a clear error for the one who does, nobody else notices, nothing leaks.

Meanwhile another client calls the same service all the time; afterwards the service has as many descriptors, threads and
connections as before, and no frame is in use.
"""

import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from dmrpc_cxl.rpc import attended, endpoint, frames
from dmrpc_cxl.rpc.frames import Code, Flag, Kind
from tests.fabrics import At, Fabric, HostProcess
from tests.rpc_peers import (
    LARGE,
    RawClient,
    connect,
    connections_reach,
    count_reaches,
    nr_connections,
    serve,
)
from tests.standing import Standing, until

pack = msgspec.msgpack.encode
Ext = msgspec.msgpack.Ext


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing({}, {})
    yield standing
    standing.close()


@pytest.fixture(params=["ring", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def limits(at: At) -> None:
    """Shorter waits and smaller heaps than in real life."""
    endpoint.HANDSHAKE_SECONDS = 1.0
    attended.MAX_BACKLOG_BYTES = 8 << 20


def resources(at: At) -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), nr_connections(at)


def resources_return(at: At, before: tuple[int, int]) -> None:
    until(lambda: resources(at) == before, 20)


def call_all_the_time(at: At) -> None:
    at.stop = threading.Event()
    at.nr_calls = 0
    at.trouble = []

    def work() -> None:
        try:
            while not at.stop.is_set():
                assert at.depot.echo(b"abc") == b"abc"
                assert at.depot.total(np.ones(LARGE, "u1")) == LARGE
                at.nr_calls += 1
        except BaseException as error:
            at.trouble.append(repr(error))

    at.thread = threading.Thread(target=work)
    at.thread.start()
    until(lambda: at.nr_calls > 0 or at.trouble)


def end_calls(at: At) -> tuple[list[str], int]:
    now = at.nr_calls
    until(lambda: at.nr_calls > now or at.trouble)  # still alive
    at.stop.set()
    at.thread.join()
    at.depot.close()
    return at.trouble, at.nr_calls


def stop(at: At) -> None:
    at.server.stop()


@pytest.fixture
def place(standing: Standing, kind: str) -> Iterator[tuple[Fabric, HostProcess, HostProcess]]:
    """A fabric, a service that is in use by a good client, and that client."""
    with standing.use() as (fabric, (service, client)):
        service.call(limits)
        service.call(serve, threads=4)
        client.call(connect, transport=kind)
        client.call(call_all_the_time)
        before = service.call(resources)
        yield fabric, service, client
        service.call(resources_return, before)
        trouble, nr_calls = client.call(end_calls)
        assert not trouble
        assert nr_calls > 0
        service.call(stop)


Place = tuple[Fabric, HostProcess, HostProcess]


def header(**changes: int) -> bytes:
    fields = {
        "size": 41, "kind": Kind.CALL, "flags": 0, "nr_refs": 0, "call_id": 1, "time_left": 0,
        "method": 0, "meta": 0, "body": 1, "inline_at": 0,
    }  # fmt: skip
    fields.update(changes)
    return struct.pack("<IBBHQQIIII", *fields.values()) + b"\x90"


FRAMES = {
    "unknown kind": header(kind=99),
    "kind 0": header(kind=0),
    "a server's kind": header(kind=Kind.REPLY),
    "a server's ERROR": header(kind=Kind.ERROR),
    "HELLO twice": header(kind=Kind.HELLO),
    "WELCOME": header(kind=Kind.WELCOME),
    "unknown flags": header(flags=0x80),
    "call id 0": header(call_id=0),
    "more Refs than bytes": header(nr_refs=5),
    "65535 Refs": header(nr_refs=0xFFFF),
    "metadata beyond the end": header(meta=1000),
    "4 GiB of metadata": header(meta=0xFFFFFFFF, body=2),
    "body beyond the end": header(body=0xFFFFFFFF),
    "body too short": header(body=0),
    "inline not aligned": header(inline_at=41),
    "inline beyond the end": header(inline_at=64),
    "inline at the very end": header(inline_at=0xFFFFFFC0),
    "too small": header(size=39),
    "size 0": header(size=0),
    "too large": header(size=(1 << 30) + 1),
    "4 GiB": header(size=0xFFFFFFFF),
    "metadata that is no metadata": frames.head(Kind.CALL, 1, meta=b"\x01", body=b"\x90"),
    "metadata of wrong types": frames.head(Kind.CALL, 1, meta=pack({"a": 1}), body=b"\x90"),
    "garbage": b"\xff" * 100,
}


RING_CAPACITY = 16  # byte offsets in the shared memory of a ring, for what a client writes
RING_TAIL = 1024
RING_DATA = 4096


@pytest.mark.parametrize("what", FRAMES)
def test_a_frame_that_breaks_the_rules_ends_its_connection_and_no_other(
    place: Place, kind: str, what: str
) -> None:
    fabric, _service, _ = place
    with RawClient(fabric, kind=kind) as raw:
        data = FRAMES[what]
        if kind == "ring":
            write_to_ring(raw, data)
        else:
            raw.socket.setblocking(True)
            raw.socket.sendall(data)
        said = raw.ends()
    # Over TCP what was not read may cut off what was said.
    assert all(frame.kind == Kind.ERROR and frame.call_id == 0 for frame in said)


def write_to_ring(raw: RawClient, data: bytes) -> None:
    """Put bytes into a ring as a producer that keeps no rules would: ours refuses a size that is not so.

    The layout is that of csrc/ring.h: the bytes, then the index of what was written, then the bell.
    """
    with mmap.mmap(raw.fds[0], 0) as memory, memoryview(memory).cast("Q") as words:
        tail, capacity = words[RING_TAIL // 8], words[RING_CAPACITY // 8]
        at = RING_DATA + capacity + tail % capacity
        assert at + len(data) <= len(memory)
        memory[at : at + len(data)] = data
        words[RING_TAIL // 8] = tail + len(data)
    for bell in raw.fds[1:]:
        os.eventfd_write(bell, 1)


ARGUMENTS = {
    "not msgpack": b"\xc1",
    "nothing": b"",
    "cut off": pack([1, 2, 3])[:-1],
    "more than one value": b"\x90\x90",
    "no list": pack({"a": 1}),
    "too many arguments": pack([1, 2, 3]),
    "a bomb": b"\x91" * 200_000,
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a string of 4 GiB": b"\x91\xdb\xff\xff\xff\xff",
    "not UTF-8": b"\x91\xa2\xff\xfe",
    "unknown extension": pack([Ext(77, b"x")]),
    "array of garbage": pack([Ext(1, b"\xc1")]),
    "array of nothing": pack([Ext(1, b"")]),
    "array cut off": pack([Ext(1, pack((0, 8))[:-1])]),
    "array, wrong fields": pack([Ext(1, pack(("x", 8, "u1", [8])))]),
    "array, a bomb for a type": pack(
        [Ext(1, pack((-1, 8))[1:1] + b"\x94\xff\x08" + b"\x91" * 100_000 + b"\x90")]
    ),
    "Ref that is not there": pack([Ext(1, pack((0, 8, "|u1", (8,))))]),
    "Ref 2**62": pack([Ext(1, pack((2**62, 8, "|u1", (8,))))]),
    "Ref as a value": pack([Ext(3, pack(5))]),
    "Ref -1": pack([Ext(3, pack(-1))]),
    "blob beyond the end": pack([Ext(2, pack((-1, 100, 0)))]),
    "blob of a negative length": pack([Ext(2, pack((-1, -100, 0)))]),
    "blob at -2**63": pack([Ext(2, pack((-(2**63), 10, 0)))]),
    **{
        f"array of {name!r:.30}, {shape}": pack([Ext(1, pack((-1, nbytes, name, shape)))])
        for name, shape, nbytes in [
            ("O", (1,), 8),
            ("|O", (0,), 0),
            ([["a", "O"]], (1,), 8),
            ([["a", [["b", "|O"]]]], (1,), 8),
            ("u1", (2**63, 2), 2**63),
            ("u1", (2**32, 2**32), 0),
            ("u1", (2**62, 0), 0),
            ("u1", (2**40, 0, 2**40), 0),
            ("u1", (-8, -1), 8),
            ("u1", (-1,), -1),
            ("u1", (1,) * 100, 1),
            ("S0", (2**40,), 0),
            ("V0", (2**40,), 0),
            ("(1000000000,1000000000)u1", (1,), 10**18),
            ("(4,)u1", (2,), 8),
            ("no such type", (1,), 8),
            ("", (1,), 8),
            ("u1," * 10_000, (0,), 0),
            (None, (1,), 8),
            (17, (1,), 8),
            ([], (0,), 0),
            ([[1, 2, 3, 4]], (1,), 8),
            ({"a": "u1"}, (1,), 8),
            ("m8[nonsense]", (1,), 8),
            ("f8", (8,), 63),
        ]
    },
}


@pytest.mark.parametrize("inline", [b"", bytes(64)])
@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_cannot_be_read_fail_their_call_and_not_the_connection(
    place: Place, kind: str, what: str, inline: bytes
) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind=kind) as raw:
        for call_id, flags in ((1, 0), (2, Flag.BLOBS)):
            raw.send(
                raw.call(
                    "kind",
                    call_id,
                    flags=int(flags),
                    body=ARGUMENTS[what],
                    inline_bytes=len(inline),
                ),
                inline,
            )
            answer = raw.recv()
            assert (answer.kind, answer.call_id) == (Kind.ERROR, call_id)
            assert answer.method in (Code.BAD_ARGUMENTS, Code.BAD_REF), frames.read_error(answer)
        raw.send(raw.call("kind", 3, body=pack([1])))
        assert raw.recv().kind == Kind.REPLY


def wire(at: At) -> bytes:
    return at.host.create_ref(at.host.ralloc(LARGE), move=True).to_bytes()


def drop(at: At, wires: bytes) -> int:
    return at.host.drop_refs(wires)


@pytest.mark.parametrize(
    "what", ["zeros", "ones", "another fabric", "another nonce", "another length", "stale"]
)
def test_forged_foreign_and_stale_refs_are_refused(place: Place, kind: str, what: str) -> None:
    fabric, _, client = place
    good = client.call(wire)
    bad = {
        "zeros": bytes(40),
        "ones": b"\xff" * 40,
        "another fabric": bytes([good[0] ^ 1]) + good[1:],
        "another nonce": good[:-1] + bytes([good[-1] ^ 1]),
        "another length": good[:24] + bytes([good[24] ^ 1]) + good[25:],
        "stale": good,
    }[what]
    if what == "stale":
        client.call(drop, good)
    with RawClient(fabric, kind=kind) as raw:
        body = pack([Ext(1, pack((0, LARGE, "|u1", (LARGE,))))])
        raw.send(raw.call("total", 1, refs=bad, body=body))
        answer = raw.recv()
        assert (answer.kind, answer.method) == (Kind.ERROR, Code.BAD_REF)
        raw.send(raw.call("take", 2, refs=bad, body=pack([Ext(3, pack(0))])))
        assert raw.recv().method == Code.BAD_REF
    assert client.call(drop, good) == (0 if what == "stale" else 1)


def test_a_ref_to_more_or_less_than_its_array_is_refused(place: Place, kind: str) -> None:
    fabric, _, client = place
    with RawClient(fabric, kind=kind) as raw:
        for call_id, n in ((1, LARGE - 1), (2, LARGE + 1), (3, 0)):
            body = pack([Ext(1, pack((0, n, "|u1", (n,))))])
            ref = client.call(wire)
            raw.send(raw.call("total", call_id, refs=ref, body=body))
            answer = raw.recv()
            assert answer.kind == Kind.ERROR
            client.call(drop, ref)


def test_cancel_and_discard_of_calls_never_made_do_nothing(place: Place, kind: str) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind=kind) as raw:
        for call_id in (0, 1, 2**64 - 1):
            raw.send(frames.short(Kind.CANCEL, call_id))
            raw.send(frames.short(Kind.DISCARD, call_id))
        raw.send(raw.call("kind", 1, body=pack([1])))
        assert raw.recv().kind == Kind.REPLY


def test_a_pickle_is_refused_by_a_service_that_takes_none(place: Place, kind: str) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind=kind) as raw:
        raw.send(raw.call("kind", 1, flags=int(Flag.PICKLED), body=pack([b"cos\nabort\n(tR.", []])))
        answer = raw.recv()
        assert (answer.kind, answer.method) == (Kind.ERROR, Code.NOT_ALLOWED)


# ---------------------------------------------------------------- handshakes


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"secret": b""}, "secret"),
        ({"secret": bytes(16)}, "secret"),
        ({"fabric_id": 1}, "fabric"),
        ({"protocol": 99}, "protocol"),
        ({"service": "other"}, "not served here"),
    ],
)
def test_a_hello_that_is_wrong_is_told_why(
    place: Place, kind: str, changes: dict[str, Any], error: str
) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind=kind, hello=False) as raw:
        raw.socket.sendall(raw.hello(**changes))
        with pytest.raises(PermissionError, match=error):
            raw.shake()


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"\xff" * 100,
        b"GET / HTTP/1.0\r\n\r\n" + b"x" * 100,
        frames.head(Kind.HELLO, 0, body=b"\xc1"),
        frames.head(Kind.HELLO, 0, body=b"\x91" * 3000),
        frames.head(Kind.HELLO, 0, body=pack(["x", 1, 1, b"", "", ""])),
        frames.head(Kind.CALL, 1, body=b"\x90"),
        frames.head(Kind.HELLO, 0, body=bytes(5000)),
    ],
    ids=["zeros", "ones", "HTTP", "garbage", "bomb", "other magic", "CALL first", "too large"],
)
def test_what_is_no_hello_is_hung_up_on(place: Place, kind: str, data: bytes) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind=kind, hello=False) as raw:
        raw.socket.sendall(data)
        with pytest.raises((ConnectionError, PermissionError)):
            raw.shake()


@pytest.mark.parametrize("part", [0, 3, 39, 50])
def test_half_open_peers_are_hung_up_on_after_a_while(place: Place, kind: str, part: int) -> None:
    fabric, _service, _ = place
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(RawClient(fabric, kind=kind, hello=False)) for _ in range(5)]
        for raw in raws:
            raw.socket.sendall(raw.hello()[:part])
        for raw in raws:
            with contextlib.suppress(ConnectionError):
                assert raw.socket.recv(1) == b""


def test_a_hello_in_single_bytes_and_with_a_call_behind_it_works(place: Place) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind="tcp", hello=False) as raw:
        hello = raw.hello()
        for i in range(len(hello)):
            raw.socket.sendall(hello[i : i + 1])
        raw.shake()
        raw.send(raw.call("kind", 1, body=pack([1])))
        assert raw.recv().kind == Kind.REPLY


@pytest.mark.parametrize("how", ["at once", "after HELLO", "half a frame", "reset"])
def test_peers_that_vanish_leave_nothing(place: Place, kind: str, how: str) -> None:
    fabric, _service, _ = place
    for _ in range(10):
        raw = RawClient(fabric, kind=kind, hello=False)
        if how != "at once":
            raw.socket.sendall(raw.hello())
        if how in ("half a frame", "reset"):
            raw.shake()
            raw.channel.try_send([header()[:20]], 0) if kind == "tcp" else raw.send(header())
        if how == "reset" and kind == "tcp":
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()


def test_words_on_the_control_socket_of_a_ring_end_the_connection(place: Place) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind="ring") as raw:
        raw.socket.setblocking(True)
        raw.socket.sendall(raw.hello())
        assert raw.ends() == []


@pytest.mark.parametrize("what", ["zeros", "ones", "noise"])
def test_garbage_all_over_the_shared_memory_ends_the_connection(place: Place, what: str) -> None:
    fabric, service, _ = place
    rng = np.random.default_rng(2)
    with RawClient(fabric, kind="ring") as raw:
        raw.send(raw.call("kind", 1, body=pack([1])))
        assert raw.recv().kind == Kind.REPLY
        size = os.fstat(raw.fds[0]).st_size
        with mmap.mmap(raw.fds[0], size) as memory:
            for _ in range(3):
                memory[:] = {
                    "zeros": bytes(size),
                    "ones": b"\xff" * size,
                    "noise": rng.bytes(size),
                }[what]
                os.eventfd_write(raw.fds[2], 1)
                os.eventfd_write(raw.fds[1], 1)
        # The server may take it for a ring without news; what we say then, or our end, settles it.
    service.call(connections_reach, 1)


# ---------------------------------------------------------------- slow readers


def test_who_asks_for_more_and_more_and_never_reads_is_hung_up_on(place: Place, kind: str) -> None:
    fabric, service, _ = place
    with RawClient(fabric, kind=kind) as raw:
        body = pack([1 << 20])
        with contextlib.suppress(ConnectionError, ValueError, TimeoutError):
            for call_id in range(1, 2000):
                raw.send(raw.call("fresh", call_id, flags=int(Flag.VALUE), body=body))
        service.call(count_reaches, "slow readers")
    service.call(connections_reach, 1)


def resident(at: At) -> int:
    return psutil.Process().memory_info().rss


def have_sent(at: At, nr_peers: int, nbytes: int) -> None:
    """Wait until so many connections, but for that of the good client, have been sent so many bytes."""

    def nr_there() -> int:
        received = [c.channel.traffic()[1] for c in at.server._connections.values()]
        return sum(n >= nbytes for n in received)

    until(lambda: nr_there() == nr_peers + 1, 20)


def test_sizes_that_are_claimed_and_not_sent_take_no_memory(place: Place, kind: str) -> None:
    fabric, service, _ = place
    before = service.call(resident)
    sent = 100 << 10
    data = header(size=1 << 30, body=(1 << 30) - 40) + bytes(sent)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(RawClient(fabric, kind=kind)) for _ in range(10)]
        for raw in raws:
            if kind == "ring":
                write_to_ring(raw, data)
            else:
                raw.socket.setblocking(True)
                raw.socket.sendall(data)
        service.call(have_sent, len(raws), sent)
        assert service.call(resident) < before + (30 << 20)
    service.call(connections_reach, 1)


def test_tcp_listens_on_loopback_unless_told_otherwise(place: Place) -> None:
    fabric, _, _ = place
    with RawClient(fabric, kind="tcp") as raw:
        assert raw.endpoint["tcp"][0] == "127.0.0.1"
        assert raw.socket.getpeername()[0] == "127.0.0.1"


# ---------------------------------------------------------------- hostile servers


class RawServer:
    """Publishes an endpoint and answers one HELLO with what it likes."""

    def __init__(self, fabric: Fabric, kind: str, answer: bytes, nr_fds: int = 0) -> None:
        self.answer, self.nr_fds = answer, nr_fds
        if kind == "ring":
            name = f"dmrpc-test-{os.getpid()}-{id(self)}"
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.bind(b"\0" + name.encode())
            self.socket.listen()
            self.endpoint = {"protocol": frames.PROTOCOL, "ring": name, "tcp": None}
        else:
            self.socket = socket.create_server(("127.0.0.1", 0))
            address = ["127.0.0.1", self.socket.getsockname()[1]]
            self.endpoint = {"protocol": frames.PROTOCOL, "ring": None, "tcp": address}
        self.socket.settimeout(20)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        sock, _ = self.socket.accept()
        with sock:
            sock.settimeout(20)
            sock.recv(65536)
            fds = [os.open("/dev/null", os.O_RDWR) for _ in range(self.nr_fds)]
            with contextlib.suppress(OSError):
                socket.send_fds(sock, [self.answer or b"\0"], fds)
                for fd in fds:
                    os.close(fd)
                if self.answer:
                    sock.recv(65536)  # until the client goes

    def close(self) -> None:
        self.socket.close()
        self.thread.join(20)


def publish(at: At, name: str, where: Any) -> None:
    at.host.publish(name, where)


def withdraw(at: At, name: str) -> None:
    at.host.withdraw(name)


def connect_in_vain(at: At, name: str) -> tuple[list[str], int]:
    before = len(os.listdir("/proc/self/fd"))
    try:
        at.host.connect(name, connect_timeout=1.0)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
    else:
        raise AssertionError("connected")
    return kinds, len(os.listdir("/proc/self/fd")) - before


def welcome(**changes: Any) -> bytes:
    body = frames.Welcome(frames.PROTOCOL, "Depot", (), 1, False, 1 << 20)
    for name, value in changes.items():
        setattr(body, name, value)
    return frames.head(Kind.WELCOME, 0, body=frames.encode(body))


WELCOMES = {
    "nothing": (b"", 0),
    "garbage": (b"\x50\0\0\0" + b"x" * 76, 0),
    "too large": (b"\xff\xff\xff\xff" + b"x" * 76, 0),
    "too small": (b"\1\0\0\0" + b"x" * 76, 0),
    "cut off": (welcome()[:-3], 3),
    "CALL": (frames.head(Kind.CALL, 1, body=b"\x90"), 3),
    "another protocol": (welcome(protocol=9), 3),
    "frames of -1 bytes": (welcome(max_frame=-1), 3),
    "frames of 2**80 bytes": (welcome(max_frame=2**63), 3),
    "a bomb": (frames.head(Kind.WELCOME, 0, body=b"\x91" * 100_000), 3),
    "no msgpack": (frames.head(Kind.WELCOME, 0, body=b"\xc1"), 3),
}
DESCRIPTORS = {
    "no descriptors": (welcome(), 0),
    "one descriptor": (welcome(), 1),
    "three of something else": (welcome(), 3),
    "too many descriptors": (welcome(), 30),
}


@pytest.mark.parametrize("what", [*WELCOMES, *DESCRIPTORS])
def test_a_server_that_breaks_the_rules_is_a_clear_error_and_leaves_no_descriptors(
    standing: Standing, kind: str, what: str
) -> None:
    if kind == "tcp" and what in DESCRIPTORS:
        pytest.skip("descriptors go over Unix sockets only")
    with standing.use() as (fabric, hosts):
        raw = RawServer(fabric, kind, *{**WELCOMES, **DESCRIPTORS}[what])
        hosts[0].call(publish, "raw", raw.endpoint)
        kinds, nr_left = hosts[1].call(connect_in_vain, "raw")
        raw.close()
        hosts[0].call(withdraw, "raw")
        assert "DmError" in kinds
        assert nr_left == 0


@pytest.mark.parametrize(
    "where",
    [
        5,
        "x",
        [],
        {},
        {"protocol": 1},
        {"protocol": "1", "ring": "x"},
        {"protocol": 1, "ring": 5, "tcp": None},
        {"protocol": 1, "ring": None, "tcp": 5},
        {"protocol": 1, "ring": None, "tcp": ["127.0.0.1"]},
        {"protocol": 1, "ring": None, "tcp": ["127.0.0.1", 70000]},
        {"protocol": 1, "ring": None, "tcp": ["127.0.0.1", "x"]},
        {"protocol": 1, "ring": "x" * 200, "tcp": None},
        {"protocol": 1, "ring": "nobody-is-here", "tcp": None},
    ],
    ids=str,
)
def test_an_endpoint_that_makes_no_sense_is_a_clear_error(standing: Standing, where: Any) -> None:
    with standing.use() as (_, hosts):
        hosts[0].call(publish, "raw", where)
        kinds, nr_left = hosts[1].call(connect_in_vain, "raw")
        hosts[0].call(withdraw, "raw")
        assert "DmError" in kinds
        assert nr_left == 0

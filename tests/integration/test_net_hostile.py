"""Clients of a memory server that are strangers, liars, slow or gone: others go on, and nothing is lost."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmrpc_net
from dmrpc_cxl.errors import NoHostSlot, OverQuota
from dmrpc_net._native import WIRE
from dmrpc_net.client import read_secret
from tests.net_servers import Servers, StandingServers, serving
from tests.net_wire import HELLO, STATUS, WELCOME, answers, request
from tests.standing import until

PAGE = 4096
TCP_REPAIR = 19
_standing = StandingServers("--hello-timeout", "1", shards=1)


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    yield
    _standing.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with _standing.use() as servers:
        yield servers


@pytest.fixture
def good(servers: Servers) -> Iterator[dmrpc_net.Client]:
    """A client that must be served whatever the others do; it looks after the test whether it is."""
    client = servers.client()
    address = client.ralloc(PAGE)
    client.rwrite(address, b"good")
    yield client
    assert client.read(address, 4) == b"good"
    client.rfree(address)


def connected(servers: Servers) -> socket.socket:
    host, port = servers.addresses[0].split(":")
    sock = socket.create_connection((host, int(port)), 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def hello(servers: Servers, **changes: object) -> bytes:
    fields = {
        "magic": WIRE["magic"], "version": WIRE["version"], "kind": WIRE["control"],
        "secret": read_secret(servers.secret), "token": 4711, "pid": 0, "shard": 0, "session": 1,
        "reserved": 0,
    }  # fmt: skip
    return HELLO.pack(*(fields | changes).values())


def everything(sock: socket.socket) -> bytes:
    """Read until the other side ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def status_of(welcome: bytes) -> str:
    assert len(welcome) == WELCOME.size
    return STATUS[WELCOME.unpack(welcome)[2]]


class Intruder:
    """A process that was let in, and says what it likes."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.control = connected(servers)
        self.control.sendall(hello(servers))
        welcome = self.control.recv(WELCOME.size, socket.MSG_WAITALL)
        self.pid = WELCOME.unpack(welcome)[6]
        self.data = self.open()

    def open(self, **changes: object) -> socket.socket:
        sock = connected(self.servers)
        sock.sendall(hello(self.servers, kind=WIRE["data"], pid=self.pid, **changes))
        assert status_of(sock.recv(WELCOME.size, socket.MSG_WAITALL)) == "OK"
        return sock

    def ask(self, *args: int, **more: object):
        self.data.sendall(request(*args, **more))
        head = self.data.recv(32, socket.MSG_WAITALL)
        length = struct.unpack_from("<I", head)[0]
        body = self.data.recv(length, socket.MSG_WAITALL) if length else b""
        return answers(head + body)[0]

    def leave(self) -> None:
        self.data.close()
        self.control.shutdown(socket.SHUT_WR)
        everything(self.control)
        self.control.close()


@pytest.fixture
def intruder(servers: Servers) -> Iterator[Intruder]:
    intruder = Intruder(servers)
    yield intruder
    with contextlib.suppress(OSError):
        intruder.leave()


# ---------------------------------------------------------------- strangers


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(20)])
def test_who_says_too_little_is_sent_away(servers, good, said):
    sock = connected(servers)
    sock.sendall(said)
    assert everything(sock) == b""


@pytest.mark.parametrize(
    "said", [bytes(56), b"\xff" * 56, b"GET /" + b"x" * 100, bytes(10_000)], ids=len
)
def test_who_does_not_know_the_secret_learns_nothing_else(servers, good, said):
    sock = connected(servers)
    sock.sendall(said)
    said_back = everything(sock)
    if said_back:  # unless its own bytes, unread, made the end a reset
        fields = WELCOME.unpack(said_back)
        assert STATUS[fields[2]] == "DENIED"
        assert fields[3:] == (0,) * 8


def test_the_secret_is_looked_at_before_anything_else(servers):
    secret = bytearray(read_secret(servers.secret))
    secret[31] ^= 1
    for changes in (
        {},
        {"version": 99},
        {"magic": 1},
        {"kind": 7},
        {"kind": 2, "pid": 5},
        {"reserved": 3},
    ):
        sock = connected(servers)
        sock.sendall(hello(servers, secret=bytes(secret), **changes))
        assert status_of(everything(sock)) == "DENIED"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"version": 99}, "OTHER_VERSION"),
        ({"magic": 1}, "OTHER_VERSION"),
        ({"kind": 3}, "BAD_REQUEST"),
        ({"kind": 0}, "BAD_REQUEST"),
        ({"reserved": 1}, "BAD_REQUEST"),
        ({"token": 0}, "BAD_REQUEST"),
        ({"kind": 2}, "BAD_REQUEST"),
        ({"kind": 2, "pid": 12345}, "NO_PROCESS"),
        ({"kind": 2, "pid": 1, "shard": 9}, "WRONG_SERVER"),
        ({"kind": 2, "pid": 1, "session": 16}, "WRONG_SERVER"),
    ],
    ids=str,
)
def test_a_hello_that_makes_no_sense_is_refused_with_a_reason(servers, good, changes, status):
    sock = connected(servers)
    sock.sendall(hello(servers, **changes))
    assert status_of(everything(sock)) == status


def test_nobody_gets_the_connection_of_another_process(servers, good, intruder):
    for pid, token in ((good.pid, 4711), (intruder.pid, 4712), (intruder.pid, 0)):
        sock = connected(servers)
        sock.sendall(hello(servers, kind=WIRE["data"], pid=pid, token=token))
        assert status_of(everything(sock)) == "NO_PROCESS"
    sock = connected(servers)
    sock.sendall(hello(servers, pid=good.pid))
    assert status_of(everything(sock)) == "PID_TAKEN"


def test_a_crowd_of_strangers_keeps_nobody_out():
    with serving("--hello-timeout", "60", shards=1) as servers, contextlib.ExitStack() as crowd:
        early = servers.client()
        early.ping()
        for _ in range(600):
            crowd.enter_context(connected(servers))
        began = time.monotonic()
        servers.client(connect_within=60).ping()
        (link,) = early.open_links()
        descriptor, _ = link.duplicate()
        with socket.socket(fileno=descriptor) as copy:
            copy.shutdown(socket.SHUT_RDWR)
        early.ping()  # over a new connection
        assert time.monotonic() - began < 30


# ---------------------------------------------------------------- liars


def test_who_speaks_on_the_control_connection_is_let_go(servers, good, intruder):
    assert intruder.ask("PUT", 1, payload=b"x" * 5000).status == "OK"
    before = good.audit()["in_use"]
    intruder.control.sendall(b"anything")
    assert everything(intruder.control) == b""
    assert good.audit()["in_use"] == before - 2
    assert everything(intruder.data) == b""


def test_nonsense_ends_its_connection_and_no_other(servers, good, intruder):
    breaches = good.stats()["breaches"]
    for nonsense in (b"\xff" * 100, bytes(56), request("PING", 5, flags=9)):
        intruder.data.sendall(nonsense)
        (answer,) = answers(everything(intruder.data))
        assert answer.status == "BAD_REQUEST"
        intruder.data = intruder.open()
    assert good.stats()["breaches"] == breaches + 3
    assert intruder.ask("PING", 10).status == "OK"


def test_a_second_connection_of_a_process_replaces_the_first(servers, good, intruder):
    first, intruder.data = intruder.data, intruder.open()
    assert intruder.ask("PING", 1).status == "OK"
    assert everything(first) == b""


def test_a_write_that_announces_more_than_there_is_takes_nothing(servers, good, intruder):
    intruder.data.sendall(
        request("PUT", 1, payload=b"x" * 100)[:4].replace(b"d\0\0\0", struct.pack("<I", 1 << 30))
    )
    intruder.data.sendall(request("PUT", 1, payload=b"x" * 100)[4:])
    assert good.stats()["nr_free"] >= good.stats()["nr_pages"] - 1


# ---------------------------------------------------------------- slow and gone


def test_who_does_not_read_its_answers_is_not_served_and_costs_nothing(servers, good, intruder):
    address = intruder.ask("RALLOC", 1, 1 << 20).a
    assert intruder.ask("RWRITE", 2, address, payload=b"s" * (1 << 20)).status == "OK"
    rss = _resident(servers)
    intruder.data.setblocking(False)
    id, sent = 3, 0
    with contextlib.suppress(BlockingIOError):
        while sent < 200_000:  # 200,000 MiB of answers
            intruder.data.sendall(request("RREAD", id, address, 1 << 20, oldest=3))
            id += 1
            sent += 1
    for _ in range(50):
        good.get(good.put(b"x" * 10_000))
    assert _resident(servers) < rss + (16 << 20)
    intruder.data.setblocking(True)
    head = intruder.data.recv(32, socket.MSG_WAITALL)
    assert struct.unpack_from("<I", head)[0] == 1 << 20


def _resident(servers: Servers) -> int:
    status = Path(f"/proc/{servers.servers[0].process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_a_write_that_never_ends_holds_its_own_pages_and_stops_nobody(servers, good, intruder):
    write = request("PUT", 1, payload=b"x" * 100 * PAGE)
    intruder.data.sendall(write[: 50 * PAGE])
    until(lambda: good.audit()["pages_under_way"] == 100)
    for _ in range(50):
        good.get(good.put(b"x" * 10_000))
    intruder.leave()
    assert good.audit()["pages_under_way"] == 0


def test_bytes_one_by_one_are_a_request_all_the_same(servers, good, intruder):
    for byte in request("PUT", 1, payload=b"slow"):
        intruder.data.sendall(bytes([byte]))
    head = intruder.data.recv(32, socket.MSG_WAITALL)
    key = answers(head)[0].a
    assert intruder.ask("GET", 2, key, 4, 0, 4).payload == b"slow"


def test_a_client_that_vanishes_without_a_word_is_given_up():
    """Its sockets are taken apart without FIN or RST, as when a cable is pulled."""
    with serving("--vanished", "3", shards=1) as servers:
        good = servers.client()
        gone = Intruder(servers)
        assert gone.ask("PUT", 1, payload=b"x" * 5000).status == "OK"
        for sock in (gone.control, gone.data):
            try:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            except PermissionError:
                pytest.skip("taking a connection apart silently needs CAP_NET_ADMIN")
            sock.close()
        until(lambda: good.audit()["in_use"] == 0)


# ---------------------------------------------------------------- limits


def test_reading_a_part_counts_the_pages_of_that_part():
    page = 4096
    with serving("--client-pages", "10", shards=1) as servers:
        client = servers.client()
        data = bytes(range(256)) * 16 * 8
        ref = client.put(data)
        with pytest.raises(OverQuota):
            client.get(ref, keep=True)  # 8 pages are held, and 8 more would be
        for offset, size in ((0, 1), (page - 1, 2), (5 * page + 7, 100), (6 * page, 2 * page)):
            assert client.get(ref, offset=offset, size=size, keep=True) == data[offset:][:size]
        assert client.get(ref) == data


def test_a_client_holds_no_more_than_the_server_allows():
    with serving(
        "--client-pages", "10", "--client-refs", "3", "--client-ranges", "5", "--client-virtual", "100",
        shards=1,
    ) as servers:  # fmt: skip
        greedy, other = servers.client(), servers.client()
        with pytest.raises(OverQuota):
            greedy.put(b"x" * 11 * PAGE)
        refs = [greedy.put(b"x") for _ in range(3)]
        with pytest.raises(MemoryError):
            greedy.put(b"x")
        ranges = [greedy.ralloc(PAGE) for _ in range(5)]
        with pytest.raises(OverQuota):
            greedy.ralloc(PAGE)
        greedy.rfree(ranges.pop())
        with pytest.raises(OverQuota):
            greedy.ralloc(100 * PAGE)
        assert other.get(other.put(b"y" * 10 * PAGE)) == b"y" * 10 * PAGE
        for ref in refs:
            ref.drop()


def test_a_server_short_of_descriptors_serves_those_it_has():
    with serving(shards=1) as servers:
        good = servers.client()
        good.ping()
        pid = servers.servers[0].process.pid
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
        crowd = [connected(servers) for _ in range(20)]
        for _ in range(20):
            good.ping()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for sock in crowd:
            sock.close()
        servers.client(connect_within=60).ping()


def test_a_client_may_ask_much_at_once_from_many_threads_until_the_server_is_full():
    with serving("--max-clients", "5", shards=2) as servers:
        results: list[object] = []

        def come() -> None:
            try:
                results.append(servers.client())
            except NoHostSlot as error:
                results.append(error)

        threads = [threading.Thread(target=come) for _ in range(15)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        clients = [result for result in results if isinstance(result, dmrpc_net.Client)]
        assert len(clients) == 5
        for client in clients:
            client.ping()


def test_nothing_of_a_client_reaches_another_through_a_slow_answer(servers, good, intruder):
    """While an answer waits in the server for its reader, its pages may change hands: not these."""
    key = good.put(b"A" * 2000 * PAGE).to_bytes()[8:16]
    number = int.from_bytes(key, "little")
    intruder.data.sendall(
        request("GET", 1, number, 2000 * PAGE, 0, 2000 * PAGE, flags=WIRE["flags"]["KEEP"])
    )
    select.select([intruder.data], [], [])
    wire = struct.pack(WIRE["structs"]["ref"][0], 0, 0, WIRE["ref_tag"], number, 2000 * PAGE)
    assert good.drop_ref(wire) is True
    for _ in range(5):
        good.get(good.put(b"B" * 2500 * PAGE))
    head = intruder.data.recv(32, socket.MSG_WAITALL)
    left = struct.unpack_from("<I", head)[0]
    while left:
        piece = intruder.data.recv(min(left, 1 << 16))
        assert piece
        assert not piece.strip(b"A")
        left -= len(piece)

"""One process holding both ends of a ring pair, or one end and a forgery."""

import contextlib
import fcntl
import functools
import gc
import mmap
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmrpc_cxl._native import Ring, WaitSet
from dmrpc_cxl.errors import (
    BadAddress,
    BadSize,
    DeadlineExceeded,
    ForkedError,
    MisuseError,
    PeerLost,
    RemoteProtocolError,
    RingClosed,
)
from tests.rings import attach, ended, forked, frame, in_program, pair, receive

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
TO_CLIENT, TO_SERVER, DATA = 512, 1024, 4096
TAIL, HEAD = 0, 128


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("size", [40, 41, 60, 1000, 4096])
def test_a_frame_arrives_as_it_was_sent_in_both_directions(size: int) -> None:
    server, client = pair()
    for a, b in ((server, client), (client, server)):
        a.send(frame(size))
        got = b.recv()
        assert isinstance(got, bytearray)
        assert got == frame(size)
        assert b.recv() is None


def test_parts_are_gathered_whatever_holds_them() -> None:
    server, client = pair()
    whole = frame(1000)
    parts = [
        whole[:4],
        bytearray(whole[4:9]),
        b"",
        memoryview(whole)[9:500],
        *(whole[at : at + 10] for at in range(500, 1000, 10)),
    ]
    server.send(parts)
    server.send(tuple(parts))
    server.send(memoryview(whole))
    assert [client.recv() for _ in range(3)] == [whole] * 3


def test_what_is_no_buffer_is_refused_and_nothing_is_sent() -> None:
    server, client = pair()
    for bad in ("text", [b"x" * 40, 7], memoryview(b"x" * 80)[::2]):
        with pytest.raises((TypeError, BufferError)):
            server.send(bad)
    assert not client.has_data()


def test_frames_go_round_a_ring_that_is_hardly_larger() -> None:
    server, client = pair(capacity=128)
    for size in [40, 41, 63, 100, 127, 128] * 50:
        server.send(frame(size, size))
        assert client.recv() == frame(size, size)


def test_a_frame_larger_than_the_ring_goes_in_pieces_by_try_send() -> None:
    server, client = pair(capacity=4096)
    whole, sent = frame(3_000_000), 0
    while sent < len(whole):
        assert client.recv() is None
        sent += server.try_send([whole[:100], whole[100:]], sent)
    assert client.recv() == whole


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(40, 5000), min_size=1, max_size=30),
    capacity=st.sampled_from([64, 128, 1024, 8192]),
    data=st.data(),
)
def test_any_frames_cut_anywhere_come_out_whole(sizes, capacity, data) -> None:
    server, client = pair(capacity=capacity)
    frames = [frame(size, number) for number, size in enumerate(sizes)]
    stream, got, at = b"".join(frames), [], 0
    while at < len(stream):
        upto = min(len(stream), at + data.draw(st.integers(1, 3000)))
        at += server.try_send(stream[:upto], at)
        while (one := client.recv()) is not None:
            got.append(one)
    assert got == frames
    server.close()
    client.close()


# ---------------------------------------------------------------- full and empty


def test_a_send_that_times_out_before_its_first_byte_changes_nothing() -> None:
    server, client = pair(capacity=64)
    server.send(frame(64))
    with pytest.raises(DeadlineExceeded, match="stayed full"):
        server.send(frame(40), timeout=0.01)
    assert client.recv() == frame(64)
    server.send(frame(40), timeout=0)
    assert client.recv() == frame(40)


def test_a_send_that_times_out_within_a_frame_closes_the_ring_for_sending() -> None:
    server, client = pair(capacity=64)
    with pytest.raises(DeadlineExceeded, match="64 of 100 bytes had gone out"):
        server.send(frame(100), timeout=0.01)
    with pytest.raises(RingClosed, match="closed for sending"):
        server.send(frame(40))
    client.send(frame(40))
    assert server.recv() == frame(40)


def test_the_bell_rings_once_for_data_and_only_when_armed() -> None:
    server, client = pair()
    bell = select.poll()
    bell.register(client.bell_fd, select.POLLIN)
    server.send(frame(40))
    assert not bell.poll(0)
    assert client.arm()
    assert client.recv() == frame(40)
    assert not client.arm()
    assert not bell.poll(0)
    server.send(frame(40))
    server.send(frame(40))
    assert bell.poll(0)
    assert server.stats()["bells_rung"] == 1
    client.drain_bell()
    assert not bell.poll(0)


def test_after_a_short_try_send_the_bell_rings_when_there_is_room() -> None:
    server, client = pair(capacity=256)
    bell = select.poll()
    bell.register(server.bell_fd, select.POLLIN)
    assert server.try_send(frame(300)) == 256
    assert not bell.poll(0)
    assert client.recv() is None
    assert bell.poll(0)
    assert server.try_send(frame(300), 256) == 44
    assert client.recv() == frame(300)


def test_wait_returns_at_its_time_and_says_no() -> None:
    server, client = pair()
    assert client.wait(0) is False
    assert client.wait(0.01) is False
    server.send(frame(40))
    assert client.wait(0) is True


# ---------------------------------------------------------------- the peer's end


def test_a_wait_ends_when_the_peers_socket_does_but_data_comes_first() -> None:
    server, client = pair()
    mine, its = socket.socketpair()
    server.set_peer_fd(mine.fileno())
    client.send(frame(40))
    its.close()
    assert server.wait() is True
    assert server.recv() == frame(40)
    assert server.wait() is False
    assert server.peer_gone
    server.close()
    mine.close()


def test_a_wait_ends_when_the_peers_socket_has_something_to_say() -> None:
    server, _client = pair()
    mine, its = socket.socketpair()
    server.set_peer_fd(mine.fileno())
    its.send(b"hello")
    assert server.wait() is False
    assert server.peer_spoke
    assert not server.peer_gone
    assert mine.recv(10) == b"hello"
    assert server.wait(0.01) is False
    assert not server.peer_spoke
    server.close()
    mine.close()
    its.close()


def test_a_blocked_send_ends_when_the_peers_socket_does() -> None:
    server, _client = pair(capacity=64)
    mine, its = socket.socketpair()
    server.set_peer_fd(mine.fileno())
    its.close()
    with pytest.raises(PeerLost, match="64 of 100 bytes had gone out"):
        server.send(frame(100))
    server.close()
    mine.close()


# ---------------------------------------------------------------- forgeries


@contextlib.contextmanager
def forged(size: int, seals: int, header: bytes = b"") -> Iterator[tuple[int, int, int]]:
    memory = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)] if hasattr(os, "eventfd") else []
    with contextlib.ExitStack() as ending:
        if not bells:
            ring = ending.enter_context(Ring.create())
            bells = [os.dup(fd) for fd in ring.fds[1:]]
        for fd in (memory, *bells):
            ending.callback(os.close, fd)
        os.ftruncate(memory, size)
        os.pwrite(memory, header, 0)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        yield memory, bells[0], bells[1]


def header(magic: bytes = b"DmPcring", version: int = 1, capacity: int = 8192) -> bytes:
    return magic + struct.pack("<IIQ", version, 0, capacity)


def refused(fds: tuple[int, int, int], why: str) -> None:
    gc.collect()
    before = descriptors()
    with pytest.raises(RemoteProtocolError, match=why):
        Ring.attach(*fds)
    assert descriptors() == before


def test_memory_with_all_that_a_ring_needs_is_accepted() -> None:
    with forged(DATA + 2 * 8192, SEALS, header()) as fds:
        assert Ring.attach(*fds).capacity == 8192


@pytest.mark.parametrize(
    "seals",
    [0, fcntl.F_SEAL_SHRINK, SEALS & ~fcntl.F_SEAL_SEAL, SEALS & ~fcntl.F_SEAL_GROW],
)
def test_memory_that_is_not_sealed_is_refused(seals: int) -> None:
    with forged(DATA + 2 * 8192, seals, header()) as fds:
        refused(fds, "not sealed")


@pytest.mark.parametrize("size", [0, 1, DATA, DATA + 64, DATA + 2 * 8192 - 1, DATA + 2 * 96])
def test_memory_of_a_size_that_no_ring_has_is_refused(size: int) -> None:
    with forged(size, SEALS, header()) as fds:
        refused(fds, "size no ring has")


@pytest.mark.parametrize(
    "content", [b"", header(magic=b"DmPcrong"), header(version=2), header(capacity=4096)]
)
def test_memory_with_another_header_is_refused(content: bytes) -> None:
    with forged(DATA + 2 * 8192, SEALS, content) as fds:
        refused(fds, "not a ring")


def test_memory_that_may_not_be_written_is_refused() -> None:
    with forged(DATA + 2 * 8192, SEALS | fcntl.F_SEAL_WRITE, header()) as fds:
        refused(fds, "cannot be mapped")


def test_what_is_no_memfd_is_refused(tmp_path: Path) -> None:
    with forged(DATA + 2 * 8192, SEALS, header()) as fds, open(tmp_path / "f", "w+b") as file:
        file.truncate(DATA + 2 * 8192)
        refused((file.fileno(), *fds[1:]), "not sealed")


def test_a_bell_that_is_no_eventfd_or_may_block_is_refused() -> None:
    readable, writable = os.pipe()
    server = Ring.create()
    memory, mine, its = server.fds
    refused((memory, readable, mine), "bell")
    refused((memory, its, writable), "bell")
    os.set_blocking(its, True)
    refused((memory, its, mine), "bell")
    os.close(readable)
    os.close(writable)


# ---------------------------------------------------------------- lies in the memory


@pytest.fixture
def victim() -> Iterator[tuple[Ring, mmap.mmap]]:
    """Give a server, and its memory as its client may write it."""
    server = Ring.create(capacity=4096)
    memory = mmap.mmap(server.fds[0], DATA + 2 * 4096)
    yield server, memory
    memory.close()


def poke(memory: mmap.mmap, at: int, value: int) -> None:
    memory[at : at + 8] = struct.pack("<Q", value)


@pytest.mark.parametrize("tail", [4097, 2**32, 2**63, 2**64 - 1])
def test_an_impossible_write_index_is_an_error_for_good(victim, tail: int) -> None:
    server, memory = victim
    poke(memory, TO_SERVER + TAIL, tail)
    assert server.wait() is True
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            server.recv()
    poke(memory, TO_SERVER + TAIL, 0)
    with pytest.raises(RemoteProtocolError):
        server.recv()


@pytest.mark.parametrize("head", [41, 2**32, 2**63, 2**64 - 5000])
def test_an_impossible_read_index_is_an_error_once_room_is_looked_for(victim, head: int) -> None:
    server, memory = victim
    server.send(frame(40))
    poke(memory, TO_CLIENT + HEAD, head)
    with pytest.raises(RemoteProtocolError):
        server.send(frame(5000), timeout=1)
    with pytest.raises(RingClosed):
        server.send(frame(40))


@pytest.mark.parametrize("size", [0, 3, 39, 2**30 + 1, 2**32 - 1])
def test_a_size_that_no_frame_has_is_an_error(victim, size: int) -> None:
    server, memory = victim
    memory[DATA + 4096 : DATA + 4100] = struct.pack("<I", size)
    poke(memory, TO_SERVER + TAIL, 64)
    with pytest.raises(RemoteProtocolError, match="announced"):
        server.recv()


def test_a_frame_above_max_frame_is_an_error() -> None:
    server = Ring.create(max_frame=100)
    client = attach(server)
    client.send(frame(100))
    client.send(frame(101))
    assert server.recv() == frame(100)
    with pytest.raises(RemoteProtocolError, match="announced a frame of 101"):
        server.recv()


def test_a_claimed_size_costs_no_memory_before_bytes_arrive() -> None:
    server, client = pair()
    client.try_send(struct.pack("<I", 1 << 30) + bytes(60))
    assert server.recv() is None
    held = [o for o in gc.get_objects() if isinstance(o, bytearray) and len(o) > 1 << 20]
    assert not held
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[0])
    server.recv()
    with open("/proc/self/statm") as file:
        assert int(file.read().split()[0]) - before < 4096  # pages: far from 1 GiB


def lie(memory: mmap.mmap, stop: threading.Event, seed: float) -> None:
    rng = random.Random(seed)
    while not stop.is_set():
        control = rng.choice([TO_CLIENT, TO_SERVER])
        near = struct.unpack_from("<Q", memory, control + HEAD)[0] + rng.randrange(-50, 5000)
        value = rng.choice([near % 2**64, near % 2**64, rng.getrandbits(64)])
        poke(memory, control + rng.choice([0, 128, 256, 384]), value)
        at = DATA + rng.randrange(2 * 4096 - 4)
        memory[at : at + 4] = struct.pack("<I", rng.choice([40, 60, 5000, 2**31]))


def try_everything(server: Ring, client: Ring, rng: random.Random) -> None:
    for act in (
        lambda: server.send(frame(rng.choice([40, 1000, 9000])), timeout=0.001),
        server.recv,
        lambda: server.wait(0.0001),
        lambda: server.try_send(frame(3000)),
        server.arm,
        lambda: client.send(frame(60), timeout=0),
    ):
        with contextlib.suppress(RemoteProtocolError, RingClosed, DeadlineExceeded):
            act()


def garble(seed: int) -> None:
    """Change words of the memory at every moment between calls, and at any moment within them."""
    rng = random.Random(seed)
    for _ in range(60):
        server = Ring.create(capacity=4096)
        client = attach(server)
        memory = mmap.mmap(server.fds[0], DATA + 2 * 4096)
        stop = threading.Event()
        liar = threading.Thread(target=lie, args=(memory, stop, rng.random()))
        liar.start()
        for _ in range(30):
            try_everything(server, client, rng)
        stop.set()
        liar.join()
        memory.close()
        server.close()
        client.close()


def test_garbled_memory_is_never_worse_than_an_error() -> None:
    in_program(garble, random.randrange(2**32))


# ---------------------------------------------------------------- ends


def test_a_closed_ring_refuses_everything_and_closes_twice() -> None:
    server, client = pair()
    server.close()
    server.close()
    assert server.closed
    for act in (
        lambda: server.send(frame(40)),
        lambda: server.try_send(frame(40)),
        server.recv,
        server.has_data,
        server.arm,
        lambda: server.wait(0),
        lambda: server.fds,
        server.stats,
        lambda: server.set_peer_fd(-1),
    ):
        with pytest.raises(RingClosed):
            act()
    client.send(frame(40))  # the other end has its own mapping


def test_rings_leave_no_descriptor_no_mapping_and_no_file() -> None:
    gc.collect()  # what earlier tests left
    before, files = descriptors(), set(os.listdir("/dev/shm"))
    mapped = Path("/proc/self/maps").read_text().count("dmrpc-ring")
    for _ in range(50):
        server, client = pair()
        server.send(frame(100))
        client.recv()
        client.wait(0)
        with WaitSet() as waiting:
            waiting.add_ring(server, 1)
            waiting.wait(0)
        server.close()
    del server, client
    gc.collect()
    assert descriptors() == before
    assert set(os.listdir("/dev/shm")) <= files
    assert Path("/proc/self/maps").read_text().count("dmrpc-ring") == mapped


def expect_closed(act: Callable[[], object], ends: list[int]) -> None:
    try:
        act()
    except RingClosed:
        ends.append(1)


def close_under_calls() -> None:
    for _ in range(300):
        server, client = pair(capacity=64)
        ends: list[int] = []
        threads = [
            threading.Thread(target=expect_closed, args=(act, ends))
            for act in (server.wait, functools.partial(server.send, frame(100)))
        ]
        for thread in threads:
            thread.start()
        server.close()
        for thread in threads:
            thread.join()
        assert len(ends) == 2
        client.close()


def test_closing_brings_back_who_waits_and_who_sends() -> None:
    in_program(close_under_calls)


def use_after_fork() -> None:
    server, _client = pair()

    def child() -> None:
        with pytest.raises(ForkedError):
            server.send(frame(40))
        server.close()

    ended(forked(child))
    server.send(frame(40))


def test_a_forked_child_is_refused_its_parents_ring() -> None:
    in_program(use_after_fork)


@pytest.mark.parametrize("capacity", [0, 1, 63, 100, 3 << 20, 1 << 31])
def test_a_capacity_that_is_no_power_of_two_is_refused(capacity: int) -> None:
    with pytest.raises(BadSize):
        Ring.create(capacity=capacity)
    with pytest.raises(BadSize):
        Ring.create(max_frame=39)


# ---------------------------------------------------------------- wait sets


def test_a_wait_set_reports_rings_descriptors_and_kicks_by_their_keys() -> None:
    server, client = pair()
    readable, writable = os.pipe()
    with WaitSet() as waiting:
        assert waiting.wait(0) is None
        waiting.add_ring(server, 7)
        waiting.add_fd(readable, 8, edge=False)
        client.send(frame(40))
        assert waiting.wait() == 7
        assert waiting.wait(0) is None
        os.write(writable, b"x")
        assert [waiting.wait(), waiting.wait()] == [8, 8]
        os.read(readable, 1)
        assert waiting.wait(0) is None
        waiting.kick(2)
        assert [waiting.wait(), waiting.wait(), waiting.wait(0)] == [-1, -1, None]
        with pytest.raises(MisuseError):
            waiting.add_ring(server, 9)
        waiting.remove(server)
        waiting.remove(readable)
        for gone in (server, readable):
            with pytest.raises(BadAddress):
                waiting.remove(gone)
    with pytest.raises(RingClosed):
        waiting.wait()
    os.close(readable)
    os.close(writable)


def test_a_ring_is_reported_once_for_each_time_it_is_armed() -> None:
    server, client = pair()
    client.send(frame(40))
    with WaitSet() as waiting:
        waiting.add_ring(server, 7)
        assert waiting.wait() == 7
        client.send(frame(40))
        assert waiting.wait(0) is None
        assert server.recv() is not None
        assert server.arm()
        assert server.recv() is not None
        assert not server.arm()
        assert waiting.wait(0) is None
        client.send(frame(40))
        assert waiting.wait() == 7


def test_a_ring_may_be_closed_before_it_is_removed() -> None:
    gc.collect()
    before = descriptors()
    with WaitSet() as waiting:
        server, client = pair()
        waiting.add_ring(server, 7)
        server.close()
        client.send(frame(40))
        waiting.wait(0)
        waiting.remove(server)
        client.close()
    assert descriptors() == before


def crew(spin_us: int) -> None:
    nr_rings, nr_threads, nr_frames = 8, 4, 3000
    pairs = [pair(capacity=4096) for _ in range(nr_rings)]
    locks = [threading.Lock() for _ in range(nr_rings)]
    seen: list[list[bytearray]] = [[] for _ in range(nr_rings)]
    waiting = WaitSet()
    waiting.set_spin_us(spin_us)
    done = threading.Semaphore(0)

    def serve() -> None:
        while (key := waiting.wait()) != -1:
            with locks[key]:
                server = pairs[key][0]
                while True:
                    while (got := server.recv()) is not None:
                        seen[key].append(got)
                        server.send(got)
                        if len(seen[key]) == nr_frames:
                            done.release()
                    if not server.arm():
                        break

    def ask(key: int) -> None:
        client = pairs[key][1]
        rng = random.Random(key)
        for number in range(nr_frames):
            whole = frame(rng.randrange(40, 300), number)
            client.send(whole)
            assert receive(client) == whole

    threads = [threading.Thread(target=serve) for _ in range(nr_threads)]
    clients = [threading.Thread(target=ask, args=(key,)) for key in range(nr_rings)]
    for thread in threads + clients:
        thread.start()
    for key, (server, _) in enumerate(pairs):
        waiting.add_ring(server, key)
    for _ in range(nr_rings):
        done.acquire()
    waiting.kick(nr_threads)
    for thread in threads + clients:
        thread.join()
    assert [len(frames) for frames in seen] == [nr_frames] * nr_rings
    waiting.close()


@pytest.mark.parametrize("spin_us", [0, 40])
def test_every_frame_of_eight_rings_is_handled_once_by_four_threads(spin_us: int) -> None:
    in_program(crew, spin_us)


def close_while_all_wait() -> None:
    for _ in range(100):
        waiting = WaitSet()
        ends: list[int] = []
        threads = [
            threading.Thread(target=expect_closed, args=(waiting.wait, ends)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        waiting.close()
        for thread in threads:
            thread.join()
        assert len(ends) == 4


def test_closing_a_wait_set_brings_back_all_who_wait() -> None:
    in_program(close_while_all_wait)

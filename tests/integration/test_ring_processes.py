"""Rings between processes: streams, deaths, and the hunt for a wake-up that is lost.

Each test runs in a program of its own, which forks the other end: see tests/rings.py.
"""

import os
import random
import signal
import socket
import threading

import pytest

from dmrpc_cxl._native import Ring
from dmrpc_cxl.errors import PeerLost
from tests.rings import attach, ended, forked, frame, in_program, receive

SIZES = [40, 41, 4096, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1, 5_000_001, 64 << 20]


def stream_and_return() -> None:
    server = Ring.create(capacity=64 << 10)
    fds = server.fds

    def child() -> None:
        client = attach(fds)
        for number, size in enumerate(SIZES):
            got = receive(client)
            assert got == frame(size, number)
            client.send(got)

    pid = forked(child)
    for number, size in enumerate(SIZES):
        whole = frame(size, number)
        server.send([whole[:7], whole[7:]])
        assert receive(server) == whole
    ended(pid)


def test_frames_of_40_bytes_to_64_mib_stream_through_a_ring_of_64_kib() -> None:
    in_program(stream_and_return)


def both_ways(seed: int) -> None:
    server = Ring.create(capacity=64 << 10)
    fds = server.fds

    def talk(ring: Ring, mine: int, its: int) -> None:
        def send() -> None:
            rng = random.Random(mine)
            for number in range(150):
                ring.send(frame(int(40 * 1.08 ** rng.randrange(150)), number))

        thread = threading.Thread(target=send)
        thread.start()
        rng = random.Random(its)
        for number in range(150):
            assert receive(ring) == frame(int(40 * 1.08 ** rng.randrange(150)), number)
        thread.join()

    pid = forked(lambda: talk(attach(fds), seed, seed + 1))
    talk(server, seed + 1, seed)
    ended(pid)


def test_both_directions_stream_at_once() -> None:
    in_program(both_ways, random.randrange(2**32))


# ---------------------------------------------------------------- deaths


def killed(blocked_in_send: bool) -> None:
    server = Ring.create(capacity=64 << 10)
    fds = server.fds
    mine, its = socket.socketpair()
    server.set_peer_fd(mine.fileno())

    def child() -> None:
        mine.close()
        client = attach(fds)
        client.send(frame(60))
        signal.pause()

    pid = forked(child)
    its.close()
    assert receive(server) == frame(60)
    killer = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
    killer.start()
    if blocked_in_send:
        with pytest.raises(PeerLost):
            server.send(frame(1 << 20))
    else:
        assert server.wait() is False
    assert server.peer_gone
    killer.join()
    os.waitpid(pid, 0)


def test_the_death_of_the_peer_wakes_who_waits() -> None:
    in_program(killed, False)


def test_the_death_of_the_peer_ends_a_blocked_send() -> None:
    in_program(killed, True)


# ---------------------------------------------------------------- wake-ups


def play(nr: int, cpus: int, spin_us: int) -> None:
    server = Ring.create(capacity=4096)
    fds = server.fds
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    server.spin_us = spin_us

    def child() -> None:
        client = attach(fds)
        client.spin_us = spin_us
        for _ in range(nr):
            client.send(receive(client))

    pid = forked(child)
    for number in range(nr):
        whole = frame(60 + number % 7)
        server.send(whole)
        assert receive(server) == whole
    ended(pid)


@pytest.mark.parametrize("spin_us", [0, 40, 1])
@pytest.mark.parametrize("cpus", [1, 64])
def test_no_wake_up_is_lost_in_a_long_rally(cpus: int, spin_us: int) -> None:
    in_program(play, 100_000 if cpus == 1 or spin_us else 20_000, cpus, spin_us)


def squeeze(cpus: int) -> None:
    """Many more bytes than fit go one way: the producer sleeps for space, the consumer for data."""
    server = Ring.create(capacity=128)
    fds = server.fds
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])

    def child() -> None:
        client = attach(fds)
        for number in range(20_000):
            assert len(receive(client)) == 40 + number % 300

    pid = forked(child)
    for number in range(20_000):
        server.send(frame(40 + number % 300))
    ended(pid)


@pytest.mark.parametrize("cpus", [1, 64])
def test_no_wake_up_for_space_is_lost(cpus: int) -> None:
    in_program(squeeze, cpus)

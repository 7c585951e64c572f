"""Clients that die at any moment, in the midst of anything, while others go on: every page is accounted for at the end.

Each client is a process that writes, shares, passes Refs on through a queue, maps what others passed on, and compares what it
reads with what has to be there: a block is full of one byte, and says which in its first word. A client that sees anything
else says so and fails. Meanwhile some are killed. In the end the rest leave, and the servers count.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import random
from typing import Any

import pytest

import dmrpc_net
from dmrpc_cxl.errors import OutOfFrames, RefConsumed
from tests.net_servers import serving
from tests.standing import until

PAGE = 4096
_spawn = multiprocessing.get_context("spawn")


def block(rng: random.Random) -> bytes:
    return bytes([rng.randrange(1, 256)]) * rng.choice([100, PAGE, 3 * PAGE, 20 * PAGE + 7])


def assert_whole(data: bytes | bytearray) -> None:
    assert data.count(data[:1]) == len(data), "bytes of two blocks in one"


def live(addresses: list[str], secret: str, seed: int, refs: Any, failures: Any, stop: Any) -> None:
    """Go on until told to stop, or killed."""
    faulthandler.dump_traceback_later(150, exit=True)
    rng = random.Random(seed)
    held: list[tuple[int, int]] = []  # address and length of ranges
    try:
        client = dmrpc_net.attach(addresses, secret=secret, deadline=60, connect_within=60)

        def pass_on(ref: dmrpc_net.Ref) -> None:
            try:
                refs.put_nowait(ref.to_bytes())
            except queue.Full:
                ref.drop()

        while not stop.is_set():
            act = rng.randrange(8)
            try:
                if act <= 1:
                    data = block(rng)
                    ref, address = client.put(data, keep=True)
                    held.append((address, len(data)))
                    pass_on(ref)
                elif act <= 3:
                    wire = refs.get_nowait()
                    if rng.random() < 0.5:
                        assert_whole(client.get(wire))
                    else:
                        ref = dmrpc_net.Ref.from_bytes(wire, client)
                        ref.accept()
                        clone = ref.clone()
                        address = client.map_ref(ref)
                        held.append((address, len(ref)))
                        pass_on(clone)
                elif act == 4 and held:
                    address, length = rng.choice(held)
                    client.rwrite(address, bytes([rng.randrange(256)]) * length)
                    pass_on(client.create_ref(address, length, copy=rng.random() < 0.2))
                elif act == 5 and held:
                    address, length = rng.choice(held)
                    assert_whole(client.read(address, length))
                elif act == 6 and held:
                    client.rfree(held.pop(rng.randrange(len(held)))[0])
                elif held:
                    # Many at once, and nobody looks at what comes of them.
                    p = client.pipeline()
                    for _ in range(rng.randrange(20)):
                        address, length = rng.choice(held)
                        p.rwrite(address, b"p" * length)
                        p.put(b"q" * 3000)
            except (RefConsumed, queue.Empty):
                pass
            except OutOfFrames:
                for address, _ in held:
                    client.rfree(address)
                held.clear()
        client.close()
    except BaseException as error:
        failures.put(f"seed {seed}: {error!r}")
        raise


def campaign(deaths: int, count: int, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    manager = _spawn.Manager()  # its queue survives the death of who uses it
    refs, failures, stop = manager.Queue(2000), manager.Queue(), manager.Event()
    with serving(count=2, shards=2, size="16M") as servers:
        where = (servers.addresses, str(servers.secret))

        def start() -> Any:
            process = _spawn.Process(
                target=live, args=(*where, rng.randrange(2**32), refs, failures, stop), daemon=True
            )
            process.start()
            return process

        alive = [start() for _ in range(count)]
        watcher = servers.client()
        try:
            until(lambda: watcher.stats()["nr_processes"] >= 4 + count)
            for _ in range(deaths):
                # At a moment that the work itself sets: after so many more requests.
                goal = watcher.stats()["requests"] + rng.randrange(400)
                until(lambda goal=goal: watcher.stats()["requests"] > goal)
                assert not watcher.audit()["nr_violations"]
                victim = alive.pop(rng.randrange(len(alive)))
                victim.kill()
                victim.join()
                alive.append(start())
            stop.set()
            for process in alive:
                process.join(60)
            assert [process.exitcode for process in alive] == [0] * count
            assert failures.empty(), [failures.get() for _ in range(failures.qsize())]
        finally:
            for process in alive:
                process.kill()
                process.join()
            manager.shutdown()
        # `serving` now audits: every page free, no Ref, no range.


def test_clients_that_are_killed_leave_no_page_behind():
    campaign(deaths=6, count=3, seed=int.from_bytes(os.urandom(4), "little"))


@pytest.mark.slow
def test_hundreds_of_clients_that_are_killed_leave_no_page_behind():
    campaign(deaths=200, count=4, seed=int.from_bytes(os.urandom(4), "little"))

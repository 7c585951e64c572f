"""The relay of a forwarder between real processes: mixed traffic, garbage, deaths, slow readers, what is left afterwards.

What single frames do is tested in tests/c/test_relay.c.
"""

import contextlib
import random
import socket
import threading
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl._native import Relay
from dmrpc_cxl.errors import DmError, MisuseError, PeerLost
from dmrpc_cxl.rpc import Forwarder, endpoint, frames
from tests.fabrics import At
from tests.rpc_services import Desk, Rpc, descriptors_and_threads, until_nothing_is_new
from tests.standing import until

SIZES = (1, 500, 4000, 100_000, 1 << 20, 16 << 20)


def _traffic(at: At, name: str, transport: str, seed: int, rounds: int) -> int:
    """Double arrays by value, three calls under way; return how many came back right."""
    rng, right = random.Random(seed), 0
    with at.host.connect(name, transport=transport, transfer="value") as desk:
        for i in range(rounds):
            size = rng.choice(SIZES[:4]) if i % 8 else rng.choice(SIZES)
            array = np.full(size // 8 + 1, seed * 1000 + i)
            futures = [desk.future.double(array + k) for k in range(3)]
            for k, future in enumerate(futures):
                right += bool((future.result() == 2 * (array + k)).all())
    return right


def test_frames_of_any_size_pass_between_many_over_rings_and_tcp(rpc: Rpc) -> None:
    for where, name in enumerate(("one", "two")):
        rpc.serve(where, Desk, name)
    with Forwarder(rpc.host, "front", ["one", "two"], transport="tcp") as forwarder:
        hosts = [*rpc.hosts, rpc.extra_host(), rpc.extra_host()]
        right: list[int] = []

        def run(i: int) -> None:
            right.append(hosts[i].call(_traffic, "front", ("ring", "tcp")[i % 2], i, 40))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [120] * 4
        assert forwarder.nr_forwarded == 480 == sum(forwarder.forwarded_to.values())


def _begin_traffic(at: At, name: str, transport: str) -> None:
    at.thread = threading.Thread(
        target=_traffic, args=(at, name, transport, 1, 1 << 20), daemon=True
    )
    at.thread.start()


@pytest.mark.parametrize("transfer", ["value", "ref"])
def test_clients_killed_at_any_moment_leave_nothing(
    rpc: Rpc, transport: str, transfer: str
) -> None:
    rpc.serve(0, Desk, "desk")
    with Forwarder(rpc.host, "front", ["desk"]) as forwarder:
        desk = rpc.connect("front", transport=transport, transfer=transfer)
        rng = random.Random(5)
        for _ in range(4):
            host = rpc.extra_host()
            host.call(_begin_traffic, "front", transport)
            target = forwarder.nr_forwarded + rng.randrange(40)
            until(lambda target=target: forwarder.nr_forwarded >= target)
            host.kill()
            array = np.arange(20_000)
            np.testing.assert_array_equal(desk.double(array), 2 * array)
        until(lambda: forwarder._relay.nr_waiting == 0)
        desk.close()
    until(lambda: rpc.fabric.audit()["live_refs"] == 0)


def test_garbage_closes_its_connection_and_no_other(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    with Forwarder(rpc.host, "front", ["desk"]) as forwarder:
        desk = rpc.connect("front")
        assert desk.echo(1) == 1
        rng = random.Random(7)
        for i in range(20):
            channel, _ = endpoint.connect(rpc.host, "front", transport, 5)  # type: ignore[arg-type]
            junk = rng.randbytes(rng.randrange(1, 3000))
            if i % 2:
                junk = bytearray(frames.head(rng.randrange(1, 9), rng.randrange(2), body=junk))
                junk[rng.randrange(4, 40)] ^= 1 << rng.randrange(8)
            channel.try_send((bytes(junk),), 0)
            channel.close()
            assert desk.echo(i) == i
        until(lambda: len(forwarder._peers) == 2)


def test_who_breaks_the_protocol_is_told(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    with Forwarder(rpc.host, "front", ["desk"]):
        channel, _ = endpoint.connect(rpc.host, "front", transport, 5)  # type: ignore[arg-type]
        channel.send((frames.short(frames.Kind.REPLY, 1),), 5)
        said: list[Any] = []

        def answer() -> bool:
            data = channel.recv()
            if data is not None:
                said.append(frames.parse(data))
            return bool(said)

        until(answer)
        assert said[0].kind == frames.Kind.ERROR
        assert said[0].method == frames.Code.VERSION
        assert "kind 4" in frames.read_error(said[0]).message
        channel.close()


def test_a_client_that_does_not_read_is_dropped(
    rpc: Rpc, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmrpc_cxl.rpc.forwarder.MAX_BACKLOG_BYTES", 1 << 20)
    rpc.serve(0, Desk, "desk")
    with Forwarder(rpc.host, "front", ["desk"]) as forwarder:
        desk = rpc.connect("front")
        slow, _ = endpoint.connect(rpc.host, "front", transport, 5)  # type: ignore[arg-type]
        for call_id in range(1, 1 << 20):
            # Refused with a text: all that is sent comes back, somewhat longer.
            frame = frames.head(frames.Kind.CALL, call_id, body=b"\xc1", method=1 << 20)
            try:
                slow.send((frame,), 10)
            except DmError:
                break
            if len(forwarder._peers) == 2:
                break
        until(lambda: len(forwarder._peers) == 2)
        assert desk.echo(3) == 3
        slow.close()


@pytest.mark.parametrize("kind", ["stop", "leave"])
def test_descriptors_are_as_before_when_it_ends_under_load(rpc: Rpc, kind: str) -> None:
    rpc.serve(0, Desk, "one")
    rpc.serve(1, Desk, "two")
    before = descriptors_and_threads()
    for _ in range(3):
        forwarder = Forwarder(rpc.host, "front", ["one", "two"], transport="tcp")
        clients = [rpc.host.connect("front", transport=t) for t in ("ring", "tcp")]
        futures = [client.future.echo(i) for client in clients for i in range(200)]
        if kind == "leave":
            for client in clients:
                client.close()
        forwarder.stop()
        for future in futures:
            with contextlib.suppress(DmError):
                future.result(10)
        for client in clients:
            client.close()
        assert forwarder.nr_forwarded >= 0
        del futures, clients, forwarder
    until_nothing_is_new(before)


def test_a_relay_is_used_by_one_thread_at_a_time() -> None:
    refusal = endpoint.error_frame(0, frames.Code.PEER, PeerLost("nobody"))
    relay = Relay(10, 10, 1 << 20, refusal, refusal)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        relay.watch(ours.fileno())
        events: list[tuple[int, int, str]] = []
        thread = threading.Thread(target=lambda: events.append(relay.run()))
        thread.start()
        until(lambda: _refused(relay))
        theirs.send(b"x")
        thread.join()
        assert events[0][1] == ours.fileno()
        relay.unwatch(ours.fileno())
        with pytest.raises(ValueError, match="ERROR"):
            relay.remove(1, b"")
        with pytest.raises(DmError):
            relay.remove(1, refusal)
    relay.close()
    relay.close()
    assert relay.nr_forwarded == relay.nr_waiting == relay.forwarded(1) == 0


def _refused(relay: Relay) -> bool:
    try:
        relay.leave_out(1)
    except MisuseError:
        return True
    except DmError:
        return False
    return False

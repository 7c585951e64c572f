"""A running coordinator against strangers that send anything, and hosts that ask for anything."""

import contextlib
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmrpc_cxl.coordinator.extents import Run
from dmrpc_cxl.coordinator.messages import Grant, Hello, MsgType, Register, Rejoin
from dmrpc_cxl.coordinator.protocol import PeerSide
from dmrpc_cxl.errors import CoordinatorLost, DmError
from tests.coordinators import POOL, SECONDS, Raw, coordinated
from tests.fuzz.test_coordinator_protocol import JSON, STREAMS, U32, U64

RELAXED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def fabric(tmp_path):
    with coordinated(tmp_path, "--tcp", "127.0.0.1:0", "--recall-timeout", "0.01") as fabric:
        yield fabric


def connect(fabric, tcp):
    found = fabric.device.superblock
    if tcp:
        return socket.create_connection((found["tcp_host"], found["tcp_port"]), SECONDS)
    stranger = socket.socket(socket.AF_UNIX)
    stranger.settimeout(SECONDS)
    stranger.connect(found["unix_path"])
    return stranger


def test_strangers_that_send_anything_are_shown_the_door_and_others_are_served(fabric):
    found = fabric.device.superblock
    with fabric.client() as client:
        before = len(fabric.coordinator.open_files())

        @RELAXED
        @given(st.booleans(), st.booleans(), st.integers(0, 3), STREAMS)
        def attack(tcp, introduced, nr_descriptors, stream):
            hello = PeerSide().request(MsgType.HELLO, Hello(found["fabric_id"], found["secret"]))
            data = hello * introduced + stream
            with connect(fabric, tcp) as stranger, contextlib.suppress(ConnectionError):
                if nr_descriptors and not tcp and data:
                    socket.send_fds(stranger, [data], [stranger.fileno()] * nr_descriptors)
                else:
                    stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(65536):
                    pass
            assert client.services() == []

        attack()
        fabric.wait_until(lambda: len(fabric.coordinator.open_files()) == before)
        assert client.stats()["pool"]["free"] == fabric.nr_frames


RUNS = st.lists(
    st.builds(Run, st.integers(0, 1100) | U32, st.integers(0, 200) | U32), min_size=1, max_size=8
)
REQUESTS = st.one_of(
    st.tuples(
        st.just(MsgType.REGISTER),
        st.builds(Register, U64, U64, U32, U32, U32, U32, st.binary(min_size=64, max_size=64)),
    ),
    st.tuples(
        st.sampled_from([MsgType.REJOIN, MsgType.GUARD]),
        st.builds(Rejoin, U64, st.integers(0, 5) | U32, U32),
    ),
    st.tuples(
        st.just(MsgType.GRANT),
        st.builds(Grant, st.integers(0, 300) | U32, st.integers(0, 100) | U32),
    ),
    st.tuples(st.just(MsgType.RETURN), RUNS),
    st.tuples(st.just(MsgType.LEAVE), st.none()),
    st.tuples(
        st.sampled_from(
            [MsgType.PUBLISH, MsgType.WITHDRAW, MsgType.LOOKUP, MsgType.LIST, MsgType.STATS]
        ),
        JSON | st.fixed_dictionaries({"name": st.text(max_size=3), "endpoint": st.text()}),
    ),
    st.tuples(
        st.just(MsgType.WAIT),
        st.fixed_dictionaries({"hosts": st.integers(-1, 5), "timeout": st.just(0.001)}),
    ),
)


def converse(raw: Raw, requests: list[tuple[MsgType, object]]) -> None:
    """Say all that, be content with any answer or refusal, and make every host leave that came of it."""
    raw.register()
    for kind, body in requests:
        try:
            answer = raw.client.request(kind, body)
        except CoordinatorLost:
            raise
        except DmError:
            continue
        if kind is MsgType.GRANT:
            for (
                pfn,
                count,
            ) in answer:  # give half of it back, truthfully, and say so some time or never
                raw.device.transfer(pfn, count // 2, raw.device.frame(pfn)[1], POOL)
    for entry in raw.device.hosts():
        raw.client.rejoin(entry["host"], entry["incarnation"])
        raw.client.leave()
    raw.client.close()


def test_hosts_that_ask_for_anything_spoil_nothing(fabric):
    asking = fabric.process()

    @RELAXED
    @given(st.lists(REQUESTS, max_size=12))
    def chat(requests):
        asking.call(converse, requests)
        pool = fabric.stats()["pool"]
        assert (pool["free"], pool["extents"]) == (fabric.nr_frames, 1)
        assert fabric.device.audit()["nr_violations"] == 0

    chat()

"""Names and waiting, over real connections."""

import threading

import pytest

from dmrpc_cxl.coordinator.messages import MsgType, Status
from dmrpc_cxl.coordinator.refusals import Refused
from dmrpc_cxl.errors import DeadlineExceeded, ServiceExists, ServiceNotFound
from tests.coordinators import SECONDS, Raw, coordinated, leave, publish, register


@pytest.fixture
def fabric(tmp_path):
    with coordinated(tmp_path, "--tcp", "127.0.0.1:0") as fabric:
        yield fabric


def withdraw(raw: Raw, name: str) -> None:
    raw.client.withdraw(name)


def test_a_service_is_found_by_anybody_over_any_transport(fabric):
    host = fabric.host()
    endpoint = {"unix": "/run/x.sock", "ports": [1, 2]}
    host.call(publish, "users", endpoint)
    for transport in ({}, {"tcp": True}):
        with fabric.client(**transport) as client:
            assert client.lookup("users") == {"name": "users", "endpoint": endpoint, "host": 1}
            assert [found["name"] for found in client.services("us")] == ["users"]
            assert client.services("x") == []


def test_a_name_is_one_live_hosts_until_it_withdraws_it_or_leaves(fabric):
    host, other = fabric.host(), fabric.host()
    host.call(publish, "users", "a")
    with pytest.raises(ServiceExists):
        other.call(publish, "users", "b")
    with pytest.raises(ServiceNotFound):
        other.call(withdraw, "users")
    host.call(withdraw, "users")
    other.call(publish, "users", "b")
    other.call(leave)
    with fabric.client() as client, pytest.raises(ServiceNotFound):
        client.lookup("users")
    host.call(publish, "users", "a")


def test_a_name_that_dies_with_its_host_is_free_for_the_next(fabric):
    host, other = fabric.host(), fabric.host()
    host.call(publish, "users", "a")
    host.kill()
    fabric.host_died()
    other.call(publish, "users", "b")


def test_who_is_no_host_publishes_nothing(fabric):
    with fabric.client() as client:
        for request in (lambda: client.publish("users", "a"), lambda: client.withdraw("users")):
            with pytest.raises(Refused) as caught:
                request()
            assert caught.value.status is Status.NOT_REGISTERED
        assert client.services() == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (MsgType.LOOKUP, {}),
        (MsgType.LOOKUP, {"name": 7}),
        (MsgType.LOOKUP, {"name": "\ud800"}),
        (MsgType.LIST, {"prefix": None}),
        (MsgType.WAIT, {}),
        (MsgType.WAIT, {"hosts": 1, "name": "x"}),
        (MsgType.WAIT, {"hosts": "1"}),
        (MsgType.WAIT, {"hosts": True}),
        (MsgType.WAIT, {"hosts": -1}),
        (MsgType.WAIT, {"hosts": 1, "timeout": "soon"}),
        (MsgType.WAIT, {"hosts": 1, "timeout": -1}),
        (MsgType.WAIT, {"hosts": 1, "timeout": 1e300}),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_connection_goes_on(fabric, kind, body):
    with fabric.client() as client:
        with pytest.raises(Refused) as caught:
            client.request(kind, body)
        assert caught.value.status is Status.BAD_REQUEST
        assert client.services() == []


@pytest.mark.parametrize(
    ("name", "endpoint"), [("", "x"), ("a\tb", "x"), ("ok", None), ("ok", "x" * 5000)]
)
def test_a_name_or_endpoint_that_cannot_be_is_refused(fabric, name, endpoint):
    with pytest.raises(Refused) as caught:
        fabric.host().call(publish, name, endpoint)
    assert caught.value.status is Status.BAD_REQUEST


# ---------------------------------------------------------------- waiting


def wait_for_service(raw: Raw, name: str) -> None:
    raw.client.wait_for_service(name, SECONDS)


def wait_for_hosts(raw: Raw, number: int) -> None:
    raw.client.wait_for_hosts(number, SECONDS)


def test_waiting_ends_when_the_service_is_published(fabric):
    host, other = fabric.host(), fabric.host()
    other.start(wait_for_service, "users")
    fabric.wait_until(lambda: fabric.stats()["requests"].get("WAIT") == 1)
    host.call(publish, "other", "x")
    host.call(publish, "users", "x")
    other.result()


def test_waiting_ends_when_so_many_hosts_are_active(fabric):
    host, other = fabric.host(), fabric.process()
    host.start(wait_for_hosts, 2)
    fabric.wait_until(lambda: fabric.stats()["requests"].get("WAIT") == 1)
    other.call(register)
    host.result()


def test_what_is_true_already_is_not_waited_for(fabric):
    fabric.host().call(publish, "users", "x")
    with fabric.client() as client:
        client.wait_for_service("users", 0)
        client.wait_for_hosts(1, 0)
        client.wait_for_hosts(0, 0)


def test_waiting_for_what_does_not_come_ends_at_the_deadline(fabric):
    with fabric.client() as client:
        with pytest.raises(DeadlineExceeded):
            client.wait_for_hosts(1, 0.05)
        with pytest.raises(DeadlineExceeded):
            client.wait_for_service("users", 0)
        assert client.services() == []


def test_others_are_served_while_somebody_waits(fabric):
    waiting = fabric.client()
    thread = threading.Thread(target=waiting.wait_for_hosts, args=(1, SECONDS))
    thread.start()
    fabric.wait_until(lambda: fabric.stats()["requests"].get("WAIT") == 1)
    fabric.host()
    thread.join(SECONDS)
    assert not thread.is_alive()
    waiting.close()


def test_who_hangs_up_while_waiting_leaves_nothing_behind(fabric):
    before = len(fabric.coordinator.open_files())
    with fabric.client(timeout=0.05) as client, pytest.raises(DeadlineExceeded):
        client.request(MsgType.WAIT, {"hosts": 3, "timeout": 3600})
    fabric.wait_until(lambda: len(fabric.coordinator.open_files()) == before)
    assert fabric.coordinator.stop() == 0  # and is not waited for


def test_hosts_and_statistics_say_what_is_known_of_each_host(fabric):
    fabric.host()
    with fabric.client() as client:
        (row,) = client.hosts()
        assert (row["host"], row["state"], row["name"]) == (1, "active", "raw")
        assert row["watermarks"]["batch"] > 0
        stats = client.stats()
    assert stats["hosts"] == [row]
    assert stats["pool"]["nr_frames"] == fabric.nr_frames
    assert stats["requests"]["REGISTER"] == 1

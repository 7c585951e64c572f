"""Hosts as the coordinator sees them: registering, being watched, dying, leaving."""

import os
import secrets
import signal
from pathlib import Path

import pytest

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.coordinator.ledger import NoHostSlot
from dmrpc_cxl.coordinator.messages import MsgType, Register, Rejoin, Status
from dmrpc_cxl.coordinator.refusals import Refused
from dmrpc_cxl.errors import HostFenced, OutOfFrames, PeerError
from dmrpc_cxl.fabric.liveness import start_time
from pyuserfaultfd import UserFaultFD
from tests.coordinators import (
    Raw,
    coordinated,
    give_back,
    grant,
    leave,
    publish,
    register,
    rejoin,
)

ACTIVE = LAYOUT["HOST_ACTIVE"]


@pytest.fixture
def fabric(tmp_path):
    with coordinated(tmp_path, "--tcp", "127.0.0.1:0") as fabric:
        yield fabric


# ---------------------------------------------------------------- coming


def test_a_registered_host_stands_in_the_device_with_its_process(fabric):
    host = fabric.process()
    registered = host.call(register, token=77)
    entry = fabric.device.host(registered.host)
    assert registered.incarnation == entry["incarnation"] == 77
    assert (entry["state"], entry["pid"]) == (ACTIVE, host.pid)
    assert entry["start_time"] == start_time(host.pid)
    assert entry["name"] == "raw"


def wish(raw: Raw, low: int, high: int, batch: int):
    return raw.register(low=low, high=high, batch=batch)


def test_watermarks_are_what_was_wished_for_as_far_as_the_device_allows(fabric):
    modest = fabric.process().call(wish, 4, 32, 8)
    assert (modest.low, modest.high, modest.batch) == (4, 32, 8)
    greedy = fabric.process().call(wish, 10_000, 10_000, 10_000)
    share = fabric.nr_frames // 8
    assert (greedy.low, greedy.high, greedy.batch, greedy.batch_max) == (
        share // 2, share, share, share,
    )  # fmt: skip


def test_the_same_token_gets_the_same_answer_and_no_second_slot(fabric):
    host = fabric.process()
    first = host.call(register, token=5)
    assert host.call(register, token=5) == first
    assert len(fabric.device.hosts()) == 1


def test_the_same_token_gets_the_same_slot_from_the_next_coordinator(fabric):
    host = fabric.process()
    first = host.call(register, token=5)
    fabric.coordinator.kill()
    fabric.start()
    again = host.call(register, token=5)
    assert (again.host, again.incarnation, again.epoch) == (first.host, 5, 2)
    assert len(fabric.device.hosts()) == 1


def test_when_all_slots_are_taken_the_next_host_is_refused_until_one_leaves(fabric):
    hosts = [fabric.host() for _ in range(4)]
    late = fabric.process()
    with pytest.raises(NoHostSlot):
        late.call(register)
    hosts[2].call(leave)
    assert late.call(register).host == 3


def register_for(raw: Raw, pid: int, started: int, tcp: bool):
    with Client.of(raw.device, tcp=tcp) as client:
        body = Register(secrets.randbits(60), started, pid, 0, 0, 0, b"liar")
        return client.request(MsgType.REGISTER, body)


def test_over_tcp_a_host_proves_its_process_by_the_start_time(fabric):
    host = fabric.process()
    right = start_time(host.pid) or 0
    for pid, started in [(host.pid, right + 1), (2**22 + 5, right), (0, right), (host.pid, 0)]:
        with pytest.raises(Refused) as caught:
            host.call(register_for, pid, started, tcp=True)
        assert caught.value.status in (Status.DENIED, Status.BAD_REQUEST)
    assert fabric.device.hosts() == []
    registered = host.call(register_for, host.pid, right, tcp=True)
    assert fabric.device.host(registered.host)["pid"] == host.pid


def test_over_a_unix_socket_the_kernel_says_which_process_a_host_is(fabric):
    host = fabric.process()
    registered = host.call(register_for, 1, start_time(1), tcp=False)
    assert fabric.device.host(registered.host)["pid"] == host.pid


# ---------------------------------------------------------------- dying


def state_letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_killed_host_loses_slot_frames_and_names_though_it_is_a_zombie(fabric):
    host = fabric.host()
    runs = host.call(grant, 300)
    host.call(publish, "svc", "here")
    assert fabric.owners(runs) == {1}
    host.kill()
    fabric.host_died()
    assert state_letter(host.pid) == "Z"
    assert fabric.device.hosts() == []
    assert fabric.owners(runs) == {0}
    stats = fabric.stats()
    assert stats["pool"]["free"] == fabric.nr_frames
    assert stats["names"] == []
    (reclaim,) = stats["reclaims"]
    assert (reclaim["why"], reclaim["frames"]) == ("died", 300)


def test_a_host_that_closes_its_connections_is_not_dead(fabric):
    host = fabric.host()
    runs = host.call(grant, 10)
    host.call(publish, "svc", "here")
    host.call(hang_up)
    fabric.stats()
    assert fabric.device.host(1)["state"] == ACTIVE
    assert fabric.owners(runs) == {1}
    assert host.call(rejoin).host == 1
    assert fabric.stats()["names"][0]["host"] == 1
    host.call(give_back, runs)


def hang_up(raw: Raw) -> None:
    raw.client.close()


def test_the_slot_of_a_dead_host_goes_to_another_incarnation(fabric):
    first = fabric.process()
    was = first.call(register)
    first.kill()
    fabric.host_died()
    second = fabric.process()
    now = second.call(register)
    assert now.host == was.host
    assert now.incarnation != was.incarnation
    with pytest.raises(HostFenced):
        second.call(rejoin_as, was.host, was.incarnation)


def rejoin_as(raw: Raw, host: int, incarnation: int):
    with Client.of(raw.device) as client:
        return client.rejoin(host, incarnation)


def test_another_process_cannot_speak_for_a_host(fabric):
    host, other = fabric.process(), fabric.process()
    registered = host.call(register, token=9)
    with pytest.raises(Refused) as caught:
        other.call(rejoin_as, registered.host, 9)
    assert caught.value.status is Status.DENIED
    with pytest.raises(Refused) as caught:
        other.call(register, token=9)
    assert caught.value.status is Status.DENIED


def test_many_hosts_that_die_at_once_lose_nothing(fabric):
    hosts = [fabric.host() for _ in range(4)]
    for host in hosts:
        host.call(grant, 100)
    for host in hosts:
        host.kill()
    fabric.host_died(times=4)
    assert fabric.stats()["pool"] == {
        "nr_frames": fabric.nr_frames,
        "free": fabric.nr_frames,
        "extents": 1,
        "longest": fabric.nr_frames,
    }


# ---------------------------------------------------------------- leaving


def leave_twice(raw: Raw) -> str:
    raw.client.leave()
    try:
        raw.client.leave()
    except PeerError as error:
        return type(error).__name__
    return ""


def test_a_host_that_leaves_frees_its_slot_and_cannot_come_back_under_its_token(fabric):
    host = fabric.process()
    registered = host.call(register, token=3)
    host.call(grant, 20)
    host.call(publish, "svc", "here")
    host.call(leave)
    assert fabric.device.hosts() == []
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames
    assert fabric.stats()["names"] == []
    for attempt in (lambda: host.call(register, token=3), lambda: host.call(rejoin)):
        with pytest.raises(HostFenced):
            attempt()
    assert host.call(register, token=4).host == registered.host
    assert host.call(leave_twice) in ("Refused", "HostFenced")


# ---------------------------------------------------------------- the guard


def guard(raw: Raw) -> None:
    uffd, client = UserFaultFD(), Client.of(raw.device)
    client.guard(raw.registered.host, raw.registered.incarnation, uffd.fileno())
    raw.kept = [uffd, client]


def guard_with(raw: Raw, host: int, incarnation: int, kinds: str, tcp: bool = False) -> None:
    with UserFaultFD() as uffd, Client.of(raw.device, tcp=tcp) as client, open("/dev/null") as null:
        numbers = {"u": uffd.fileno(), "n": null.fileno()}
        descriptors = [numbers[kind] for kind in kinds]
        client.request(MsgType.GUARD, Rejoin(incarnation, host), descriptors=descriptors)


def close_guard(raw: Raw) -> None:
    for kept in raw.kept:
        kept.close()


def test_the_coordinator_holds_the_userfaultfd_until_the_process_is_gone(fabric):
    host = fabric.host()
    host.call(guard)
    assert fabric.coordinator.nr_guards() == 1
    host.call(close_guard)  # the host loses its own descriptor, and the connection
    fabric.stats()
    assert fabric.coordinator.nr_guards() == 1
    host.call(guard)
    assert fabric.coordinator.nr_guards() == 1
    host.kill()
    fabric.host_died()
    fabric.wait_until(lambda: fabric.coordinator.nr_guards() == 0)


def test_after_leaving_the_userfaultfd_is_held_until_the_guard_connection_ends(fabric):
    host = fabric.host()
    host.call(guard)
    host.call(leave)
    assert fabric.device.hosts() == []
    assert fabric.coordinator.nr_guards() == 1
    host.call(close_guard)
    fabric.wait_until(lambda: fabric.coordinator.nr_guards() == 0)


@pytest.mark.parametrize("kinds", ["", "n", "uu", "un", "uuuuu"])
def test_a_guard_without_exactly_one_userfaultfd_is_refused_and_leaks_nothing(fabric, kinds):
    host = fabric.process()
    registered = host.call(register)
    before = sorted(fabric.coordinator.open_files())
    with pytest.raises(PeerError):
        host.call(guard_with, *registered[2:3], registered.incarnation, kinds)
    fabric.wait_until(lambda: sorted(fabric.coordinator.open_files()) == before)
    host.call(guard)
    assert fabric.coordinator.nr_guards() == 1


def test_a_guard_of_another_process_or_incarnation_or_over_tcp_is_refused(fabric):
    host, other = fabric.process(), fabric.process()
    registered = host.call(register)
    with pytest.raises(Refused):
        other.call(guard_with, registered.host, registered.incarnation, "u")
    with pytest.raises(HostFenced):
        host.call(guard_with, registered.host, registered.incarnation + 1, "u")
    with pytest.raises(Refused):
        host.call(guard_with, registered.host, registered.incarnation, "", tcp=True)
    assert fabric.coordinator.nr_guards() == 0


def send_descriptor_with(raw: Raw, kind: MsgType) -> None:
    with UserFaultFD() as uffd, Client.of(raw.device) as client:
        client.request(kind, {}, descriptors=[uffd.fileno()])


def test_a_descriptor_that_comes_with_another_request_is_closed(fabric):
    fabric.process().call(send_descriptor_with, MsgType.STATS)
    fabric.wait_until(lambda: fabric.coordinator.nr_guards() == 0)


# ---------------------------------------------------------------- restarts


def test_hosts_live_through_a_restart_and_the_pool_is_built_again(fabric):
    host, other = fabric.host(), fabric.host()
    runs = host.call(grant, 100)
    others = other.call(grant, 50)
    host.call(publish, "svc", "here")
    host.call(guard)
    fabric.coordinator.kill()
    fabric.start()
    stats = fabric.stats()
    assert stats["pool"]["free"] == fabric.nr_frames - 150
    assert stats["names"] == [{"name": "svc", "endpoint": "here", "host": 1}]
    assert fabric.coordinator.nr_guards() == 0
    again = host.call(rejoin)
    assert (again.host, again.epoch) == (1, 2)
    host.call(guard)
    assert fabric.coordinator.nr_guards() == 1
    host.call(give_back, runs)
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - 50
    other.kill()  # without having rejoined
    fabric.host_died()
    assert fabric.owners(others) == {0}


def test_a_host_that_dies_while_there_is_no_coordinator_is_reclaimed_before_the_next_serves(fabric):
    host, other = fabric.host(), fabric.host()
    runs = host.call(grant, 100)
    fabric.coordinator.kill()
    host.kill()
    host.close()
    fabric.start()
    assert fabric.owners(runs) == {0}
    assert [entry["host"] for entry in fabric.device.hosts()] == [2]
    assert fabric.stats()["reclaims"][0]["why"] == "was gone when the coordinator started"
    assert other.call(rejoin).host == 2


def test_a_reclaim_that_a_killed_coordinator_left_unfinished_is_finished_by_the_next(fabric):
    host = fabric.host()
    runs = host.call(grant, 100)
    fabric.coordinator.kill()
    assert fabric.device.set_host_state(1, ACTIVE, LAYOUT["HOST_DEAD"])
    fabric.start()  # the process lives, but was declared dead
    assert fabric.owners(runs) == {0}
    with pytest.raises(HostFenced):
        host.call(rejoin)


def test_a_request_that_was_in_flight_when_the_host_hung_up_grants_nothing(fabric):
    host = fabric.host()
    fabric.coordinator.send(signal.SIGSTOP)
    try:
        host.call(ask_and_hang_up)
    finally:
        fabric.coordinator.send(signal.SIGCONT)
    stats = fabric.stats()
    assert stats["requests"]["GRANT"] == 1
    assert stats["pool"]["free"] == fabric.nr_frames
    with pytest.raises(OutOfFrames):
        host.call(rejoin_and_grant, fabric.nr_frames + 1)


def ask_and_hang_up(raw: Raw) -> None:
    raw.client.timeout = 0.05
    try:
        raw.client.grant(100)
    except TimeoutError:
        raw.client.close()


def rejoin_and_grant(raw: Raw, min_run: int):
    raw.rejoin()
    return raw.client.grant(0, min_run)


def test_the_coordinator_keeps_no_descriptor_of_hosts_that_come_and_go(fabric):
    before = len(fabric.coordinator.open_files())
    for _ in range(3):
        host = fabric.host()
        host.call(guard)
        host.call(leave)
        host.call(close_guard)
        host.call(hang_up)
        host.close()
    fabric.wait_until(lambda: len(fabric.coordinator.open_files()) == before)
    assert os.path.exists(fabric.socket)

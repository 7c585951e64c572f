"""A coordinator that is paused, replaced, and goes on: it changes nothing any more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.errors import CoordinatorLost
from tests.coordinators import Coordinated, coordinated, give_back, grant, publish, rejoin
from tests.fabrics import At, HostProcess, running
from tests.rpc_services import pause

PAGE = 4096


def replace(fabric: Coordinated) -> tuple[int, int]:
    """Stop the coordinator, and start one that replaces it. Returns both pids."""
    old = fabric.coordinator.process.pid
    os.kill(old, signal.SIGSTOP)
    fabric.start("--take-over")
    return old, fabric.coordinator.process.pid


def test_a_second_coordinator_that_is_not_told_to_take_over_is_refused(tmp_path: Path) -> None:
    with coordinated(tmp_path) as fabric:
        os.kill(fabric.coordinator.process.pid, signal.SIGSTOP)
        second = fabric.launch()
        assert second.wait_ready() == ""
        assert second.wait() == 1
        assert "--take-over" in second.log
        fabric.coordinators.pop()
        os.kill(fabric.coordinator.process.pid, signal.SIGCONT)


def test_a_coordinator_that_was_replaced_while_paused_stops_before_it_changes_anything(
    tmp_path: Path,
) -> None:
    with coordinated(tmp_path) as fabric:
        host, waiting = fabric.host(), fabric.host()
        granted = host.call(grant, 10)
        os.kill(fabric.coordinator.process.pid, signal.SIGSTOP)
        waiting.start(grant, 20)  # lies in the old one's socket when it goes on
        old = fabric.coordinator
        fabric.start("--take-over")
        host.call(rejoin)
        host.call(publish, "name", 1)
        before = bytes(tables(fabric))
        old.send(signal.SIGCONT)
        assert old.wait() == 1
        assert "has taken over" in old.log
        assert bytes(tables(fabric)) == before
        with pytest.raises(CoordinatorLost):
            waiting.result()
        assert fabric.owners(granted) == {1}
        host.call(give_back, granted)
        with fabric.client() as client:
            assert client.epoch == 2
            assert client.lookup("name")["endpoint"] == 1


def take_and_free(at: At, nr_pages: int) -> int:
    buffer = at.host.ralloc(nr_pages * PAGE)
    del buffer
    return at.host.stats()["free_frames"]


def test_a_request_that_waits_while_its_coordinator_is_replaced_is_not_refused(
    tmp_path: Path,
) -> None:
    with coordinated(tmp_path, "--recall-timeout", "10") as fabric:
        sitting, asking = HostProcess(fabric.name, {}), fabric.host()
        free = sitting.call(take_and_free, 10)
        assert free > 0
        asking.call(grant, fabric.nr_frames - free)
        go_on = pause(sitting.pid)  # so that it gives nothing back
        asking.start(grant, 10)
        old = fabric.coordinator
        old.logged("asked host")
        fabric.start("--take-over")
        with pytest.raises(CoordinatorLost):  # and not OutOfFrames: the successor may have some
            asking.result()
        assert old.wait() == 1
        go_on()
        sitting.leave()


def test_a_coordinator_that_is_replaced_while_it_waits_for_the_one_before_gives_way(
    tmp_path: Path,
) -> None:
    with coordinated(tmp_path) as fabric:
        host = fabric.host()
        first = fabric.coordinator
        first.send(signal.SIGSTOP)
        host.kill()
        # As if it had been stopped while it reclaimed this host: nobody gets the entry before it is gone.
        assert fabric.device.set_host_state(1, LAYOUT["HOST_ACTIVE"], LAYOUT["HOST_DEAD"])
        fabric.start("--take-over")
        second = fabric.coordinator
        assert fabric.device.host(1)["state"] == LAYOUT["HOST_DEAD"]
        fabric.start("--take-over")
        assert second.wait() == 1
        assert "does not end" not in second.log  # it waits no longer for the first one
        first.send(signal.SIGCONT)
        assert first.wait() == 1


def tables(fabric: Coordinated) -> bytes:
    """Return superblock, hosts, Refs, services and frame words as they are."""
    end = fabric.device.superblock["page_table_off"]
    return os.pread(fabric.device.fileno(), end, 0)


def test_a_host_that_ends_is_reclaimed_once_whoever_was_watching_it(tmp_path: Path) -> None:
    with coordinated(tmp_path) as fabric:
        host = fabric.host()
        host.call(grant, 10)
        old = fabric.coordinator
        old.send(signal.SIGSTOP)
        host.kill()
        fabric.start("--take-over")
        fabric.wait_until(lambda: not fabric.device.hosts())
        old.send(signal.SIGCONT)
        assert old.wait() == 1
        assert "died" not in old.log


def test_the_successor_gets_the_lock_when_the_one_it_replaced_is_gone(tmp_path: Path) -> None:
    with coordinated(tmp_path) as fabric:
        old = fabric.coordinator
        old.send(signal.SIGSTOP)
        fabric.start("--take-over")
        successor = fabric.coordinator
        old.kill()
        third = fabric.launch()
        assert third.wait_ready() == ""
        assert third.wait() == 1
        fabric.coordinators.pop()
        assert fabric.coordinator is successor


def churn(at: At, enough: str) -> int:
    rounds = 0
    while rounds < 50 or not Path(enough).exists():
        buffer = at.host.ralloc((1 + rounds % 40) * PAGE)
        memoryview(buffer)[::PAGE] = bytes([rounds % 251]) * (1 + rounds % 40)
        del buffer
        rounds += 1
    return rounds


def test_hosts_at_work_go_over_to_the_successor_of_a_paused_coordinator(tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    with running(size=8 << 20) as fabric:
        hosts = [fabric.host(low=1, high=8, batch=2, deadline=60) for _ in range(2)]
        for host in hosts:
            host.start(churn, str(enough))
        old = fabric.coordinator
        old.send_signal(signal.SIGSTOP)
        fabric.coordinator_args = ("--take-over",)
        fabric.start_coordinator()
        enough.touch()
        try:
            assert all(host.result() >= 50 for host in hosts)
        finally:
            old.send_signal(signal.SIGCONT)
            assert old.wait(30) == 1

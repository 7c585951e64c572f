"""Real hosts while their coordinator stops, is killed, and comes back."""

import os
import random
import signal
from pathlib import Path

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import ServiceTableFull
from tests.coordinators import Coordinated, Raw, RawHost, coordinated
from tests.fabrics import At, running
from tests.rpc_services import pause

PAGE = 4096


def churn(at: At, enough: str, seed: int) -> int:
    """Allocate and free in sizes that keep the coordinator busy, until a file appears. Returns how often."""
    rng = random.Random(seed)
    held = []
    rounds = 0
    while rounds < 100 or not Path(enough).exists():
        nr_pages = rng.randint(1, 40)
        buffer = at.host.ralloc(nr_pages * PAGE)
        memoryview(buffer)[::PAGE] = bytes([rounds % 251]) * nr_pages
        held.append((buffer, rounds % 251))
        if len(held) > 5:
            oldest, value = held.pop(0)
            assert set(memoryview(oldest)[::PAGE]) == {value}
            del oldest
        del buffer
        rounds += 1
    return rounds


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_hosts_that_need_frames_wait_for_the_next_coordinator_and_lose_none(tmp_path, how):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    enough = tmp_path / "enough"
    with running(size=8 << 20) as fabric:
        hosts = [fabric.host(low=1, high=8, batch=2, deadline=60) for _ in range(2)]
        for number, host in enumerate(hosts):
            host.start(churn, str(enough), seed + number)
        for _ in range(3):
            getattr(fabric.coordinator, how)()
            assert fabric.coordinator.wait(30) == (0 if how == "terminate" else -9)
            fabric.start_coordinator()
        enough.touch()
        assert all(host.result() >= 100 for host in hosts)
        with fabric.client() as client:
            assert client.epoch == 4


def allocate_all(at: At, nr_pages: int) -> bool:
    vars(at)["kept"] = at.host.ralloc(nr_pages * PAGE)
    return True


def test_a_host_that_dies_between_two_coordinators_leaves_its_frames_to_the_others(tmp_path):
    with running(size=8 << 20) as fabric:
        greedy, other = fabric.host(), fabric.host(deadline=60)
        assert greedy.call(allocate_all, 1500)
        fabric.coordinator.kill()
        fabric.coordinator.wait(30)
        greedy.kill()
        other.start(allocate_all, 1500)
        fabric.start_coordinator()
        assert other.result()


def attach_and_leave(raw: Raw) -> int:
    with dmrpc_cxl.attach(raw.fabric, deadline=60) as host:
        return len(host.array([1, 2, 3]))


def stop_between_register_and_guard(fabric: Coordinated) -> RawHost:
    """Return a process that attaches, stopped when it is a host and not guarded yet."""
    while True:
        host = fabric.process()
        host.start(attach_and_leave)
        fabric.wait_until(fabric.device.hosts)
        go_on = pause(host.pid)
        fabric.stats()  # whatever it had asked for before is answered
        if fabric.coordinator.nr_guards() == 0:
            return host
        go_on()  # it was faster
        assert host.result() == 3
        fabric.wait_until(lambda: not fabric.device.hosts() and not fabric.coordinator.nr_guards())


def test_a_host_whose_coordinator_dies_while_it_attaches_goes_over_to_the_next_one(tmp_path):
    with coordinated(tmp_path) as fabric:
        host = stop_between_register_and_guard(fabric)
        fabric.coordinator.kill()
        os.kill(host.pid, signal.SIGCONT)
        fabric.start()
        assert host.result() == 3


def publish(at: At, name: str, endpoint: object) -> None:
    at.host.publish(name, endpoint)


def test_services_outlive_the_coordinator_and_vanish_with_their_host(tmp_path):
    with running() as fabric:
        living, dying = fabric.host(), fabric.host()
        living.call(publish, "stays", {"long": "x" * 3000})
        living.call(publish, "changes", 1)
        living.call(publish, "changes", 2)
        dying.call(publish, "goes", 1)
        fabric.coordinator.kill()
        fabric.coordinator.wait(30)
        dying.kill()
        fabric.start_coordinator()
        with fabric.client() as client:
            assert client.lookup("stays")["endpoint"] == {"long": "x" * 3000}
            assert {found["name"]: found["endpoint"] for found in client.services("")} == {
                "stays": {"long": "x" * 3000},
                "changes": 2,
            }
            assert client.stats()["requests"].get("PUBLISH") is None  # nobody had to publish again
        living.call(publish, "goes", "mine now")


def test_a_full_service_table_is_refused_by_name_and_what_was_published_stays():
    with running(max_hosts=1) as fabric:
        host = fabric.host()
        published = host.call(publish_until_full)
        with fabric.client() as client:
            assert len(client.services("")) == published
        host.call(withdraw, "service-0")
        host.call(publish, "another", 1)


def publish_until_full(at: At) -> int:
    number = 0
    try:
        while True:
            at.host.publish(f"service-{number}", number)
            number += 1
    except ServiceTableFull:
        return number


def withdraw(at: At, name: str) -> None:
    at.host.withdraw(name)

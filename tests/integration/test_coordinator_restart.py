"""Real hosts while their coordinator stops, is killed, and comes back."""

import random
from pathlib import Path

import pytest

from dmrpc_cxl.errors import ServiceTableFull
from tests.fabrics import At, running

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

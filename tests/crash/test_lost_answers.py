"""The coordinator dies when it has done what it was asked for, and has not said so: what is repeated then counts once.

test_deaths.py has the same deaths, and the accounts afterwards; here stands what the one who asked has of it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from dmrpc_cxl.fabric import device as devices
from tests.crash.coordinator_acts import ENDPOINT, publish, services, withdraw
from tests.crash.host_acts import allocate, free_and_give_back, map_it, own_much, store_in_order
from tests.crash.keeper import PAGES, offer
from tests.crash.processes import Host
from tests.crash.stage import Stage

BATCH = 16  # frames that a host is granted at first, see stage.py
TRANSPORTS = pytest.mark.parametrize("transport", ["unix", "tcp"])


def owned(stage: Stage, host: Host) -> int:
    """Return how many frame words name a host, be the frames in use or free."""
    with devices.open(stage.name, writable=False) as device:
        return int(device.owned().get(host.id, 0))


def known_to_be_free(stage: Stage, host: Host) -> int:
    with devices.open(stage.name, writable=False) as device:
        return int(device.host(host.id)["nr_free"])


def answers_get_lost(
    stage: Stage, host: Host, label: str, n: int, ask: Callable[..., Any], *args: Any
) -> None:
    """Let a host ask, and the coordinator die at a label; the host still waits."""
    coordinator = stage.fabric.coordinator
    coordinator.arm(label, n)
    host.start(ask, *args)
    assert coordinator.wait() == -signal.SIGKILL


@TRANSPORTS
def test_frames_whose_grant_was_not_answered_are_found_and_not_granted_again(
    stage: Stage, transport: str
) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(transport=transport, deadline=30.0)
        answers_get_lost(stage, host, "grant_unanswered", 1, allocate)
        assert (owned(stage, host), known_to_be_free(stage, host)) == (BATCH, 0)
        stage.restart_coordinator()
        host.result()
        assert (owned(stage, host), known_to_be_free(stage, host)) == (BATCH, BATCH - 6)
        with stage.client() as client:
            assert client.stats()["totals"]["grants"] == 0  # since this coordinator started
        host.leave()


@TRANSPORTS
def test_of_a_grant_that_was_cut_short_all_frames_are_found_and_the_rest_is_asked_for(
    stage: Stage, transport: str
) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(transport=transport, deadline=30.0)
        answers_get_lost(stage, host, "transfer_worded", 5, allocate)
        assert (owned(stage, host), known_to_be_free(stage, host)) == (5, 0)
        stage.restart_coordinator()
        host.result()  # of 6 pages
        assert (owned(stage, host), known_to_be_free(stage, host)) == (5 + BATCH, 5 + BATCH - 6)
        host.leave()


def test_a_store_that_waits_for_a_frame_gets_one_that_was_granted_and_not_answered(
    stage: Stage,
) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(deadline=30.0)
        host.call(map_it, *stage.keeper.call(offer, ("shared",)))
        answers_get_lost(stage, host, "grant_unanswered", 1, store_in_order)
        stage.restart_coordinator()
        host.result()
        assert (owned(stage, host), known_to_be_free(stage, host)) == (BATCH, BATCH - PAGES)
        with stage.client() as client:
            assert client.stats()["totals"]["grants"] == 0
        host.leave()


@TRANSPORTS
def test_frames_whose_return_was_not_answered_are_counted_once(
    stage: Stage, transport: str
) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(high=8, batch=8, transport=transport, deadline=30.0)
        host.call(own_much)
        answers_get_lost(stage, host, "return_counted", 1, free_and_give_back)
        stage.restart_coordinator()
        host.result()
        with stage.client() as client:
            totals = client.stats()["totals"]
        assert totals["frames_returned"] == 0
        assert totals["frames_not_counted"] > 0  # repeated; the pool had them from the words
        host.leave()


@TRANSPORTS
@pytest.mark.parametrize(
    "label", ["host_entered", "host_active", "register_unanswered", "guard_kept"]
)
def test_a_host_that_was_admitted_and_not_answered_is_admitted_once(
    stage: Stage, label: str, transport: str
) -> None:
    with stage.deaths(1):
        stage.guarded()  # nobody else is about to be, or the coordinator would die of that
        coordinator = stage.fabric.coordinator
        coordinator.arm(label)
        host = stage.fabric.coming_host(transport=transport, deadline=30.0)
        assert coordinator.wait() == -signal.SIGKILL
        stage.restart_coordinator()
        host.attached()
        states = stage.fabric.host_states()
        assert sorted(entry["host"] for entry in states) == sorted([stage.keeper.id, host.id])
        host.call(allocate)
        host.leave()


OLD, NEW = "before", ENDPOINT
LEFT_BEHIND = [
    (None, "service_written", []),
    (None, "service_live", [NEW]),
    (None, "published", [NEW]),
    (OLD, "service_written", [OLD]),
    (OLD, "service_live", [OLD, NEW]),
    (OLD, "service_withdrawn", [NEW]),
    (OLD, "published", [NEW]),
]


@pytest.mark.parametrize(("before", "label", "left"), LEFT_BEHIND)
def test_a_service_is_published_once_whenever_the_coordinator_dies(
    stage: Stage, before: Any, label: str, left: list[Any]
) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(deadline=30.0)
        if before:
            host.call(publish, before)
        answers_get_lost(stage, host, label, 1, publish, ENDPOINT)
        with devices.open(stage.name, writable=False) as device:
            assert [json.loads(entry["endpoint"]) for entry in device.services()] == left
        stage.restart_coordinator()
        host.result()
        with devices.open(stage.name, writable=False) as device:
            assert len(device.services()) == 1
        assert services(stage) == {"name": ENDPOINT}
        host.leave()
        assert services(stage) == {}


@pytest.mark.parametrize("label", ["service_withdrawn", "withdrawn"])
def test_who_withdraws_a_service_is_told_that_it_is_withdrawn(stage: Stage, label: str) -> None:
    with stage.deaths(1):
        host = stage.fabric.host(deadline=30.0)
        host.call(publish, ENDPOINT)
        answers_get_lost(stage, host, label, 1, withdraw)
        stage.restart_coordinator()
        host.result()
        with pytest.raises(LookupError):
            host.call(withdraw)  # once more, and really
        host.leave()

"""Whatever runs out is said by name, to the one who asked for it, and nothing is lost."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import (
    CoordinatorRefused,
    NoHostSlot,
    OutOfFrames,
    OverQuota,
    SystemCallFailed,
)
from tests.coordinators import SECONDS, coordinated
from tests.fabrics import At, Fabric, HostProcess, running

PAGE = 4096
LOW = 64  # free frames that a host keeps ready, unless it wished for something else


def allocate(at: At, nr_pages: int) -> None:
    buffer = at.host.ralloc(nr_pages * PAGE)
    vars(at).setdefault("kept", []).append(buffer)


def free_all(at: At) -> None:
    at.kept.clear()


def give_away(at: At) -> bytes:
    return at.host.create_ref(at.kept.pop(), move=True).to_bytes()


def take_and_drop(at: At, wire: bytes) -> None:
    buffer = at.host.map_ref(wire)
    del buffer


# ---------------------------------------------------------------- frames


def test_a_host_over_its_frame_limit_is_told_so_and_the_others_are_not_affected() -> None:
    with running(coordinator=("--frame-limit", "100")) as fabric:
        host, other = fabric.host(), fabric.host()
        host.call(allocate, 90)
        with pytest.raises(OverQuota, match="100 frames at most"):
            host.call(allocate, 20)
        other.call(allocate, 90)
        host.call(free_all)
        host.call(allocate, 95)


def test_the_frame_limit_counts_what_a_host_held_before_the_coordinator_was_restarted() -> None:
    with running(coordinator=("--frame-limit", "100")) as fabric:
        host = fabric.host()
        host.call(allocate, 90)
        fabric.coordinator.kill()
        fabric.coordinator.wait(30)
        fabric.start_coordinator()
        with pytest.raises(OverQuota):
            host.call(allocate, 20)
        assert fabric.assert_sound()["in_use"] == 90


def test_frames_that_others_have_freed_do_not_count_against_the_limit_for_ever() -> None:
    with running(coordinator=("--frame-limit", "100")) as fabric:
        host, other = fabric.host(), fabric.host()
        for _ in range(5):
            host.call(allocate, 90)
            other.call(take_and_drop, host.call(give_away))


def sit_on_frames(fabric: Fabric, *hosts: HostProcess) -> None:
    """Let hosts have free frames that they do not need."""
    for host in hosts:
        host.call(allocate, 200)
        host.call(free_all)
    free = fabric.audit()["free"]
    assert all(free[host.id] > LOW for host in hosts), free


def allocate_singly(at: At, nr_pages: int) -> None:
    for _ in range(nr_pages):
        allocate(at, 1)


def recalls(fabric: Fabric) -> int:
    """Return how often hosts were asked for frames; nobody may have been refused any."""
    with fabric.client() as client:
        totals = client.stats()["totals"]
    assert totals["grants_refused"] == 0, totals
    return int(totals["recalls"])


def test_one_host_gets_every_frame_of_the_device_while_others_sit_on_free_ones() -> None:
    # Whoever waits for an answer that does not come is refused: after 50 s.
    with running(size=8 << 20, coordinator=("--recall-timeout", "50")) as fabric:
        sitting, short = [fabric.host() for _ in range(3)], fabric.host(deadline=60)
        sit_on_frames(fabric, *sitting)
        short.call(allocate_singly, 2048)
        assert recalls(fabric) >= 2 * len(
            sitting
        )  # for what is above the low watermark, for the rest
        assert fabric.assert_sound()["in_use"] == 2048


def store_to_a_hole(at: At) -> None:
    buffer = at.host.ralloc(PAGE, lazy=True)
    memoryview(buffer)[0] = 1
    at.kept.append(buffer)


def test_a_store_gets_a_frame_that_an_idle_host_keeps_ready() -> None:
    with running(size=8 << 20, coordinator=("--recall-timeout", "50")) as fabric:
        sitting, short = fabric.host(), fabric.host(deadline=60)
        sit_on_frames(fabric, sitting)
        short.call(allocate_singly, 2048 - LOW)
        assert fabric.audit()["free"] == {sitting.id: LOW}
        short.call(store_to_a_hole)
        assert recalls(fabric) > 0


def test_an_idle_host_keeps_its_low_watermark_as_long_as_others_have_more() -> None:
    with running(size=8 << 20, coordinator=("--recall-timeout", "50")) as fabric:
        modest, sitting, short = fabric.host(high=64, low=32), fabric.host(), fabric.host(batch=1)
        sit_on_frames(fabric, sitting)
        modest.call(allocate, 1)
        modest.call(free_all)
        free = fabric.audit()["free"]
        short.call(allocate_singly, 2048 - sum(free.values()) + free[sitting.id] - LOW)
        assert fabric.audit()["free"][modest.id] >= 32
        assert recalls(fabric) > 0


def test_a_fabric_that_has_no_more_frames_says_how_many_there_are() -> None:
    with running(size=4 << 20) as fabric:
        host = fabric.host(deadline=5)
        host.call(allocate, 900)
        with pytest.raises(OutOfFrames):
            host.call(allocate, 900)
        assert fabric.assert_sound()["in_use"] == 900


# ---------------------------------------------------------------- hosts and connections


def test_one_host_too_many_is_refused_by_name() -> None:
    with running(max_hosts=1) as fabric:
        fabric.host()
        with pytest.raises(NoHostSlot, match="all 1 host slots"):
            fabric.host()


def test_one_connection_too_many_is_told_so_and_the_host_that_is_there_goes_on(
    tmp_path: Path,
) -> None:
    with coordinated(tmp_path, "--max-connections", "2") as fabric:
        with fabric.client() as first, fabric.client():
            with pytest.raises(CoordinatorRefused, match="as many connections as it takes"):
                fabric.client()
            assert first.stats()["epoch"] == 1
        fabric.wait_until(lambda: len(fabric.coordinator.open_files()) > 0)


# ---------------------------------------------------------------- descriptors


def test_a_coordinator_without_descriptors_serves_whom_it_has_and_the_rest_when_there_are_some(
    tmp_path: Path,
) -> None:
    with coordinated(tmp_path) as fabric:
        pid = fabric.coordinator.process.pid
        with fabric.client() as first:
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(
                pid, resource.RLIMIT_NOFILE, (len(fabric.coordinator.open_files()), limits[1])
            )
            host = fabric.process()
            host.start(register_when_possible)
            fabric.coordinator.logged("cannot accept connections")
            assert first.stats()["epoch"] == 1
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            assert host.result() == 1


def register_when_possible(raw: object) -> int:
    return raw.register().host  # type: ignore[attr-defined, no-any-return]


def attach_without_descriptors(at: At) -> str:
    """Have no descriptor left, and attach once more; say what that gave."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        dmrpc_cxl.attach(vars(at)["fabric_name"])
    except (SystemCallFailed, OSError) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return "attached"


def remember(at: At, name: str) -> None:
    at.fabric_name = name


def test_a_process_without_descriptors_cannot_attach_again_and_keeps_the_host_it_has(
    fabric: Fabric,
) -> None:
    host = fabric.host()
    host.call(allocate, 10)
    host.call(remember, fabric.name)
    assert host.call(attach_without_descriptors) in ("SystemCallFailed", "OSError")
    host.call(allocate, 10)
    fabric.wait_until(lambda _: len(fabric.host_states()) == 1, SECONDS)

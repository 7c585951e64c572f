"""Watermarks: a host asks before it is short if it was told to, and gives back what it does not need."""

import time

from tests.fabrics import At, Fabric

PAGE = 4096


def allocate(at: At, pages: int) -> tuple[int, int]:
    at.kept = getattr(at, "kept", [])
    at.kept.append(at.host.ralloc(pages * PAGE, zero=False))
    stats = at.host.stats()
    return stats["free_frames"], stats["coordinator_round_trips"]


def free_all(at: At) -> None:
    at.kept.clear()


def wait_for_free(at: At, least: int, most: int) -> int:
    give_up = time.monotonic() + 30
    while not least <= (free := at.host.stats()["free_frames"]) <= most:
        assert time.monotonic() < give_up, f"{free} free frames, not {least} to {most}"
        time.sleep(0.001)
    return int(at.host.stats()["coordinator_round_trips"])


def test_a_host_with_a_low_watermark_asks_before_a_call_has_to_wait(fabric: Fabric) -> None:
    host = fabric.host(low=64, batch=128)
    free, trips = host.call(allocate, 1)
    # Two batches when the supplier has begun to ask ahead at the moment when the call asks.
    assert (free, trips) in ((127, 1), (255, 2))
    free, _ = host.call(allocate, 100)
    assert host.call(wait_for_free, 64, 1000) == 2  # nobody asked for a frame that was not there


def test_a_host_without_one_asks_when_it_is_short(fabric: Fabric) -> None:
    host = fabric.host(batch=128)
    host.call(allocate, 1)
    assert host.call(allocate, 100) == (27, 1)
    free, trips = host.call(allocate, 28)
    assert trips == 2
    assert free > 0


def test_frames_above_the_high_watermark_go_back_without_a_call(fabric: Fabric) -> None:
    host = fabric.host(high=200, batch=64)
    host.call(allocate, 2000)
    host.call(free_all)
    host.call(wait_for_free, 0, 1000)
    fabric.wait_until(lambda audit: audit["pool"] > audit["nr_frames"] - 1000)

"""The interface: what each counter and gauge of stats() counts, and that the steady state needs no kernel.

A row is a counter, something to do, and by how much the counter grows. A fault serves one page here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmrpc_cxl import Ref
from dmrpc_cxl._native import COUNTERS
from dmrpc_cxl.errors import OutOfFrames
from dmrpc_cxl.fabric import device
from tests.crews import Crew, Member, attach, in_host
from tests.fabrics import At, Fabric

GAUGES = {"free_frames", "reserved_frames", "mappings", "vm_pieces", "vm_piece_limit"}
PAGE = 4096

Act = Callable[[At], Any]
ROWS: list[tuple[str, str, int]] = []
ACTS: dict[str, Act] = {}


def row(**grows: int) -> Callable[[Act], Act]:
    """Say by how much counters grow by what the function returns; what it does itself is preparation."""

    def add(act: Act) -> Act:
        ACTS[act.__name__] = act
        ROWS.extend((act.__name__, counter, by) for counter, by in grows.items())
        return act

    return add


@row(ralloc_calls=1, bytes_zeroed=3 * PAGE, rfree_calls=0, syscalls=0, coordinator_round_trips=0)
def allocate_three_pages(at: At) -> Act:
    return lambda at: setattr(at, "buffer", at.host.ralloc(2 * PAGE + 1))


@row(ralloc_calls=1, bytes_zeroed=0)
def allocate_without_zeroing(at: At) -> Act:
    return lambda at: setattr(at, "buffer", at.host.ralloc(PAGE, zero=False))


@row(ralloc_calls=1, bytes_zeroed=0, frames_filled=0)
def allocate_lazily(at: At) -> Act:
    return lambda at: setattr(at, "buffer", at.host.ralloc(10 * PAGE, lazy=True))


@row(
    wp_faults=1,
    frames_filled=1,
    frames_allocated=1,
    bytes_zeroed=PAGE,
    frames_copied=0,
    handler_wakeups=1,
)
def write_to_a_hole(at: At) -> Act:
    at.buffer = at.host.ralloc(10 * PAGE, lazy=True)
    return lambda at: memoryview(at.buffer).__setitem__(3 * PAGE, 1)


@row(frames_allocated=10, frames_freed=0)
def allocate_ten(at: At) -> Act:
    return lambda at: setattr(at, "buffer", at.host.ralloc(10 * PAGE))


@row(frames_allocated=0, frames_freed=2)
def free_two(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    return lambda at: at.buffer.free()


@row(frames_freed=3)
def free_what_was_shared(at: At) -> Act:
    at.buffer = at.host.ralloc(3 * PAGE)
    at.host.create_ref(at.buffer).drop()
    return lambda at: at.buffer.free()


@row(rfree_calls=1, syscalls=0)
def free_it(at: At) -> Act:
    at.buffer = at.host.ralloc(PAGE)
    return lambda at: at.buffer.free()


@row(create_ref_calls=1, bytes_referenced=2 * PAGE - 1, protect_calls=1, move_ref_calls=0)
def share(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE - 1)
    return lambda at: setattr(at, "ref", at.host.create_ref(at.buffer))


@row(create_ref_calls=1, protect_calls=0, syscalls=0)
def share_again(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.ref = at.host.create_ref(at.buffer)
    return lambda at: setattr(at, "again", at.host.create_ref(at.buffer))


@row(move_ref_calls=1, create_ref_calls=0, bytes_referenced=5, protect_calls=0, syscalls=0)
def move_away(at: At) -> Act:
    at.buffer = at.host.ralloc(5)
    return lambda at: setattr(at, "ref", at.host.create_ref(at.buffer, move=True))


@row(map_ref_calls=1, map_exclusive=1, map_scattered=0, eager_copies=0, accept_calls=0, syscalls=0)
def map_exclusively(at: At) -> Act:
    at.ref = at.host.create_ref(at.host.ralloc(2 * PAGE), move=True)
    return lambda at: setattr(at, "buffer", at.host.map_ref(at.ref))


@row(map_ref_calls=1, map_exclusive=0, map_scattered=0, bytes_copied=0, syscalls=0)
def map_shared(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.ref = at.host.create_ref(at.buffer)
    return lambda at: setattr(at, "mine", at.host.map_ref(at.ref))


@row(map_views=1, map_ref_calls=0, map_exclusive=0, views_materialised=0, syscalls=0)
def view(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.ref = at.host.create_ref(at.buffer)
    return lambda at: setattr(at, "mine", at.host.view_ref(at.ref))


@row(map_views=1, map_ref_calls=0, map_exclusive=1, syscalls=0)
def view_exclusively(at: At) -> Act:
    at.ref = at.host.create_ref(at.host.ralloc(2 * PAGE), move=True)
    return lambda at: setattr(at, "mine", at.host.view_ref(at.ref))


@row(views_materialised=1, wp_faults=1, frames_copied=1, map_ref_calls=0)
def write_to_a_view(at: At) -> Act:
    view(at)(at)
    return lambda at: memoryview(at.mine).__setitem__(7, 1)


@row(map_ref_calls=1, map_scattered=1, map_exclusive=0)
def map_a_second_time(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.mine, at.ref = at.host.map_ref(at.host.create_ref(at.buffer)), at.host.create_ref(at.buffer)
    return lambda at: setattr(at, "again", at.host.map_ref(at.ref))


@row(map_ref_calls=1, eager_copies=1, bytes_copied=2 * PAGE, frames_copied=0, wp_faults=0)
def map_a_copy(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.ref = at.host.create_ref(at.buffer)
    return lambda at: setattr(at, "mine", at.host.map_ref(at.ref, copy=True))


@row(wp_faults=1, frames_copied=1, bytes_copied=PAGE, inplace_upgrades=0, remap_calls=1,
     missing_faults=0, handler_wakeups=1)  # fmt: skip
def write_to_a_shared_page(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.ref = at.host.create_ref(at.buffer)
    return lambda at: memoryview(at.buffer).__setitem__(7, 1)


@row(wp_faults=1, inplace_upgrades=1, unprotect_calls=1, frames_copied=0, bytes_copied=0,
     remap_calls=0)  # fmt: skip
def write_as_the_last_holder(at: At) -> Act:
    at.buffer = at.host.ralloc(2 * PAGE)
    at.host.create_ref(at.buffer).drop()
    return lambda at: memoryview(at.buffer).__setitem__(7, 1)


@row(rfree_calls=1, remap_calls=1)
def free_a_copied_page(at: At) -> Act:
    write_to_a_shared_page(at)(at)
    return lambda at: at.buffer.free()


@row(clone_calls=1, accept_calls=0, bytes_referenced=0)
def clone(at: At) -> Act:
    at.ref = at.host.create_ref(at.host.ralloc(5), move=True)
    return lambda at: setattr(at, "clone", at.ref.clone())


@row(drop_calls=1)
def drop_twice(at: At) -> Act:
    at.ref = at.host.create_ref(at.host.ralloc(5), move=True)
    return lambda at: (at.ref.drop(), at.ref.drop())


@row(drop_calls=1)
def forget_a_ref(at: At) -> Act:
    at.ref = at.host.create_ref(at.host.ralloc(5), move=True)
    return lambda at: delattr(at, "ref")


@row(accept_calls=1)
def accept_twice(at: At) -> Act:
    at.other = attach(at)
    at.sent = at.other.create_ref(at.other.ralloc(5), move=True)
    at.ref = Ref.from_bytes(at.sent.to_bytes(), at.host)
    return lambda at: (at.ref.accept(), at.ref.accept())


@pytest.mark.parametrize(("act", "counter", "by"), ROWS)
@in_host
def test_a_counter_counts_what_it_says(at: At, act: str, counter: str, by: int) -> None:
    ready = at.host.ralloc(64 * PAGE)  # so that frames are at hand, and need not be asked for
    ready.free()
    todo = ACTS[act](at)
    before = at.host.stats()
    todo(at)
    assert at.host.stats()[counter] - before[counter] == by


@pytest.mark.parametrize("crew", ["old-kernel"], indirect=True)
@in_host
def test_missing_faults_are_those_of_pages_without_frame(at: At) -> None:
    buffer = at.host.ralloc(10 * PAGE, lazy=True)
    before = at.host.stats()
    assert memoryview(buffer)[0] == 0
    after = at.host.stats()
    assert after["missing_faults"] == before["missing_faults"] + 1
    assert after["wp_faults"] == before["wp_faults"]
    assert after["handler_ns"] > before["handler_ns"]


def test_frames_granted_and_returned_add_up_to_what_a_host_has(fabric: Fabric) -> None:
    host = Member(fabric.host(high=64, batch=16))
    stats = host.stats()
    assert stats["frames_granted"] == stats["frames_returned"] == stats["free_frames"] == 0
    for size in (1, 100, 1000):
        host.ralloc("buffer", size * PAGE)
        stats = host.stats()
        assert stats["frames_granted"] - stats["frames_returned"] == stats["free_frames"] + size
        assert fabric.assert_sound()["free"].get(host.id, 0) == stats["free_frames"]
        host.rfree("buffer")
        stats = host.stats()
        assert stats["frames_granted"] - stats["frames_returned"] == stats["free_frames"]
        assert fabric.assert_sound()["free"][host.id] == stats["free_frames"]
    assert stats["frames_returned"] > 0
    assert 3 <= stats["coordinator_round_trips"] < 100


def test_frames_that_other_hosts_free_are_counted_on_their_way_home(fabric: Fabric) -> None:
    one, other = Member(fabric.host()), Member(fabric.host())
    for i in range(3):
        with other.counting() as by_other:
            other.call(map_write_free, one.call(put, 20))
        assert by_other["frames_sent_home"] == 20
        assert one.stats()["frames_came_home"] == 20 * i
        assert fabric.assert_sound()["free"][one.id] == 256
    granted = one.stats()["frames_granted"]
    one.ralloc("all", 256 * PAGE)  # those on their way too
    assert one.stats()["frames_came_home"] == 60
    assert one.stats()["frames_granted"] == granted == 256


def test_a_refusal_for_want_of_frames_is_counted(fabric: Fabric) -> None:
    host = Member(fabric.host())
    host.ralloc("most", 8000 * PAGE)
    with pytest.raises(OutOfFrames):
        host.ralloc("more", 8000 * PAGE)
    assert host.stats()["out_of_frames"] >= 1
    assert fabric.assert_sound()["in_use"] == 8000


@in_host
def test_gauges_say_how_it_is_now(at: At) -> None:
    stats = at.host.stats()
    assert set(stats) == {name for name, _ in COUNTERS} | GAUGES
    assert all(type(value) is int and value >= 0 for value in stats.values())
    buffer = at.host.ralloc(PAGE)
    assert at.host.stats()["mappings"] == stats["mappings"] + 1
    reserved = at.host.map_ref(at.host.create_ref(buffer), reserve=True)
    assert at.host.stats()["reserved_frames"] == 1
    before = at.host.stats()["vm_pieces"]
    memoryview(reserved)[0] = 1
    assert at.host.stats()["vm_pieces"] > before
    reserved.free()
    assert at.host.stats()["vm_pieces"] == before < stats["vm_piece_limit"]
    with device.open(at.host.fabric) as opened:
        shown = opened.host(at.host.id)
        assert shown["nr_free"] == at.host.stats()["free_frames"]
        assert shown["vm_pieces"] == at.host.stats()["vm_pieces"]


@in_host
def test_the_device_shows_every_hosts_counters_to_all(at: At) -> None:
    at.host.ralloc(1).free()
    with device.open(at.host.fabric, writable=False) as opened:
        shown = opened.host(at.host.id)["counters"]
    assert shown == {name: at.host.stats()[name] for name in shown}


def test_every_counter_is_tested_here() -> None:
    text = Path(__file__).read_text()
    names = {name for name, _ in COUNTERS} - {"spurious_" + "faults"}  # only races make them
    assert not {name for name in names if name not in text}


# ---------------------------------------------------------------- the steady state

COSTS = ("syscalls", "wp_faults", "missing_faults", "bytes_copied", "protect_calls",
         "unprotect_calls", "remap_calls", "coordinator_round_trips")  # fmt: skip


@pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)
def test_passing_exclusive_refs_to_and_fro_costs_no_system_call_no_fault_and_no_copy(
    crew: Crew,
) -> None:
    one, other = crew[:2]
    pages = 8
    for _ in range(3):  # warm up: frames at hand, pages writable
        other.call(map_write_free, one.call(put, pages))
        one.call(map_write_free, other.call(put, pages))
    with one.counting() as by_one, other.counting() as by_other:
        for _ in range(50):
            other.call(map_write_free, one.call(put, pages))
            one.call(map_write_free, other.call(put, pages))
    assert by_one["map_exclusive"] == by_other["map_exclusive"] == 50
    for added in (by_one, by_other):
        assert {name: added[name] for name in COSTS} == dict.fromkeys(COSTS, 0)


def put(at: At, pages: int) -> bytes:
    buffer = at.host.ralloc(pages * at.host.page_size, zero=False)
    buffer.numpy()[:] = 1
    return at.host.create_ref(buffer, move=True).to_bytes()


def map_write_free(at: At, wire: bytes) -> None:
    with at.host.map_ref(wire) as buffer:
        assert buffer.numpy().all()
        buffer.numpy()[:] = 2

"""The end of everything: frames, Ref entries, host slots, address space.

A call that cannot have what it needs says so, and nothing has changed: `same` compares every refcount and Ref of
the device before and after. A store cannot be refused: it waits, and after its deadline its
process ends, and only that.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import (
    AddressSpaceFull,
    BadSize,
    NoHostSlot,
    OutOfFrames,
    RefConsumed,
    RefTableFull,
)
from dmrpc_cxl.fabric import device as devices
from tests.fabrics import At, Fabric, HostProcess
from tests.scarcity import NR_FRAMES, PAGE, free, intact, ralloc, same, small
from tests.standing import take_all_frames, until

# -------------------------------------------------------------------- sent to hosts


def ralloc_bytes(at: At, size: int, lazy: bool) -> None:
    at.made = at.host.ralloc(size, lazy=lazy)


def share(at: At, pages: int, count: int = 1) -> list[bytes]:
    """Make `count` Refs of a buffer whose words are their own numbers."""
    at.buffer = at.host.ralloc(pages * PAGE)
    at.buffer.numpy("u8")[:] = np.arange(pages * PAGE // 8)
    at.refs = [at.host.create_ref(at.buffer) for _ in range(count)]
    return [ref.to_bytes() for ref in at.refs]


def map_ref(at: At, wire: bytes, **options: Any) -> None:
    at.mapped = at.host.map_ref(wire, **options)


def fill(at: At, name: str) -> bool:
    """Store to all of a buffer without the GIL; say whether it is all there."""
    buffer = getattr(at, name)
    ctypes.memset(buffer.address, 0x5A, len(buffer))
    return bytes(buffer) == b"\x5a" * len(buffer)


def drop_refs(at: At) -> None:
    while at.refs:
        at.refs.pop().drop()


def release(at: At, count: int) -> None:
    for _ in range(count):
        at.rest.pop().free()


def address_of(at: At, name: str) -> int:
    return int(getattr(at, name).address)


def stats(at: At) -> dict[str, int]:
    return dict(at.host.stats())


# -------------------------------------------------------------------- calls that need frames


@pytest.mark.parametrize("pages", [1, 3, NR_FRAMES, NR_FRAMES + 1, 1 << 40])
def test_ralloc_of_more_than_there_is_is_refused_and_changes_nothing(pages: int) -> None:
    with small({}, {}) as (fabric, (host, other)):
        other.call(ralloc, 30)
        host.call(take_all_frames, leave=2 if pages == 3 else 0)
        with same(fabric), pytest.raises(OutOfFrames):
            host.call(ralloc, pages)
        other.call(free, "made")
        if pages <= 3:
            host.call(ralloc, pages)  # from what the other host gave back


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("size", [2**64 - 1, 2**64 - PAGE, 2**63, 2**44])
def test_a_size_beyond_all_memory_is_refused_and_takes_no_frame(size: int, lazy: bool) -> None:
    with small({}) as (fabric, (host,)):
        with same(fabric), pytest.raises((OutOfFrames, AddressSpaceFull, BadSize)):
            host.call(ralloc_bytes, size, lazy)
        assert fabric.audit()["pool"] == NR_FRAMES, "frames were taken for nothing"


@pytest.mark.parametrize("options", [{"copy": True}, {"reserve": True}], ids=["copy", "reserve"])
def test_map_ref_that_cannot_have_its_frames_leaves_the_ref_good(
    options: dict[str, bool],
) -> None:
    with small({}, {}) as (fabric, (creator, mapper)):
        (wire,) = creator.call(share, 5)
        mapper.call(take_all_frames, leave=4)
        with same(fabric, taker=2), pytest.raises(OutOfFrames):
            mapper.call(map_ref, wire, **options)
        assert mapper.call(stats)["reserved_frames"] == 0
        mapper.call(release, 1)
        mapper.call(map_ref, wire, **options)
        assert mapper.call(intact, "mapped")
        assert creator.call(intact, "buffer")


def scatter(at: At, pages: int) -> None:
    """Have copy-on-write move every other page, so that a Ref of the buffer has a run for each."""
    at.buffer = at.host.ralloc(pages * PAGE)
    at.before = at.host.create_ref(at.buffer)
    words = at.buffer.numpy("u8").reshape(pages, -1)
    words[:] = np.arange(words.size).reshape(pages, -1)
    del words
    at.before.drop()
    at.before = at.host.create_ref(at.buffer)
    words = at.buffer.numpy("u8").reshape(pages, -1)
    words[::2] = words[::2].copy()
    del words
    at.before.drop()
    take_all_frames(at)


def create_ref(at: At, move: bool) -> None:
    at.ref = at.host.create_ref(at.buffer, move=move)


@pytest.mark.parametrize("move", [False, True], ids=["share", "move"])
def test_create_ref_that_cannot_have_its_overflow_frame_changes_nothing(move: bool) -> None:
    with small({}) as (fabric, (host,)):
        host.call(scatter, 24)
        with same(fabric), pytest.raises(OutOfFrames):
            host.call(create_ref, move)
        assert host.call(intact, "buffer")
        host.call(release, 1)
        host.call(create_ref, move)
        assert fabric.assert_sound()["overflow_frames"] == 1


def clone_one(at: At) -> None:
    at.second = at.ref.clone()


def test_clone_that_cannot_have_its_overflow_frame_changes_nothing() -> None:
    with small({}) as (fabric, (host,)):
        host.call(scatter, 24)
        host.call(release, 1)
        host.call(create_ref, False)
        with same(fabric), pytest.raises(OutOfFrames):
            host.call(clone_one)
        host.call(release, 1)
        host.call(clone_one)
        assert fabric.assert_sound()["overflow_frames"] == 2


# -------------------------------------------------------------------- stores that need frames


def test_a_store_that_gets_no_frame_in_time_ends_its_process_with_a_message_and_no_other(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with small({"deadline": 1.0}, {"deadline": 1.0}) as (fabric, (victim, other)):
        (wire,) = other.call(share, 4)
        victim.call(map_ref, wire)
        victim.call(take_all_frames)
        address = victim.call(address_of, "mapped")
        victim.start(fill, "mapped")
        assert victim.expect_death() == -signal.SIGABRT
        text = capfd.readouterr().err
        assert f"fabric {fabric.name}" in text
        assert int(re.search(r"0x([0-9a-f]+)", text)[1], 16) == address
        assert "free buffers" in text
        assert "drop Refs" in text
        assert "reserve=True" in text
        # The other one goes on, and gets what the dead one held.
        assert other.call(intact, "buffer")
        fabric.wait_until(lambda audit: audit["in_use"] == 4)
        other.call(ralloc, NR_FRAMES - 4)
        assert other.call(fill, "buffer")


def test_a_lazy_page_that_gets_no_frame_in_time_ends_its_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with small({"deadline": 0.5}) as (_, (host,)):
        host.call(ralloc, 2, lazy=True)
        host.call(take_all_frames)
        host.start(fill, "made")
        assert host.expect_death() == -signal.SIGABRT
        assert "no free frame" in capfd.readouterr().err


def test_a_deadline_is_met_though_another_mapping_has_frames_reserved() -> None:
    with small({"deadline": 0.5}, {}) as (_, (victim, other)):
        short, promised = other.call(share, 4, 2)
        victim.call(map_ref, promised, reserve=True)
        victim.call(keep, "mapped", "promised")
        victim.call(map_ref, short)
        victim.call(take_all_frames)
        assert victim.call(stats)["free_frames"] == 4
        victim.start(fill, "mapped")
        assert victim.expect_death() == -signal.SIGABRT


def keep(at: At, name: str, under: str) -> None:
    setattr(at, under, getattr(at, name))
    delattr(at, name)


def test_a_store_waits_for_frames_that_another_host_gives_back() -> None:
    with small({"deadline": 30.0}, {}) as (fabric, (host, other)):
        (wire,) = other.call(share, 4)
        host.call(map_ref, wire)
        other.call(take_all_frames)
        before = host.call(stats)["wp_faults"]
        host.start(fill, "mapped")
        until(lambda: faults(fabric, host) > before)
        assert not host.connection.poll(), "it did not wait"
        other.call(release, 10)  # onto the other host's free list, from where they are recalled
        assert host.result() is True
        assert other.call(intact, "buffer")


def faults(fabric: Fabric, host: HostProcess) -> int:
    with devices.open(fabric.name) as opened:
        return int(opened.host(host.id)["counters"]["wp_faults"])


def test_reserve_lets_every_page_be_stored_to_when_all_else_is_allocated() -> None:
    with small({"deadline": 2.0}, {"deadline": 2.0}) as (fabric, (host, other)):
        (wire,) = other.call(share, 8)
        host.call(map_ref, wire, reserve=True)
        assert host.call(stats)["reserved_frames"] == 8
        # Neither calls here or elsewhere nor a recall get what is promised.
        host.call(take_all_frames)
        with pytest.raises(OutOfFrames):
            other.call(ralloc, 1)
        assert host.call(fill, "mapped")
        assert host.call(stats)["reserved_frames"] == 0
        assert other.call(intact, "buffer")
        assert fabric.assert_sound()["pool"] == 0


def test_reserve_covers_holes_and_is_given_up_with_its_mapping() -> None:
    with small({"deadline": 2.0}, {"deadline": 2.0}) as (_, (host, other)):
        wire = other.call(share_holes, 8)
        host.call(map_ref, wire, reserve=True)
        host.call(take_all_frames, leave=2)
        other.call(take_all_frames)
        assert host.call(fill, "mapped")
        host.call(release, 1)
        host.call(free, "mapped")
        assert host.call(stats)["reserved_frames"] == 0
        host.call(ralloc, 9)


def share_holes(at: At, pages: int) -> bytes:
    """Share a buffer of which the odd pages were never stored to."""
    at.lazy = at.host.ralloc(pages * PAGE, lazy=True)
    at.lazy.numpy()[:: 2 * PAGE] = 1
    at.ref = at.host.create_ref(at.lazy)
    return at.ref.to_bytes()


# -------------------------------------------------------------------- Ref entries, hosts, address space


def clone_of(at: At, wire: bytes) -> None:
    at.taken = Ref.from_bytes(wire, at.host)
    at.taken.clone()


def test_a_full_ref_table_refuses_and_changes_nothing() -> None:
    with small({}, {}, max_refs=8) as (fabric, (host, other)):
        host.call(share, 2, 8)
        for move in (False, True):
            with same(fabric), pytest.raises(RefTableFull, match="max_refs"):
                host.call(create_ref, move)
        with same(fabric), pytest.raises(RefTableFull):
            host.call(clone_first)
        assert host.call(intact, "buffer")
        host.call(drop_refs)
        host.call(create_ref, False)
        assert other.call(share, 1, 7)


def clone_first(at: At) -> None:
    at.refs[0].clone()


def test_a_clone_refused_for_want_of_an_entry_leaves_a_ref_that_is_good_and_not_lost() -> None:
    with small({}, {}, max_refs=4) as (fabric, (host, other)):
        wire = host.call(share, 2, 4)[0]
        with pytest.raises(RefTableFull):
            other.call(clone_of, wire)
        host.call(drop_refs)
        assert fabric.audit()["live_refs"] <= 1
        other.call(forget_taken)
        assert fabric.audit()["live_refs"] == 0


def forget_taken(at: At) -> None:
    del at.taken


def test_one_host_too_many_is_told_so_and_a_slot_that_comes_free_is_used_again() -> None:
    with small({}, {}, max_hosts=2) as (fabric, (host, other)):
        (wire,) = host.call(share, 2)
        with same(fabric), pytest.raises(NoHostSlot, match="2"):
            fabric.host()
        other.leave()
        third = fabric.host()
        third.call(map_ref, wire)
        assert third.call(intact, "mapped")
        host.kill()
        until(lambda: len(fabric.host_states()) == 1)
        fourth = fabric.host()
        with pytest.raises(RefConsumed):
            fourth.call(map_ref, wire)


def fill_the_area(at: At, pages: int) -> int:
    """Make lazy buffers until there is no address space for one more; return how many pages they have."""
    at.lazy = []
    with contextlib.suppress(AddressSpaceFull):
        while True:
            at.lazy.append(at.host.ralloc(pages * PAGE, lazy=True))
    return len(at.lazy) * pages


def touch_and_free(at: At) -> None:
    at.lazy[0].numpy()[: 4 * PAGE] = 1
    at.lazy.clear()


def test_a_full_vma_area_refuses_lazy_memory_and_scattered_refs_and_nothing_else() -> None:
    with small({}) as (fabric, (host,)):
        with devices.open(fabric.name) as opened:
            area = opened.superblock["vma_pages"]
        assert area - NR_FRAMES < host.call(fill_the_area, NR_FRAMES) <= area
        host.call(fill_the_last, 1)
        with same(fabric), pytest.raises(AddressSpaceFull):
            host.call(ralloc, 1, lazy=True)
        (one, two) = host.call(share, 2, 2)
        host.call(map_ref, one)  # in the shared window
        host.call(keep, "mapped", "first")
        with same(fabric), pytest.raises(AddressSpaceFull):
            host.call(map_ref, two)  # the same frames again: needs the area
        host.call(touch_and_free)
        host.call(map_ref, two)
        assert host.call(intact, "mapped")


def fill_the_last(at: At, pages: int) -> None:
    with contextlib.suppress(AddressSpaceFull):
        while True:
            at.lazy.append(at.host.ralloc(pages * PAGE, lazy=True))

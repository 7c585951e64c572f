"""Free frames that lie scattered, or whose window pages are taken, are as good as others."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmrpc_cxl.errors import AddressSpaceFull, OutOfFrames
from tests.fabrics import At, running
from tests.scarcity import NR_FRAMES, PAGE, free, intact, ralloc, same, small
from tests.standing import take_all_frames


def fragment(at: At, keep_every: int) -> int:
    """Hold every n-th frame of the device, and free the others; return how many are free."""
    take_all_frames(at)
    at.rest.sort(key=lambda buffer: buffer.address)
    held = at.rest[::keep_every]
    freed = len(at.rest) - len(held)
    at.rest = held
    return freed


def allocate_fragments(at: At, pages: int, zero: bool) -> bool:
    """Take all fragments as one buffer, and fill it; say whether it was zeroed and holds what it should."""
    buffer = at.host.ralloc(pages * PAGE, zero=zero)
    if zero and any(bytes(buffer)):
        return False
    words = buffer.numpy("u8")
    words[:] = np.arange(len(words))
    del words
    at.made = buffer
    return intact(at, "made")


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("keep_every", [2, 3])
def test_scattered_free_frames_make_one_long_buffer(keep_every: int, zero: bool) -> None:
    with small({}) as (fabric, (host,)):
        freed = host.call(fragment, keep_every)
        assert host.call(allocate_fragments, freed, zero)
        assert fabric.assert_sound()["in_use"] == NR_FRAMES
        host.call(free, "made")
        with same(fabric), pytest.raises(OutOfFrames):
            host.call(ralloc, freed + 1)


def test_fragments_of_two_hosts_and_the_pool_make_one_long_buffer() -> None:
    with small({}, {}) as (fabric, (one, two)):
        one.call(ralloc_some, 20)
        two.call(ralloc_some, 20)
        one.call(release_every_other)
        two.call(release_every_other)
        assert one.call(allocate_fragments, NR_FRAMES - 20, True)
        assert fabric.assert_sound()["in_use"] == NR_FRAMES


def ralloc_some(at: At, count: int) -> None:
    at.rest = [at.host.ralloc(PAGE) for _ in range(count)]


def release_every_other(at: At) -> None:
    at.rest = at.rest[::2]


def fragment_a_large_device(at: At) -> None:
    take_all_frames(at)
    at.rest.sort(key=lambda buffer: buffer.address)
    at.rest = at.rest[::2]


def ralloc_and_look(at: At, pages: int) -> tuple[str, int]:
    """Try to allocate; return how it ended, and how many kernel mappings this process can still make."""
    try:
        at.made = at.host.ralloc(pages * PAGE, zero=False)
        end = "done"
    except (OutOfFrames, AddressSpaceFull) as error:
        end = type(error).__name__
    mappings: list[mmap.mmap] = []
    with contextlib.suppress(OSError):
        for _ in range(1000):  # of unlike protection, side by side: the kernel cannot merge them
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if len(mappings) % 2 else 0)
            mappings.append(mmap.mmap(-1, PAGE, prot=protection))
    return end, len(mappings)


def test_fragments_too_many_for_the_kernels_mappings_are_refused_before_those_are_used_up() -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 1 << 17:
        pytest.skip(f"vm.max_map_count is {limit}: no device small enough for a test uses that up")
    pages = limit + 1000
    with running(size=(2 * pages + 10) * PAGE, preallocate=False) as fabric:
        host = fabric.host()
        host.call(fragment_a_large_device)
        with same(fabric):
            end, left = host.call(ralloc_and_look, pages)
        assert end in ("AddressSpaceFull", "OutOfFrames")
        assert left == 1000, "the process has no kernel mappings left for anything else"
        assert host.call(ralloc_and_look, limit // 8) == ("done", 1000)


DISPLACED: list[Callable[[At], None]] = []


def displaced(function: Callable[[At], None]) -> Callable[[At], None]:
    DISPLACED.append(function)
    return function


@displaced
def one_page(at: At) -> None:
    at.host.ralloc(PAGE).free()


@displaced
def many_pages(at: At) -> None:
    at.host.ralloc(32 * PAGE).free()


@displaced
def an_eager_copy(at: At) -> None:
    at.host.map_ref(at.host.create_ref(memoryview(at.big)[:PAGE]), copy=True).free()


@displaced
def an_overflow_frame(at: At) -> None:
    ref = at.host.create_ref(at.big)
    at.big.numpy()[:: 2 * PAGE] = 2
    again = at.host.create_ref(at.big)
    again.clone().drop()
    ref.drop()


def displace(at: At) -> None:
    """Make half of all frames free, whose pages in the owned window are taken by a buffer that was copied away."""
    at.big = at.host.ralloc(NR_FRAMES // 2 * PAGE)
    ref = at.host.create_ref(at.big)
    at.big.numpy()[:] = 1
    ref.drop()


@pytest.mark.parametrize("use", DISPLACED, ids=lambda use: use.__name__)
def test_free_frames_whose_window_pages_are_taken_serve_all_the_same(
    use: Callable[[At], None],
) -> None:
    with small({}) as (fabric, (host,)):
        host.call(displace)
        assert fabric.assert_sound()["in_use"] == NR_FRAMES // 2
        host.call(use)

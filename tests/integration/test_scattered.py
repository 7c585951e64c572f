"""Copy-on-write all over a large mapping must not use up the kernel's mappings (vm.max_map_count).

Every page that copy-on-write moves is a kernel mapping of its own, until its neighbours move as
well. So the fault handler copies larger
and larger aligned chunks as mappings run short; what comes out must be right on every page all the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fabrics import At, Fabric, HostProcess, running
from tests.standing import until

PAGE = 4096
WORDS = PAGE // 8
GIB = 1 << 30
CHUNK = 4096  # pages looked at at a time


def limit() -> int:
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def original(first: int, pages: int) -> np.ndarray:
    """Return what pages hold before anybody stores to them: every word is different."""
    return (np.arange(first * WORDS, (first + pages) * WORDS, dtype="u8") * 3).reshape(pages, WORDS)


# -------------------------------------------------------------------- in the host processes


def make(at: At, pages: int) -> bytes:
    at.buffer = at.host.ralloc(pages * PAGE, zero=False)
    words = at.buffer.numpy("u8").reshape(pages, WORDS)
    for first in range(0, pages, CHUNK):
        part = words[first : first + CHUNK]
        part[:] = original(first, len(part))
    return at.host.create_ref(at.buffer).to_bytes()


def map_it(at: At, wire: bytes) -> None:
    at.buffer = at.host.map_ref(wire)


def make_holes(at: At, pages: int) -> None:
    at.buffer = at.host.ralloc(pages * PAGE, lazy=True)


def chosen(pages: int, count: int, seed: int) -> np.ndarray:
    """Return which pages are stored to, in which order."""
    return np.random.default_rng(seed).choice(pages, count, replace=False)


def store(at: At, count: int, seed: int, every: int) -> int:
    """Store a page's number into one word of each chosen page; return the most kernel mappings there were."""
    pages = len(at.buffer) // PAGE
    words = memoryview(at.buffer).cast("Q")
    most = 0
    for i, page in enumerate(chosen(pages, count, seed).tolist()):
        words[page * WORDS + page % WORDS] = ~page & 2**64 - 1
        if i % every == 0:
            most = max(most, nr_kernel_mappings())
    words.release()
    return max(most, nr_kernel_mappings())


def nr_kernel_mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def nr_device_mappings(at: At) -> int:
    return Path("/proc/self/maps").read_bytes().count(f"/dev/shm/{at.host.fabric}\n".encode())


def wrong_pages(at: At, count: int, seed: int, holes: bool = False) -> int:
    """Compare every word of the mapping with what must be there; return how many pages differ."""
    pages = len(at.buffer) // PAGE
    words = at.buffer.numpy("u8").reshape(pages, WORDS)
    stored = np.zeros(pages, bool)
    stored[chosen(pages, count, seed)] = True
    wrong = 0
    for first in range(0, pages, CHUNK):
        expected = original(first, min(CHUNK, pages - first))
        if holes:
            expected[:] = 0
        mine = np.flatnonzero(stored[first : first + CHUNK])
        expected[mine, (first + mine) % WORDS] = ~(first + mine).astype("u8")
        wrong += int((words[first : first + CHUNK] != expected).any(axis=1).sum())
    return wrong


def free(at: At) -> None:
    at.buffer.free()


def stats(at: At) -> dict[str, int]:
    return dict(at.host.stats())


# -------------------------------------------------------------------- tests


def assert_scattered(
    fabric: Fabric, prepare: Callable[[], HostProcess], pages: int, count: int, holes: bool
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    storing = prepare()
    few = storing.call(nr_device_mappings)
    most = storing.call(store, count, seed, every=1000)
    found = storing.call(stats)
    print(f"{most} kernel mappings of {limit()}, {found['wp_faults']} faults,")
    print(f"{found['frames_copied']} frames copied, {found['frames_filled']} filled")
    assert most < limit() / 2
    assert storing.call(wrong_pages, count, seed, holes) == 0
    # Every store moved its page, or found it moved with a neighbour.
    assert found["frames_copied"] + found["frames_filled"] >= count
    shown = storing.call(nr_device_mappings)
    assert found["vm_pieces"] >= shown, "the layer counts fewer kernel mappings than there are"
    assert holes or found["vm_pieces"] == shown, (
        "holes, which are not the device's, are counted too"
    )
    fabric.assert_sound()
    storing.call(free)
    assert storing.call(nr_device_mappings) == few, "mappings are left after the buffer was freed"


def test_scattered_copy_on_write_of_a_gigabyte_stays_below_half_of_the_kernels_mappings() -> None:
    """100,000 random pages of 262,144. The device is sparse: 2.1 GiB of it are really used."""
    pages, count = GIB // PAGE, 100_000
    with running(size=2600 << 20, preallocate=False) as fabric:
        creator, mapper = fabric.host(), fabric.host()

        def prepare() -> HostProcess:
            mapper.call(map_it, creator.call(make, pages))
            return mapper

        assert_scattered(fabric, prepare, pages, count, holes=False)
        assert creator.call(wrong_pages, 0, 0) == 0, "the other host's view has changed"
        creator.call(free)
        until(lambda: fabric.audit()["in_use"] == 0)


def test_scattered_first_stores_to_lazy_memory_stay_below_half_of_the_kernels_mappings() -> None:
    pages, count = GIB // 4 // PAGE, 30_000
    with running(size=300 << 20, preallocate=False) as fabric:
        host = fabric.host()

        def prepare() -> HostProcess:
            host.call(make_holes, pages)
            return host

        assert_scattered(fabric, prepare, pages, count, holes=True)


def alternate(at: At, wires: list[bytes]) -> int:
    """Map one Ref after the other and store to every other page of each: the worst there is; return the mappings."""
    at.buffers = [at.host.map_ref(wire) for wire in wires]
    for buffer in at.buffers:
        words = memoryview(buffer).cast("Q")
        for page in range(0, len(buffer) // PAGE, 2):
            words[page * WORDS] = 1
        words.release()
    return nr_kernel_mappings()


def refs(at: At, pages: int, count: int) -> list[bytes]:
    made = []
    at.kept = []
    for _ in range(count):
        at.kept.append(at.host.ralloc(pages * PAGE))
        made.append(at.host.create_ref(at.kept[-1]).to_bytes())
    return made


@pytest.mark.slow
def test_every_other_page_of_many_mappings_stays_below_half_of_the_kernels_mappings() -> None:
    with running(size=2600 << 20, preallocate=False) as fabric:
        creator, mapper = fabric.host(), fabric.host(copy_around=1)
        wires = creator.call(refs, 2048, 120)
        assert mapper.call(alternate, wires) < limit() / 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [10_000, 50_000, 200_000, 262_144])
def test_scattered_copy_on_write_of_any_density_stays_below_half_of_the_kernels_mappings(
    count: int,
) -> None:
    pages = GIB // PAGE
    with running(size=2600 << 20, preallocate=False) as fabric:
        creator, mapper = fabric.host(), fabric.host(copy_around=1)

        def prepare() -> HostProcess:
            mapper.call(map_it, creator.call(make, pages))
            return mapper

        assert_scattered(fabric, prepare, pages, count, holes=False)
        assert creator.call(wrong_pages, 0, 0) == 0

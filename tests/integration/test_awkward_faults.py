"""Faults where they hurt: under the GIL, in ufuncs and system calls, in imports, collectors and
signal handlers; many at once;
and while the handler waits for frames.

What a store has to do is the same everywhere: return, change what its own host sees, and nothing
of what the other host sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.fabric import device as devices
from tests.fabrics import At, Fabric, HostProcess, running
from tests.standing import Standing, take_all_frames, until, wait_for_fault
from tests.stores import MARK, STORES

PAGE = 4096
PAGES = 48
SIZE = PAGES * PAGE
# What is stored to: not at page boundaries, so that both ends show whether anything else changed.
FROM, TO = 3 * PAGE + 1000, SIZE - 2 * PAGE - 77
MANY_SIGNALS = 5000  # more than any list of waiting threads could hold
SLOW = 30.0  # deadline of hosts whose coordinator is stopped for a while, s

standing = Standing({}, {}, size=8 << 20)


@pytest.fixture(scope="module", autouse=True)
def _stand() -> Any:
    yield
    standing.close()


@pytest.fixture
def pair() -> Any:
    """Two hosts: one whose stores are watched, and the other that shares its pages."""
    with standing.use() as (_, hosts):
        yield hosts


def pattern(pages: int = PAGES) -> np.ndarray:
    """Return bytes that differ from page to page and are nowhere MARK."""
    return (np.arange(pages * PAGE) // 64 % 150).astype("u1")


def make(at: At, pages: int = PAGES) -> bytes:
    at.buffer = at.host.ralloc(pages * PAGE)
    at.buffer.numpy()[:] = pattern(pages)
    return at.host.create_ref(at.buffer).to_bytes()


def map_it(at: At, wire: bytes) -> None:
    at.buffer = at.host.map_ref(wire)


def make_holes(at: At) -> None:
    at.buffer = at.host.ralloc(SIZE, lazy=True)


def store(at: At, way: Callable[[memoryview], None]) -> None:
    way(memoryview(at.buffer)[FROM:TO])


def contents(at: At) -> bytes:
    return bytes(at.buffer)


def faults(at: At) -> int:
    stats = at.host.stats()
    return int(stats["wp_faults"] + stats["missing_faults"])


@pytest.mark.parametrize("kind", ["mapper", "creator", "holes"])
@pytest.mark.parametrize("way", STORES, ids=lambda way: way.__name__)
def test_a_store_works_wherever_it_is_made_and_only_its_own_host_sees_it(
    pair: list[HostProcess], way: Callable[[memoryview], None], kind: str
) -> None:
    storing, other = pair
    before = np.zeros(SIZE, "u1") if kind == "holes" else pattern()
    if kind == "holes":
        storing.call(make_holes)
    elif kind == "mapper":
        storing.call(map_it, other.call(make))
    else:
        other.call(map_it, storing.call(make))
    nr_faults = storing.call(faults)
    storing.call(store, way)
    assert storing.call(faults) > nr_faults, "nothing faulted: nothing was tested"
    expected = before.copy()
    expected[FROM:TO] = MARK
    assert storing.call(contents) == expected.tobytes()
    if kind != "holes":
        assert other.call(contents) == before.tobytes()


# -------------------------------------------------------------------- many threads


def store_in_threads(at: At, same: bool, seed: int) -> bool:
    """Let 8 threads store at once, to pages of their own or all to the same ones; say whether all is there."""
    order = np.random.default_rng(seed).permutation(PAGES).tolist()
    barrier = threading.Barrier(8)
    start = at.buffer.address
    expected = np.frombuffer(bytes(at.buffer), "u1").reshape(PAGES, 8, PAGE // 8).copy()

    def one(i: int) -> None:
        barrier.wait()
        for page in order if same else order[i::8]:
            # memset runs without the GIL: the others come to their faults while this one sleeps
            ctypes.memset(start + page * PAGE + i * PAGE // 8, 200 + i, PAGE // 8)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        expected[order if same else order[i::8], i] = 200 + i
    return bytes(at.buffer) == expected.tobytes()


@pytest.mark.parametrize("same", [True, False], ids=["the same pages", "pages of their own"])
def test_eight_threads_that_fault_at_once_all_get_on(pair: list[HostProcess], same: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    storing, other = pair
    for turn in range(20):
        storing.call(map_it, other.call(make))
        assert storing.call(store_in_threads, same, seed + turn)
        assert other.call(contents) == pattern().tobytes()


# -------------------------------------------------------------------- no free frame, and a slow coordinator


@contextlib.contextmanager
def small(nr_frames: int = 64, **options: Any) -> Iterator[tuple[Fabric, HostProcess]]:
    """A host on a small device that gets frames one at a time."""
    args = ("--batch", "1", "--batch-max", "1", "--low", "0", "--log-level", "warning")
    with running(size=nr_frames * PAGE, coordinator=args) as fabric:
        options = {"copy_around": 1, "deadline": SLOW, "batch": 1, **options}
        yield fabric, fabric.host(**options)


def use_up_free_frames(at: At) -> None:
    """Leave no free frame at the host, while the pool has plenty."""
    at.rest = []
    while at.host.stats()["free_frames"]:
        at.rest.append(at.host.ralloc(PAGE))


def counter(fabric: Fabric, host: HostProcess, name: str) -> int:
    with devices.open(fabric.name) as opened:
        return int(opened.host(host.id)["counters"][name])


@contextlib.contextmanager
def stopped(fabric: Fabric) -> Iterator[None]:
    """Keep the coordinator from running for a while."""
    fabric.coordinator.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        fabric.coordinator.send_signal(signal.SIGCONT)


def store_under_signals(at: At, way: Callable[[memoryview], None]) -> int:
    """Store while a timer interrupts this thread all the time; return how many signals were handled."""
    hits: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    try:
        store(at, way)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return len(hits)


WAYS = [way for way in STORES if way.__name__ in ("by_slice", "by_ufunc", "by_recv_into")]


@pytest.mark.parametrize("signals", [False, True], ids=["quiet", "interrupted"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_fault_without_a_free_frame_waits_for_a_slow_coordinator(
    way: Callable[[memoryview], None], signals: bool
) -> None:
    with small(160) as (fabric, host):
        other = fabric.host()
        host.call(map_it, other.call(make))
        host.call(use_up_free_frames)
        before = counter(fabric, host, "wp_faults")
        with stopped(fabric):
            host.start(store_under_signals if signals else store, way)
            until(lambda: counter(fabric, host, "wp_faults") > before)
            if signals:  # each one interrupts the fault, which is then taken again
                until(lambda: counter(fabric, host, "wp_faults") > before + MANY_SIGNALS)
            assert not host.connection.poll(), "it did not wait"
        host.result()
        expected = pattern()
        expected[FROM:TO] = MARK
        assert host.call(contents) == expected.tobytes()
        assert other.call(contents) == pattern().tobytes()


def start_store(address: int, length: int = 8) -> threading.Thread:
    """Store in a thread, without the GIL; return when it sleeps in its fault."""
    thread = threading.Thread(target=ctypes.memset, args=(address, MARK, length), daemon=True)
    thread.start()
    assert thread.native_id is not None
    wait_for_fault(thread.native_id)
    return thread


def make_for_the_busy_handler(at: At) -> None:
    host = at.host
    at.short, at.kept = host.ralloc(PAGE), host.ralloc(PAGE)
    at.ref = host.create_ref(at.short)  # a store to `short` needs a frame
    at.kept_ref = host.create_ref(at.kept)
    at.sole = host.ralloc(PAGE)  # protected, and nobody else's: a store needs none
    host.create_ref(at.sole).drop()
    at.plain = host.ralloc(4 * PAGE)
    at.promised = host.map_ref(at.kept_ref.clone(), reserve=True)  # has a frame set aside
    use_up_free_frames_but_reserved(at)


def use_up_free_frames_but_reserved(at: At) -> None:
    at.rest = []
    while at.host.stats()["free_frames"] > at.host.stats()["reserved_frames"]:
        at.rest.append(at.host.ralloc(PAGE))


def plain_stores(at: At) -> None:
    at.plain.numpy()[:] = 1


def loads_of_shared_pages(at: At) -> None:
    assert bytes(at.kept) == bytes(PAGE)


def a_store_that_makes_its_page_writable(at: At) -> None:
    at.sole.numpy()[:8] = 1


def a_store_with_a_frame_reserved(at: At) -> None:
    at.promised.numpy()[:8] = 1


def calls_that_need_no_frame(at: At) -> None:
    ref = at.host.create_ref(at.plain)
    at.host.map_ref(ref.clone()).free()
    ref.drop()


def do_while_waiting(at: At, what: Callable[[At], None]) -> bool:
    """Do something while the handler waits for a frame for a thread; say whether that thread still waited after it."""
    at.waiting = start_store(at.short.address)
    doing = threading.Thread(target=what, args=(at,), daemon=True)
    doing.start()
    doing.join(SLOW / 3)  # the handler gives up only after SLOW
    assert not doing.is_alive(), f"{what.__name__} waits for a frame that it does not need"
    return bool(at.waiting.is_alive())


def end_waiting(at: At) -> bool:
    at.waiting.join()
    return bytes(at.short)[:8] == bytes([MARK] * 8)


@pytest.mark.parametrize(
    "what",
    [
        plain_stores,
        loads_of_shared_pages,
        a_store_that_makes_its_page_writable,
        a_store_with_a_frame_reserved,
        calls_that_need_no_frame,
    ],
    ids=lambda what: what.__name__,
)
def test_a_handler_that_waits_for_a_frame_does_not_hold_up_who_needs_none(
    what: Callable[[At], None],
) -> None:
    with small() as (fabric, host):
        host.call(make_for_the_busy_handler)
        with stopped(fabric):
            assert host.call(do_while_waiting, what), "the thread did not wait: nothing was tested"
        assert host.call(end_waiting)


def free_while_waiting(at: At) -> bool:
    waiting = start_store(at.short.address)
    for buffer in [*at.rest, at.plain]:
        buffer.free()
    at.rest.clear()
    waiting.join()
    return bytes(at.short)[:8] == bytes([MARK] * 8)


def test_a_frame_freed_in_the_process_serves_a_fault_though_the_coordinator_is_silent() -> None:
    with small(deadline=3.0) as (fabric, host):
        host.call(make_for_the_busy_handler)
        with stopped(fabric):
            assert host.call(free_while_waiting)


def free_what_was_served(at: At) -> None:
    """Have events of two threads on page `a` read together with one on page `b`, for which there is no frame."""
    host = at.host
    first, a, b = (host.ralloc(PAGE) for _ in range(3))
    refs = [host.create_ref(buffer) for buffer in (first, a, b)]
    take_all_frames(at)
    one = start_store(first.address)  # the handler waits with this event alone
    two, three, four = start_store(a.address), start_store(b.address), start_store(a.address)
    at.rest.pop().free()  # for `first`
    at.rest.pop().free()  # for `a`
    for thread in (one, two, four):
        thread.join()
    a.free()  # its threads are done. The frame of its copy serves `b`.
    three.join()
    at.rest.clear()
    del first, b, refs


def test_a_buffer_may_be_freed_while_an_event_of_a_served_fault_is_still_unread() -> None:
    with small() as (_, host):
        host.call(free_what_was_served)
        assert host.call(contents_of_ralloc) == bytes(PAGE)


def contents_of_ralloc(at: At) -> bytes:
    return bytes(at.host.ralloc(PAGE))


class Worker:
    """A thread that stores where it is told to, and lives on."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[int] = queue.Queue()
        self.done: queue.Queue[None] = queue.Queue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while True:
            ctypes.memset(self.jobs.get(), MARK, 8)
            self.done.put(None)


def hire(at: At) -> None:
    at.worker = Worker()


def run_short(at: At) -> int:
    """Share a page, and leave no frame for a store to it; return its address."""
    at.page = at.host.ralloc(PAGE)
    at.ref = at.host.create_ref(at.page)
    at.rest = [at.host.ralloc(PAGE)]
    use_up_free_frames(at)
    return int(at.page.address)


def supplier_has_asked() -> bool:
    """Tell whether the supplier thread waits for the coordinator's answer: in poll(), for one descriptor."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "dmrpc-supply":
            words = (task / "syscall").read_text().split()
            return len(words) > 2 and int(words[0]) >= 0 and words[2] == "0x1"
    return False


def be_served_by_another(at: At) -> None:
    """Have a worker wait for a frame, another thread served for the same page at once, and the buffer freed."""
    at.worker.jobs.put(at.page.address)
    wait_for_fault(at.worker.thread.native_id)
    until(supplier_has_asked)  # it would not ask any more, once there is a free frame
    at.rest.pop().free()
    ctypes.memset(at.page.address + 8, MARK, 8)
    at.worker.done.get()
    at.page.free()
    at.ref.drop()


def test_a_thread_whose_fault_others_serve_again_and_again_is_not_taken_for_a_stray_one() -> None:
    with small() as (fabric, host):
        host.call(hire)
        places = []
        for _ in range(3):
            places.append(host.call(run_short))
            asked = counter(fabric, host, "coordinator_round_trips")
            with stopped(fabric):
                host.call(be_served_by_another)
            # The frame that was asked for comes now, and the list of waiting faults is looked at.
            until(lambda asked=asked: counter(fabric, host, "coordinator_round_trips") > asked)
        assert len(set(places)) == 1, "not the same address: nothing was tested"


def test_the_tests_of_waiting_can_tell_a_thread_that_sleeps_in_a_fault() -> None:
    """Whatever `wait_for_fault` does: a thread that sleeps elsewhere is not taken for one in a fault."""
    lock = threading.Lock()
    with lock:
        thread = threading.Thread(target=lock.acquire, daemon=True)
        thread.start()
        syscall = Path(f"/proc/self/task/{thread.native_id}/syscall")
        text = until(lambda: (t := syscall.read_text()).strip() != "running" and t)
        assert not text.startswith("-1 ")
        assert os.path.exists(f"/proc/self/task/{thread.native_id}")
    thread.join()

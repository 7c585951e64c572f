"""The interface from many threads at once.

Every thread works on buffers of its own and on those that the others share; what it reads must
always be what one of them wrote
as a whole. Seeds are printed.
"""

import gc
import queue
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadAddress, BufferInUse, HostClosed, RefConsumed
from tests.crews import Crew, attach, in_host
from tests.fabrics import At

THREADS = 8


@pytest.fixture
def seed() -> int:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return seed


def in_threads(functions: list[Callable[[], Any]]) -> None:
    """Run functions at the same time; raise what the first one raises. Threads change often."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=[function]) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


class Worker:
    """Does everything there is, at random, and hands Refs to the other workers."""

    def __init__(self, host: Any, number: int, seed: int, refs: "queue.SimpleQueue[Any]") -> None:
        self.host, self.number, self.refs = host, number, refs
        self.random = random.Random(f"{seed}-{number}")
        self.kept: list[tuple[Any, int]] = []  # buffers, and the byte that fills each
        self.done = 0

    def fill(self, buffer: Any) -> None:
        value = self.random.randrange(1, 256)
        memoryview(buffer)[:] = bytes([value]) * len(buffer)
        self.kept.append((buffer, value))

    def check(self, buffer: Any, value: int) -> None:
        content = np.frombuffer(buffer, "u1")
        assert (content == value).all(), f"{set(content.tolist())} instead of {value}"

    def allocate(self) -> None:
        size = self.random.choice([1, 100, 4096, 5000, 40_000])
        self.fill(self.host.ralloc(size, lazy=self.random.random() < 0.3))

    def make_array(self) -> None:
        array = self.host.array(np.full(self.random.randrange(1, 9000), 7, "u1"))
        ref = self.host.create_ref(array)
        array[:] = 8
        self.refs.put((ref, 7))

    def share(self) -> None:
        if self.kept:
            buffer, value = self.random.choice(self.kept)
            self.refs.put((self.host.create_ref(buffer), value))

    def move(self) -> None:
        if self.kept:
            buffer, value = self.kept.pop(self.random.randrange(len(self.kept)))
            self.refs.put((self.host.create_ref(buffer, move=True), value))

    def receive(self) -> None:
        try:
            ref, value = self.refs.get_nowait()
        except queue.Empty:
            return
        choice = self.random.random()
        if choice < 0.2:
            self.refs.put((ref.clone(), value))
        elif choice < 0.4:
            ref = Ref.from_bytes(ref.to_bytes(), self.host)
        if choice < 0.1:
            assert ref.drop() is True
            return
        buffer = self.host.map_ref(
            ref, copy=self.random.random() < 0.2, reserve=self.random.random() < 0.2
        )
        self.check(buffer, value)
        if self.random.random() < 0.7:
            self.fill(buffer)
        else:
            self.kept.append((buffer, value))

    def rewrite(self) -> None:
        if self.kept:
            buffer, value = self.kept.pop(self.random.randrange(len(self.kept)))
            self.check(buffer, value)
            self.fill(buffer)

    def free(self) -> None:
        if self.kept:
            buffer, value = self.kept.pop(self.random.randrange(len(self.kept)))
            self.check(buffer, value)
            if self.random.random() < 0.5:
                buffer.free()

    def look(self) -> None:
        stats = self.host.stats()
        assert stats["mappings"] >= len(self.kept)
        assert all(self.host.contains(buffer) for buffer, _ in self.kept)

    def work(self, steps: int) -> None:
        acts = [self.allocate, self.make_array, self.share, self.share, self.move, self.receive,
                self.receive, self.receive, self.rewrite, self.free, self.free, self.look]  # fmt: skip
        for _ in range(steps):
            self.random.choice(acts)()
            while len(self.kept) > 20:
                self.free()
            self.done += 1
        for buffer, value in self.kept:
            self.check(buffer, value)


@pytest.mark.parametrize("crew", ["4K", "64K", "old-kernel"], indirect=True)
@in_host
def test_eight_threads_doing_everything_on_one_host(at: At, seed: int) -> None:
    refs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    workers = [Worker(at.host, number, seed, refs) for number in range(THREADS)]
    in_threads([lambda worker=worker: worker.work(250) for worker in workers])
    assert all(worker.done == 250 for worker in workers)
    while not refs.empty():
        refs.get()[0].drop()


@in_host
def test_threads_on_hosts_of_their_own_pass_refs_around(at: At, seed: int) -> None:
    refs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    hosts = [at.host, attach(at), attach(at)]
    workers = [Worker(hosts[number % 3], number, seed, refs) for number in range(6)]
    in_threads([lambda worker=worker: worker.work(250) for worker in workers])
    while not refs.empty():
        refs.get()[0].drop()
    workers.clear()
    gc.collect()
    for host in hosts[1:]:
        host.detach()


def test_threads_of_two_processes_pass_refs_around(crew: Crew, seed: int) -> None:
    one, other = crew[:2]
    for round_ in range(5):
        batch = one.call(make_batch, 40)
        other.start(use_batch_in_threads, batch, seed + round_)
        back = one.call(make_batch, 40)
        assert other.result() == 40 * THREADS
        assert one.call(use_batch_in_threads, back, seed + round_) == 40 * THREADS


def make_batch(at: At, count: int) -> list[bytes]:
    array = at.host.array(np.full(20_000, 3, "u1"))
    return [at.host.create_ref(array).to_bytes() for _ in range(count)]


def use_batch_in_threads(at: At, batch: list[bytes], seed: int) -> int:
    """Let every thread clone and write each Ref, all in another order; the last one uses it up."""
    seen: list[int] = []

    def use(number: int) -> None:
        order = random.Random(f"{seed}-{number}").sample(refs, len(refs))
        for ref in order:
            with at.host.map_ref(ref.clone()) as buffer:
                content = np.frombuffer(buffer, "u1").copy()
                assert (content == 3).all()
                memoryview(buffer)[number * 2000 : number * 2000 + 5000] = b"x" * 5000
            seen.append(number)

    refs = [Ref.from_bytes(wire, at.host).accept() for wire in batch]
    in_threads([lambda number=number: use(number) for number in range(THREADS)])
    for ref in refs:
        ref.drop()
    return len(seen)


@in_host
def test_of_many_threads_that_map_one_ref_one_gets_it(at: At) -> None:
    array = at.host.array([1, 2, 3])
    for _ in range(50):
        ref = at.host.create_ref(array)
        copies = [ref, *(Ref.from_bytes(ref.to_bytes(), at.host) for _ in range(THREADS - 1))]
        got: list[Any] = []

        def take(one: Ref, got: list[Any] = got) -> None:
            try:
                got.append(at.host.map_ref(one))
            except RefConsumed:
                got.append(None)

        in_threads([lambda one=one: take(one) for one in copies])
        assert len(got) == THREADS
        assert sum(one is not None for one in got) == 1


@in_host
def test_of_many_threads_that_free_one_buffer_one_does(at: At) -> None:
    for _ in range(50):
        buffer = at.host.ralloc(100_000)
        outcomes: list[str] = []

        def free(buffer: Any = buffer, outcomes: list[str] = outcomes) -> None:
            try:
                buffer.free()
                outcomes.append("freed")
            except (BadAddress, BufferInUse) as error:
                outcomes.append(type(error).__name__)

        in_threads([free] * THREADS)
        assert outcomes.count("freed") == 1, outcomes


@in_host
def test_detach_while_other_threads_work_is_refused_or_ends_their_work_cleanly(at: At) -> None:
    for _ in range(10):
        host = attach(at)
        ended: list[str] = []

        def work(host: Any = host, ended: list[str] = ended) -> None:
            try:
                while True:
                    with host.map_ref(host.create_ref(host.ralloc(50_000))) as buffer:
                        memoryview(buffer)[0] = 1
            except (HostClosed, BadAddress) as error:
                ended.append(type(error).__name__)

        def stop(host: Any = host) -> None:
            while not host.detached:
                try:
                    host.detach()
                except BufferInUse:
                    continue

        in_threads([work] * 3 + [stop])
        assert len(ended) == 3


@in_host
def test_all_threads_may_store_to_the_same_shared_page(at: At) -> None:
    words = at.host.array(np.zeros(THREADS, "i8"))
    for step in range(100):
        ref = at.host.create_ref(words)
        in_threads_store(words, step)
        assert words.tolist() == [step + 1] * THREADS
        with at.host.map_ref(ref) as before:
            assert memoryview(before).cast("q").tolist() == [step] * THREADS


def in_threads_store(words: Any, step: int) -> None:
    def store(number: int) -> None:
        words[number] += 1

    in_threads([lambda number=number: store(number) for number in range(THREADS)])

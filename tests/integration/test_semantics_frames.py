"""What the paper leaves open about frames and counts: exhaustion, overflow, and two hosts at the same moment.

The numbers are those of test_semantics.py.
"""

import ctypes
import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import OutOfFrames, TooManyRefs
from dmrpc_cxl.fabric import device
from tests.crews import MIB, SCARCE, Crew, Member, in_host
from tests.fabrics import At, Fabric, running
from tests.pictures import nothing_changes
from tests.standing import take_all_frames, wait_for_fault

PAGE = 4096


@pytest.fixture
def scarce() -> Iterator[Fabric]:
    """A fabric of 256 frames."""
    with running(size=256 * PAGE, coordinator=SCARCE) as fabric:
        yield fabric


# ---------------------------------------------------------------- exhaustion


def test_15_reserve_takes_the_frames_for_every_page_first_or_refuses(scarce: Fabric) -> None:
    mapper, hog = scarce.host(), scarce.host()
    mapper.call(share_with_oneself, 10)
    hog.call(take_all_frames, 9)
    mapper.call(refused_without_a_change)
    hog.call(free_one)
    mapper.call(store_to_every_page)


def share_with_oneself(at: At, pages: int) -> None:
    at.buffer = at.host.ralloc(pages * PAGE)
    at.ref = at.host.create_ref(at.buffer)


def refused_without_a_change(at: At) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(OutOfFrames):
        at.host.map_ref(at.ref, reserve=True)


def free_one(at: At) -> None:
    at.rest.pop().free()


def store_to_every_page(at: At) -> None:
    mapped = at.host.map_ref(at.ref, reserve=True)
    with pytest.raises(OutOfFrames):  # what is reserved is not given to others
        at.host.ralloc(1)
    mapped.numpy()[::PAGE] = 1
    assert at.host.stats()["reserved_frames"] == 0
    assert not at.buffer.numpy().any()


def test_16_an_exhausted_pool_is_an_exception_of_whoever_asks_and_of_nobody_else(
    scarce: Fabric,
) -> None:
    hog, other = Member(scarce.host()), Member(scarce.host())
    other.ralloc("buffer", 3 * PAGE)
    assert hog.call(take_all_frames) == 253
    hog.call(cannot_allocate)
    assert other.read("buffer") == bytes(3 * PAGE)
    other.write("buffer", b"mine")
    hog.call(free_one)
    other.ralloc("one", PAGE)
    hog.call(forget_rest)
    hog.ralloc("all", 252 * PAGE)


def cannot_allocate(at: At) -> None:
    for size in (1, PAGE, 100 * PAGE):
        with nothing_changes(at.host.fabric), pytest.raises(OutOfFrames) as caught:
            at.host.ralloc(size)
        assert isinstance(caught.value, MemoryError)


def forget_rest(at: At) -> None:
    at.rest.clear()


def test_16_lazy_memory_may_be_more_than_there_is(scarce: Fabric) -> None:
    scarce.host(copy_around=1).call(over_commit)


def over_commit(at: At) -> None:
    lazy = [at.host.ralloc(256 * PAGE, lazy=True) for _ in range(2)]  # all that there is, twice
    for buffer in lazy:
        buffer.numpy()[:: 4 * PAGE] = 1
        assert buffer.numpy().sum() == 64


@pytest.mark.parametrize("lazy", [False, True], ids=["copy on write", "hole"])
def test_16_a_store_that_finds_no_frame_in_time_ends_the_process_and_says_why(
    scarce: Fabric, capfd: pytest.CaptureFixture[str], lazy: bool
) -> None:
    victim, hog = scarce.host(deadline=0.5, name="victim"), scarce.host()
    victim.call(prepare_a_store, lazy)
    hog.call(take_all_frames)
    victim.start(store)
    assert victim.expect_death() == -signal.SIGABRT
    [message] = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("dmrpc: fatal:")
    ]
    for part in (scarce.name, "victim", "no free frame", "0.5 s", "reserve=True"):
        assert part in message


@pytest.mark.parametrize("lazy", [False, True], ids=["copy on write", "hole"])
def test_16_a_store_that_finds_no_frame_waits_for_one(scarce: Fabric, lazy: bool) -> None:
    writer, hog = scarce.host(deadline=60), scarce.host()
    tid = writer.call(prepare_a_store, lazy)
    hog.call(take_all_frames)
    writer.start(store)
    wait_for_fault(tid, writer.pid)
    hog.call(free_one)
    assert writer.result() == b"x"


def prepare_a_store(at: At, lazy: bool) -> int:
    at.buffer = at.host.ralloc(PAGE, lazy=lazy)
    if not lazy:
        at.ref = at.host.create_ref(at.buffer)
    return threading.get_native_id()


def store(at: At) -> bytes:
    memoryview(at.buffer)[:1] = b"x"
    return bytes(memoryview(at.buffer)[:1])


# ---------------------------------------------------------------- counts

MOST = 0x7FFFFFFF


def poke(fabric: str, frame: int, refcount: int) -> None:
    """Write a refcount into a frame's word, as if so many holders existed."""
    with device.open(fabric) as opened:
        place = opened.superblock["frame_table_off"] + 8 * frame
        os.pwrite(opened.fileno(), refcount.to_bytes(4, "little"), place)


@pytest.mark.parametrize("how", ["create_ref", "clone"])
@pytest.mark.parametrize("full", [0, 1, 2], ids=["first page", "second page", "last page"])
def test_17_a_count_that_would_overflow_is_refused_and_all_counts_are_as_before(
    crew: Crew, how: str, full: int
) -> None:
    host = crew[0]
    host.ralloc("buffer", 3 * PAGE)
    frames = host.frames("buffer")
    wire = host.create_ref("buffer")
    poke(crew.fabric.name, frames[full], MOST - 1)
    if how == "create_ref":
        assert host.drop(host.create_ref("buffer"))  # there is room for one
    else:
        wire, copy = host.clone(wire)
        assert host.drop(copy)
    poke(crew.fabric.name, frames[full], MOST)
    host.call(refuse_one_more, how, wire)
    assert crew.counts(frames) == [MOST if page == full else 2 for page in range(3)]
    poke(crew.fabric.name, frames[full], 2)
    assert host.drop(wire)
    host.rfree("buffer")


def refuse_one_more(at: At, how: str, wire: bytes) -> None:
    from dmrpc_cxl import Ref

    ref = Ref.from_bytes(wire, at.host)
    with nothing_changes(at.host.fabric):
        for _ in range(3):
            with pytest.raises(TooManyRefs) as caught:
                at.host.create_ref(at.buffer) if how == "create_ref" else ref.clone()
            assert isinstance(caught.value, OverflowError)
    ref.to_bytes()


# ---------------------------------------------------------------- two at once


def test_18_a_copy_is_complete_whoever_else_stores_at_that_moment(crew: Crew) -> None:
    # If the count went down before the copy was made, the other one would store in place while it is read.
    creator, one, other = crew[:3]
    pages = 64
    for round_ in range(30):
        creator.ralloc("buffer", pages * PAGE)
        creator.write("buffer", bytes([round_]) * pages * PAGE)
        wires = [creator.create_ref("buffer") for _ in range(2)]
        creator.rfree("buffer")
        for member, wire in zip((one, other), wires, strict=True):
            member.map_ref("buffer", wire)
        for member in (one, other):
            member.start(store_and_compare, round_)
        assert [member.result() for member in (one, other)] == [pages, pages]
        for member in (one, other):
            member.rfree("buffer")


def store_and_compare(at: At, content: int) -> int:
    """Store one word of our own into every page; return how many pages are otherwise what they were."""
    words = at.buffer.numpy("u8").reshape(-1, PAGE // 8)
    own = 0x1000 + at.host.id
    order = np.random.default_rng(content).permutation(len(words))
    for page in order:
        words[page, 7] = own
    expected = np.full((len(words), PAGE // 8), content * 0x0101010101010101, "u8")
    expected[:, 7] = own
    return int((words == expected).all(axis=1).sum())


def test_19_of_two_who_drop_the_last_counts_at_once_exactly_one_gets_the_frame(crew: Crew) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    creator, one, other = crew[:3]
    for round_ in range(30):
        creator.ralloc("buffer", 64 * PAGE)
        made = creator.frames("buffer")
        for member in (one, other):
            member.map_ref("buffer", creator.create_ref("buffer"))
        creator.rfree("buffer")
        assert crew.counts(made) == [2] * 64
        for member in (one, other):  # each stores to some pages and frees all
            member.start(store_some_and_free, f"{seed} {round_} {member.id}")
        for member in (one, other):
            member.result()
        assert crew.counts(made) == [0] * 64
        crew.sound(in_use=0)  # and no frame is free twice, or nowhere


def store_some_and_free(at: At, seed: str) -> None:
    pages = at.buffer.numpy().reshape(-1, PAGE)
    for page in random.Random(seed).sample(range(64), 40):
        pages[page, 0] = 1
    del pages
    at.buffer.free()
    del at.buffer


@pytest.mark.parametrize("crew", ["4K", "64K"], indirect=True)
@in_host
def test_20_a_ref_made_while_another_thread_stores_is_what_the_bytes_were_at_one_moment(
    at: At,
) -> None:
    # numpy adds without the GIL, in ascending order: at any moment the words are k+1 up to some place, k from there on.
    words = at.host.array(np.zeros(200_000, "i8"))
    stop = threading.Event()

    def add() -> None:
        while not stop.is_set():
            np.add(words, 1, out=words)

    adder = threading.Thread(target=add)
    adder.start()
    try:
        torn = rounds = 0
        while torn < 3 and rounds < 1000:
            rounds += 1
            snapshot = at.host.map_ref(at.host.create_ref(words))
            seen: Any = np.frombuffer(snapshot, "i8").copy()
            steps = np.diff(seen)
            assert ((steps == 0) | (steps == -1)).all(), seen[np.flatnonzero(steps)[:5]]
            assert seen[0] - seen[-1] in (0, 1)
            torn += int(seen[0] != seen[-1])
            assert (np.frombuffer(snapshot, "i8") == seen).all()
            del seen
            snapshot.free()
    finally:
        stop.set()
        adder.join()
    assert torn, "no snapshot was taken in the middle of an addition: this test showed nothing"


# ---------------------------------------------------------------- batches and zeros


def test_32_frames_come_in_batches_so_that_the_coordinator_is_seldom_asked(fabric: Fabric) -> None:
    host = Member(fabric.host())
    host.ralloc("first", PAGE)
    assert host.stats()["frames_granted"] == 256
    assert host.stats()["coordinator_round_trips"] == 1
    with host.counting() as added:
        host.call(allocate_many, 1000)
    assert added["coordinator_round_trips"] <= 5
    with host.counting() as added:
        host.call(put_and_take, 1000)
    assert added["coordinator_round_trips"] == 0
    fewer = Member(fabric.host(batch=8))
    fewer.ralloc("first", PAGE)
    assert fewer.stats()["frames_granted"] == 8


def test_32_a_host_above_its_high_watermark_gives_frames_back(fabric: Fabric) -> None:
    producer, consumer = fabric.host(), fabric.host(high=300)

    def last_dropped_by_the_consumer() -> None:
        consumer.call(map_many, producer.call(share_many, 50))
        producer.call(free_kept)
        consumer.call(free_kept)

    for already in range(0, 300, 50):
        last_dropped_by_the_consumer()
        assert fabric.assert_sound()["free"][consumer.id] == already + 50
    last_dropped_by_the_consumer()
    audit = fabric.wait_until(lambda audit: audit["free"][consumer.id] < 300)
    assert audit["pool"] > 8192 - 300 - 1024


def share_many(at: At, count: int) -> list[bytes]:
    at.kept = [at.host.ralloc(PAGE) for _ in range(count)]
    return [at.host.create_ref(buffer).to_bytes() for buffer in at.kept]


def map_many(at: At, wires: list[bytes]) -> None:
    at.kept = [at.host.map_ref(wire) for wire in wires]


def free_kept(at: At) -> None:
    for buffer in at.kept:
        buffer.free()
    at.kept = []


def allocate_many(at: At, count: int) -> None:
    at.kept = [at.host.ralloc(PAGE) for _ in range(count)]


def put_and_take(at: At, count: int) -> None:
    for _ in range(count):
        at.host.map_ref(at.host.create_ref(at.host.ralloc(PAGE), move=True)).free()


def test_33_frames_come_zeroed_whoever_had_them_before() -> None:
    with running(size=4 * MIB) as fabric:
        for _ in range(2):
            host = fabric.host()
            host.call(leave_secrets_everywhere)
            host.leave()
        assert fabric.host().call(find_secrets) == 0


def leave_secrets_everywhere(at: At) -> None:
    buffer = at.host.ralloc(4 * MIB - 64 * PAGE, zero=False)
    ctypes.memset(buffer.address, 0xEE, len(buffer))


def find_secrets(at: At) -> int:
    found = 0
    for how in ({}, {"lazy": True}):
        buffer = at.host.ralloc(4 * MIB - 64 * PAGE, **how)
        buffer.numpy()[::PAGE] = 0  # every page has its frame now
        found += int(np.count_nonzero(buffer.numpy()))
        del buffer
    return found

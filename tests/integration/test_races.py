"""Operations that meet: stores to the same shared page, snapshots under writers, many threads, two takers of one Ref.

How rounds are counted. In the tests with `Meeting` a round is one page or one Ref, and all parties meet before each of
them: they leave a barrier spun on in shared memory within a microsecond of each other (on one CPU: one after the
other). Where a test meets once for many pages it says so.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import BufferInUse, DmError, RefConsumed
from tests.fabrics import At, HostProcess
from tests.standing import Meeting, Standing

PAGE = 4096
WORDS = PAGE // 8
PARTIES = 4

standing = Standing(*[{"copy_around": 1}] * PARTIES, size=32 << 20)


@pytest.fixture(scope="module", autouse=True)
def _stand() -> Any:
    yield
    standing.close()


@pytest.fixture
def hosts() -> Any:
    """Four hosts whose faults serve one page each."""
    with standing.use() as (_, hosts):
        yield hosts


def call_all(hosts: list[HostProcess], function: Any, *args: Any, each: Any = ()) -> list[Any]:
    """Run function(at, *args, *each[i]) in all host processes at once."""
    for i, host in enumerate(hosts):
        host.start(function, *args, *(each[i] if each else ()))
    return [host.result() for host in hosts]


def meet(at: At, path: str, me: int, parties: int) -> None:
    at.me, at.parties = me, parties
    at.meeting = Meeting(path, me, parties)


def introduce(hosts: list[HostProcess], folder: Path) -> None:
    places = [(str(folder / "meeting"), me, len(hosts)) for me in range(len(hosts))]
    call_all(hosts, meet, each=places)


# -------------------------------------------------------------------- stores to the same page


def make_page_refs(at: At, pages: int, takers: int, keep: bool) -> list[bytes]:
    """Share a buffer with `takers` others; word 0 of page p holds p. Its maker keeps it mapped or not."""
    at.buffer = at.host.ralloc(pages * PAGE)
    words = at.buffer.numpy("u8").reshape(pages, WORDS)
    words[:] = np.arange(pages, dtype="u8")[:, None] << np.uint64(32)
    del words
    first = at.host.create_ref(at.buffer)
    wires = [first.to_bytes(), *(first.clone().to_bytes() for _ in range(takers - 1))]
    if not keep:
        at.buffer.free()
    return wires


def store_in_step(at: At, wire: bytes | None, pages: int, order: list[int], stamp: int) -> int:
    """Store to every page at the same moment as the others; return how many pages are not as they should be."""
    buffer = at.buffer if wire is None else at.host.map_ref(wire)
    words = memoryview(buffer).cast("Q")
    slot = 1 + 3 * at.me
    meeting = at.meeting
    for page in order:
        at_page = page * WORDS + slot
        meeting.meet()
        words[at_page] = stamp + page
    meeting.meet()  # all have written all they write
    words.release()
    found = buffer.numpy("u8").reshape(pages, WORDS)
    expected = np.broadcast_to(
        np.arange(pages, dtype="u8")[:, None] << np.uint64(32), (pages, WORDS)
    ).copy()
    expected[:, slot] = stamp + np.arange(pages, dtype="u8")
    wrong = int((found != expected).any(axis=1).sum())
    del found
    meeting.meet()  # all have looked: nobody frees what others still read
    buffer.free()
    return wrong


@pytest.mark.parametrize("creator_keeps", [True, False], ids=["kept", "freed"])
@pytest.mark.parametrize("parties", [2, 4])
def test_hosts_that_store_to_one_page_at_the_same_moment_each_get_their_own(
    hosts: list[HostProcess], parties: int, creator_keeps: bool, tmp_path: Path
) -> None:
    """Ten thousand rounds, each with a barrier of its own: a page, and one store of each host to it."""
    pages, batches = 500, 20
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    hosts = hosts[:parties]
    introduce(hosts, tmp_path)
    before = sum(call_all(hosts, frames_copied))
    for batch in range(batches):
        takers = parties - creator_keeps
        wires: list[bytes | None] = hosts[0].call(make_page_refs, pages, takers, creator_keeps)
        wires = [None, *wires] if creator_keeps else wires
        order = list(range(pages))
        dice.shuffle(order)
        each = [(wire, pages, order, batch << 16) for wire in wires]
        assert call_all(hosts, store_in_step, each=each) == [0] * parties
    copied = sum(call_all(hosts, frames_copied)) - before
    print(f"{pages * batches} pages, {copied} copies; {parties - 1} a page when nobody meets")


def frames_copied(at: At) -> int:
    return int(at.host.stats()["frames_copied"])


def store_through(at: At, wire: bytes, pages: int, value: int) -> int:
    """Fill a whole mapping when all others begin to fill theirs; return how many words are wrong."""
    buffer = at.host.map_ref(wire)
    words = buffer.numpy("u8")
    at.meeting.meet()
    words[at.me :: at.parties] = value + at.me
    at.meeting.meet()
    expected = np.repeat(np.arange(pages, dtype="u8") << np.uint64(32), WORDS)
    expected[at.me :: at.parties] = value + at.me
    wrong = int((words != expected).sum())
    at.meeting.meet()
    del words
    buffer.free()
    return wrong


def test_hosts_that_fill_one_buffer_at_once_each_get_their_own(
    hosts: list[HostProcess], tmp_path: Path
) -> None:
    """One barrier for 1000 pages: all four run through the same pages as fast as they can."""
    introduce(hosts, tmp_path)
    for batch in range(4):
        wires = hosts[0].call(make_page_refs, 1000, PARTIES, False)
        each = [(wire, 1000, batch << 8) for wire in wires]
        assert call_all(hosts, store_through, each=each) == [0] * PARTIES


# -------------------------------------------------------------------- snapshots under writers


def snapshots(at: At, rounds: int, pages: int, writers: int) -> dict[str, int]:
    """Make Refs of a buffer that threads keep overwriting, and look at each twice.

    A writer goes through its part of the buffer from its start to its end, with the next number at
    each pass (numpy does so
    without the GIL, in order of address). So at any one moment a page holds the number of one pass
    up to some word, and that
    of the pass before from there on.
    """
    host = at.host
    buffer = host.ralloc(pages * PAGE)
    words = buffer.numpy("u8").reshape(writers, -1)
    done, begun = [0] * writers, [0] * writers
    stop = threading.Event()

    def write(i: int) -> None:
        part, value = words[i], 0
        while not stop.is_set():
            value += 1
            begun[i] = value
            part[:] = value
            done[i] = value

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    found: Counter[str] = Counter()
    for thread in threads:
        thread.start()
    try:
        for _ in range(rounds):
            least = list(done)
            ref = host.create_ref(buffer)
            most = list(begun)
            again = ref.clone()
            seen = host.map_ref(ref)
            first = seen.numpy("u8").reshape(writers, -1, WORDS).copy()
            # Seen again later: through another mapping, after the writers have gone on.
            other = host.map_ref(again)
            found["changed"] += int((other.numpy("u8") != first.ravel()).sum())
            seen.free()
            other.free()
            for i in range(writers):
                steps = first[i][:, :-1].astype("i8") - first[i][:, 1:].astype("i8")
                found["torn"] += int((steps < 0).any(axis=1).sum())  # newer behind older
                found["torn"] += int((first[i][:, 0] - first[i][:, -1] > 1).sum())
                found["too old"] += int((first[i].min(axis=1) < least[i]).sum())
                found["too new"] += int((first[i].max(axis=1) > most[i]).sum())
            found["passes"] = min(done)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return dict(found)


@pytest.mark.parametrize("writers", [1, 4])
def test_a_ref_made_under_writers_is_an_untorn_snapshot_that_never_changes(
    hosts: list[HostProcess], writers: int
) -> None:
    found = hosts[0].call(snapshots, rounds=150, pages=64, writers=writers)
    assert found.pop("passes") > 10, "the writers hardly ran: nothing was tested"
    assert not any(found.values()), found


# -------------------------------------------------------------------- many threads


def churn(at: At, wires: list[bytes], threads: int, rounds: int, seed: int) -> list[str]:
    """Map, clone, drop, share, move, store and free in many threads; return what went wrong."""
    host = at.host
    problems: list[str] = []
    sys.setswitchinterval(1e-5)
    lock = threading.Lock()
    common = [dmrpc_cxl.Ref.from_bytes(wire, host).accept() for wire in wires]

    def one(number: int) -> None:
        dice = random.Random(seed * 100 + number)
        try:
            for turn in range(rounds):
                with lock:
                    ref = dice.choice(common)
                    mine = ref.clone()  # the list must not lose it meanwhile
                what = dice.randrange(6)
                if what == 0:
                    mine.drop()
                    continue
                if what == 1:
                    del mine
                    continue
                buffer = host.map_ref(mine, copy=what == 2, reserve=what == 3)
                words = buffer.numpy("u8")
                value = int(words[0])
                if (words != value).any():
                    problems.append(f"thread {number}, turn {turn}: not what was shared")
                stamp = number << 32 | turn
                words[dice.randrange(8) * WORDS // 2 :: WORDS] = stamp
                words[:] = stamp
                if (words != stamp).any():
                    problems.append(f"thread {number}, turn {turn}: not what was stored")
                del words
                if what == 4:
                    made = host.create_ref(buffer)
                    buffer.free()
                else:
                    made = host.create_ref(buffer, move=True)
                with lock:  # the one that goes is dropped here or by another thread
                    at_place = dice.randrange(len(common))
                    made, common[at_place] = common[at_place], made
                del made
        except Exception as error:
            problems.append(f"thread {number}: {error!r}")

    workers = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    sys.setswitchinterval(0.005)
    return problems


def test_threads_that_map_clone_drop_and_free_lose_nothing(hosts: list[HostProcess]) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    wires = hosts[0].call(make_refs, 4, 12)
    hosts[0].start(churn, wires[:4], 8, 150, seed)
    hosts[1].start(churn, wires[4:8], 8, 150, seed + 1)
    hosts[2].start(churn, wires[8:], 8, 150, seed + 2)
    assert [host.result() for host in hosts[:3]] == [[], [], []]


# -------------------------------------------------------------------- one Ref, two takers


def make_refs(at: At, pages: int, count: int) -> list[bytes]:
    """Make Refs to `pages` pages full of one number, held by this host until somebody takes them."""
    buffer = at.host.ralloc(pages * PAGE)
    buffer.numpy("u8")[:] = 77
    return [at.host.create_ref(buffer).to_bytes() for _ in range(count)]


def take_in_step(at: At, wires: list[bytes], how: str) -> list[bool]:
    """Try to take each Ref at the same moment as somebody else does; say which ones were got."""
    got = []
    for wire in wires:
        ref = dmrpc_cxl.Ref.from_bytes(wire, at.host)
        at.meeting.meet()
        try:
            if how == "map":
                kept: Any = at.host.map_ref(ref)
            elif how == "copy":
                kept = at.host.map_ref(ref, copy=True)
            elif how == "accept":
                kept = ref.accept()
            elif how == "clone":
                kept = ref.clone()
            else:
                kept = None
                got.append(ref.drop())
        except RefConsumed:
            got.append(False)
            continue
        if kept is not None:
            got.append(True)
            if isinstance(kept, dmrpc_cxl.Buffer):
                assert (kept.numpy("u8") == 77).all()
        del kept
    return got


@pytest.mark.parametrize(
    "ways",
    [
        ("map", "map"),
        ("map", "copy"),
        ("accept", "accept"),
        ("accept", "map"),
        ("drop", "accept"),
        ("drop", "map"),
        ("clone", "clone"),
        ("clone", "map"),
        ("clone", "drop"),
    ],
    ids="-".join,
)
def test_of_two_hosts_that_take_a_ref_at_once_exactly_one_gets_it(
    hosts: list[HostProcess], ways: tuple[str, str], tmp_path: Path
) -> None:
    """400 rounds with a barrier each. The holder is a third host, which stays out of it."""
    one, two, holder = hosts[0], hosts[1], hosts[2]
    introduce([one, two], tmp_path)
    wires = holder.call(make_refs, 2, 400)
    one.start(take_in_step, wires, ways[0])
    two.start(take_in_step, wires, ways[1])
    got = list(zip(one.result(), two.result(), strict=True))
    assert len(got) == 400
    assert all(a != b for a, b in got), Counter(got)


def test_the_holder_that_drops_and_the_receiver_that_accepts_never_both_have_it(
    hosts: list[HostProcess], tmp_path: Path
) -> None:
    holder, receiver = hosts[0], hosts[1]
    introduce([holder, receiver], tmp_path)
    wires = holder.call(make_refs, 2, 400)
    receiver.start(take_in_step, wires, "accept")
    holder.start(take_in_step, wires, "drop")
    got = list(zip(holder.result(), receiver.result(), strict=True))
    assert all(a != b for a, b in got), Counter(got)


def take_by_threads(at: At, rounds: int, how: str) -> list[int]:
    """Let four threads take the same Ref, each with an object of its own; return how many got it, by round."""
    host = at.host
    buffer = host.ralloc(2 * PAGE)
    barrier = threading.Barrier(4)
    wins = [[0] * rounds for _ in range(4)]  # by thread: no two count in one place
    refs: list[list[Any]] = []
    for _ in range(rounds):
        made = host.create_ref(buffer)
        wire = made.to_bytes()
        refs.append([made, *(dmrpc_cxl.Ref.from_bytes(wire, host) for _ in range(3))])

    def take(number: int) -> None:
        for turn in range(rounds):
            barrier.wait()
            try:
                if how == "map" or (how == "both" and number % 2):
                    host.map_ref(refs[turn][number]).free()
                    wins[number][turn] = 1
                else:
                    wins[number][turn] = int(refs[turn][number].drop())
            except RefConsumed:
                pass

    threads = [threading.Thread(target=take, args=(i,)) for i in range(4)]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(0.005)
    return [sum(turn) for turn in zip(*wins, strict=True)]


@pytest.mark.parametrize("how", ["map", "drop", "both"])
def test_of_threads_that_take_a_ref_at_once_exactly_one_gets_it(
    hosts: list[HostProcess], how: str
) -> None:
    assert hosts[0].call(take_by_threads, 300, how) == [1] * 300


def detach_under_calls(at: At, fabric: str, rounds: int) -> set[str]:
    """Attach a second host, use and drop Refs in threads, detach it meanwhile; return how the threads ended."""
    ends: set[str] = set()
    sys.setswitchinterval(1e-6)
    for _ in range(rounds):
        host = dmrpc_cxl.attach(fabric)
        buffer = host.ralloc(PAGE)
        wires = [host.create_ref(buffer).to_bytes() for _ in range(600)]
        started = threading.Barrier(4)

        def use(part: list[bytes], host: Any = host, started: Any = started) -> None:
            started.wait()
            try:
                for wire in part:
                    ref = dmrpc_cxl.Ref.from_bytes(wire, host)
                    ref.accept()
                    ref.drop()
                ends.add("done")
            except DmError as error:
                ends.add(type(error).__name__)

        threads = [threading.Thread(target=use, args=(wires[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        while True:
            try:
                host.detach()
                break
            except BufferInUse:
                continue
        for thread in threads:
            thread.join()
    sys.setswitchinterval(0.005)
    return ends


def test_detach_under_calls_of_other_threads_waits_or_refuses_and_never_crashes(
    hosts: list[HostProcess],
) -> None:
    with standing.use() as (fabric, _):
        assert hosts[0].call(detach_under_calls, fabric.name, 30) <= {"done", "HostClosed"}

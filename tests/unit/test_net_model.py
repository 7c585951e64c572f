"""Any sequence of requests to a shard behaves like private copies: compared with a model in plain Python.

The model knows no pages: a range is its own bytes, a Ref is the bytes that it denotes. What it has to know of pages is which
are holes, for only that says whether an allocation can fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tests.net_wire import FLAGS, PAGE, Spoken

PIDS = (1, 2, 3)
PAGES = 40
MAX_PAGES = 5
pids = st.sampled_from(PIDS)
sizes = st.integers(1, MAX_PAGES * PAGE)
fractions = st.floats(0, 1)


@dataclass
class Range:
    pid: int
    address: int
    content: bytearray  # whole pages
    alive: bool = True
    read_only: bool = False


@dataclass
class Ref:
    key: int
    content: bytes  # whole pages
    length: int
    holder: int | None  # None: used up


def pages_of(nbytes: int) -> int:
    return -(-nbytes // PAGE)


class Shards(RuleBasedStateMachine):
    ranges = Bundle("ranges")
    refs = Bundle("refs")

    @initialize()
    def begin(self) -> None:
        self.spoken = Spoken(PAGES)
        self.all_ranges: list[Range] = []
        self.all_refs: list[Ref] = []
        self.lives = dict.fromkeys(PIDS, 0)

    def now(self, pid: int) -> int:
        """A process id never comes again: after a death it is another one."""
        return pid + 10 * self.lives[pid]

    def forgotten(self, pid: int) -> bool:
        return pid != self.now(pid % 10)

    def ask(self, pid: int, op: str, *args: int, **more: Any) -> Any:
        return self.spoken.ask(pid, op, *args, **more)

    def new_range(self, pid: int, address: int, content: bytearray, **more: Any) -> Range:
        for other in self.all_ranges:
            if other.alive and other.pid == pid:
                apart = address + len(content) <= other.address
                assert apart or other.address + len(other.content) <= address
        new = Range(pid, address, content, **more)
        self.all_ranges.append(new)
        return new

    def new_ref(self, pid: int, key: int, content: bytes, length: int) -> Ref:
        assert all(key != other.key for other in self.all_refs)
        new = Ref(key, content, length, pid)
        self.all_refs.append(new)
        return new

    # ---------------------------------------------------------------- ranges

    @rule(target=ranges, pid=pids, size=sizes)
    def ralloc(self, pid: int, size: int) -> Range:
        pid = self.now(pid)
        answer = self.ask(pid, "RALLOC", size)
        assert answer.status == "OK"
        return self.new_range(pid, answer.a, bytearray(pages_of(size) * PAGE))

    @rule(r=ranges, where=fractions, size=sizes, value=st.integers(1, 255))
    def rwrite(self, r: Range, where: float, size: int, value: int) -> None:
        if self.forgotten(r.pid):
            return
        offset = int(where * (len(r.content) - 1))
        answer = self.ask(r.pid, "RWRITE", r.address + offset, payload=bytes([value]) * size)
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
        elif offset + size > len(r.content):
            assert answer.status == "BAD_SIZE"
        elif r.read_only:
            assert answer.status == "IS_READ_ONLY"
        elif answer.status == "OUT_OF_PAGES":
            assert self.spoken.audit(999)["nr_free"] < pages_of(size) + 1
        else:
            assert answer.status == "OK"
            r.content[offset : offset + size] = bytes([value]) * size

    @rule(r=ranges, where=fractions, size=sizes)
    def rread(self, r: Range, where: float, size: int) -> None:
        if self.forgotten(r.pid):
            return
        offset = int(where * (len(r.content) - 1))
        answer = self.ask(r.pid, "RREAD", r.address + offset, size)
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
        elif offset + size > len(r.content):
            assert answer.status == "BAD_SIZE"
        else:
            assert answer.payload == r.content[offset : offset + size]

    @rule(r=ranges, offset=st.sampled_from([0, 0, 0, PAGE, 1]))
    def rfree(self, r: Range, offset: int) -> None:
        if self.forgotten(r.pid) or offset >= len(r.content):
            return
        answer = self.ask(r.pid, "RFREE", r.address + offset)
        if r.alive and offset == 0:
            assert answer.status == "OK"
            r.alive = False
        else:
            assert answer.status == "BAD_ADDRESS"

    # ---------------------------------------------------------------- Refs

    @rule(target=refs, r=ranges, first=st.integers(0, MAX_PAGES), size=sizes,
          flag=st.sampled_from(["", "", "COPY", "MOVE"]))  # fmt: skip
    def create_ref(self, r: Range, first: int, size: int, flag: str) -> Any:
        at = first * PAGE
        if self.forgotten(r.pid) or at >= len(r.content):
            return multiple()
        answer = self.ask(r.pid, "CREATE_REF", r.address + at, size, flags=FLAGS.get(flag, 0))
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
            return multiple()
        if at + size > len(r.content):
            assert answer.status == "BAD_SIZE"
            return multiple()
        if flag == "MOVE" and (at or pages_of(size) * PAGE != len(r.content)):
            assert answer.status in ("BAD_ADDRESS", "BAD_SIZE")
            return multiple()
        if flag == "COPY" and answer.status == "OUT_OF_PAGES":
            assert self.spoken.audit(999)["nr_free"] < pages_of(size)
            return multiple()
        assert answer.status == "OK"
        r.alive = r.alive and flag != "MOVE"
        content = bytes(r.content[at : at + pages_of(size) * PAGE])
        return self.new_ref(r.pid, answer.a, content, size)

    @rule(target=ranges, ref=refs, pid=pids, read_only=st.booleans())
    def map_ref(self, ref: Ref, pid: int, read_only: bool) -> Any:
        pid = self.now(pid)
        flags = FLAGS["READ_ONLY"] if read_only else 0
        answer = self.ask(pid, "MAP_REF", ref.key, ref.length, flags=flags)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
            return multiple()
        assert answer.status == "OK"
        ref.holder = None
        return self.new_range(pid, answer.a, bytearray(ref.content), read_only=read_only)

    @rule(target=refs, ref=refs, pid=pids)
    def clone_ref(self, ref: Ref, pid: int) -> Any:
        pid = self.now(pid)
        answer = self.ask(pid, "CLONE_REF", ref.key, ref.length)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
            return multiple()
        return self.new_ref(pid, answer.a, ref.content, ref.length)

    @rule(ref=refs, pid=pids)
    def accept_ref(self, ref: Ref, pid: int) -> None:
        pid = self.now(pid)
        answer = self.ask(pid, "ACCEPT_REF", ref.key, ref.length)
        assert answer.status == ("OK" if ref.holder else "REF_CONSUMED")
        if ref.holder:
            ref.holder = pid
            assert self.ask(pid, "HELD", ref.key, ref.length).a == 1

    @rule(ref=refs, pid=pids)
    def drop_ref(self, ref: Ref, pid: int) -> None:
        pid = self.now(pid)
        answer = self.ask(pid, "DROP_REF", ref.key, ref.length)
        assert (answer.status, answer.a) == ("OK", int(ref.holder == pid))
        if ref.holder == pid:
            ref.holder = None

    @rule(ref=refs, pid=pids, start=fractions, end=fractions, keep=st.booleans())
    def get(self, ref: Ref, pid: int, start: float, end: float, keep: bool) -> None:
        pid = self.now(pid)
        offset = int(start * ref.length)
        size = int(end * (ref.length - offset))
        flags = FLAGS["KEEP"] if keep else 0
        answer = self.ask(pid, "GET", ref.key, ref.length, offset, size, flags=flags)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
            return
        assert answer.payload == ref.content[offset : offset + size]
        ref.holder = ref.holder if keep else None

    @rule(target=refs, pid=pids, size=sizes, value=st.integers(1, 255))
    def put(self, pid: int, size: int, value: int) -> Any:
        pid = self.now(pid)
        answer = self.ask(pid, "PUT", payload=bytes([value]) * size)
        if answer.status == "OUT_OF_PAGES":
            assert self.spoken.audit(999)["nr_free"] < pages_of(size)
            return multiple()
        content = (bytes([value]) * size).ljust(pages_of(size) * PAGE, b"\0")
        return self.new_ref(pid, answer.a, content, size)

    @rule(ref=consumes(refs), wrong=st.integers(1, 1 << 40))
    def wrong_length(self, ref: Ref, wrong: int) -> None:
        if wrong != ref.length and ref.holder is not None:
            assert self.ask(self.now(1), "MAP_REF", ref.key, wrong).status == "BAD_REF"

    # ---------------------------------------------------------------- ends

    @rule(pid=pids)
    def die(self, pid: int) -> None:
        self.lives[pid] += 1
        pid += 10 * (self.lives[pid] - 1)
        self.spoken.depart(pid)
        for r in self.all_ranges:
            if r.pid == pid:
                r.alive = False
        for ref in self.all_refs:
            if ref.holder == pid:
                ref.holder = None

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "spoken"):
            return
        found = self.spoken.audit(999)
        assert found["nr_ranges"] == sum(r.alive for r in self.all_ranges)
        assert found["nr_refs"] == sum(ref.holder is not None for ref in self.all_refs)

    def teardown(self) -> None:
        if hasattr(self, "spoken"):
            self.spoken.finish()


Shards.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class TestAnySequenceOfRequestsBehavesLikePrivateCopies(Shards.TestCase):  # type: ignore[misc, name-defined]
    pass

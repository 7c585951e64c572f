"""Any sequence of requests to a shard behaves like private copies: compared with a model in plain Python.

The model knows no pages: a range is its own bytes, a Ref is the bytes that it denotes. Programs are drawn at random, step by
step, from what there is at that moment; the seed of a program is hypothesis's, and is printed when it fails.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.net_wire import FLAGS, PAGE, Answer, Spoken

PROCESSES = 3
PAGES = 40
MAX_PAGES = 5
AUDITOR = 999_999


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


class Program:
    """A shard and its model."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.spoken = Spoken(PAGES)
        self.pids = list(range(1, PROCESSES + 1))
        self.ranges: list[Range] = []
        self.refs: list[Ref] = []

    def run(self, steps: int) -> None:
        acts = [
            self.ralloc, self.rwrite, self.rwrite, self.rwrite, self.rread, self.rfree, self.create_ref,
            self.create_ref, self.map_ref, self.map_ref, self.clone_ref, self.accept_ref, self.drop_ref,
            self.get, self.put,
        ]  # fmt: skip
        for step in range(steps):
            if step % 100 == 99:
                self.die()
            act = self.random.choice(acts)
            act()
            self.account(act.__name__)
            if step % 10 == 9:
                self.look_at_everything()
        self.spoken.finish()

    # ---------------------------------------------------------------- what to do it with

    def pid(self) -> int:
        return self.random.choice(self.pids)

    def size(self) -> int:
        whole = self.random.randint(1, MAX_PAGES) * PAGE
        return whole if self.random.random() < 0.3 else self.random.randint(1, whole)

    def value(self) -> bytes:
        return bytes([self.random.randint(1, 255)])

    def some_range(self) -> Range | None:
        """Mostly one that is alive."""
        alive = [r for r in self.ranges if r.alive]
        own = [r for r in self.ranges if r.pid in self.pids]
        return self.random.choice(alive if alive and self.random.random() < 0.95 else own or [None])  # type: ignore[list-item]

    def some_ref(self) -> Ref | None:
        alive = [ref for ref in self.refs if ref.holder is not None]
        chosen = alive if alive and self.random.random() < 0.95 else self.refs
        return self.random.choice(chosen) if chosen else None

    def new_range(self, pid: int, address: int, content: bytes, *, read_only: bool = False) -> None:
        for other in self.ranges:
            if other.alive and other.pid == pid:
                apart = address + len(content) <= other.address
                assert apart or other.address + len(other.content) <= address
        self.ranges.append(Range(pid, address, bytearray(content), read_only=read_only))

    def new_ref(self, pid: int, key: int, content: bytes, length: int) -> None:
        assert all(key != other.key for other in self.refs)
        self.refs.append(Ref(key, bytes(content), length, pid))

    def refused(self, answer: Answer, needed: int) -> bool:
        """Tell whether the shard had too few pages, and insist that this is true."""
        if answer.status == "OUT_OF_PAGES":
            assert self.spoken.audit(AUDITOR)["nr_free"] < needed
            return True
        assert answer.status == "OK"
        return False

    # ---------------------------------------------------------------- ranges

    def ralloc(self) -> None:
        pid, size = self.pid(), self.size()
        answer = self.spoken.ask(pid, "RALLOC", size)
        assert answer.status == "OK"
        self.new_range(pid, answer.a, bytes(pages_of(size) * PAGE))

    def rwrite(self) -> None:
        r = self.some_range()
        if r is None:
            return
        offset, size, value = self.random.randrange(len(r.content)), self.size(), self.value()
        if self.random.random() < 0.5:
            offset -= offset % PAGE
        if self.random.random() < 0.9:
            size = min(size, len(r.content) - offset)
        answer = self.spoken.ask(r.pid, "RWRITE", r.address + offset, payload=value * size)
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
        elif offset + size > len(r.content):
            assert answer.status == "BAD_SIZE"
        elif r.read_only:
            assert answer.status == "IS_READ_ONLY"
        elif not self.refused(answer, pages_of(offset % PAGE + size)):
            r.content[offset : offset + size] = value * size

    def rread(self) -> None:
        r = self.some_range()
        if r is None:
            return
        offset, size = self.random.randrange(len(r.content)), self.size()
        answer = self.spoken.ask(r.pid, "RREAD", r.address + offset, size)
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
        elif offset + size > len(r.content):
            assert answer.status == "BAD_SIZE"
        else:
            assert answer.payload == r.content[offset : offset + size]

    def rfree(self) -> None:
        r = self.some_range()
        if r is None:
            return
        inside = self.random.choice([0, 0, 0, 1, len(r.content) - PAGE])
        answer = self.spoken.ask(r.pid, "RFREE", r.address + inside)
        if r.alive and inside == 0:
            assert answer.status == "OK"
            r.alive = False
        else:
            assert answer.status == "BAD_ADDRESS"

    # ---------------------------------------------------------------- Refs

    def create_ref(self) -> None:
        r = self.some_range()
        if r is None:
            return
        flag = self.random.choice(["", "", "", "COPY", "MOVE"])
        at, size = self.random.randrange(len(r.content) // PAGE) * PAGE, self.size()
        if flag == "MOVE" and self.random.random() < 0.8:
            at, size = 0, len(r.content) - self.random.randrange(PAGE)
        answer = self.spoken.ask(
            r.pid, "CREATE_REF", r.address + at, size, flags=FLAGS.get(flag, 0)
        )
        if not r.alive:
            assert answer.status == "BAD_ADDRESS"
        elif at + size > len(r.content):
            assert answer.status == "BAD_SIZE"
        elif flag == "MOVE" and (at or pages_of(size) * PAGE != len(r.content)):
            assert answer.status in ("BAD_ADDRESS", "BAD_SIZE")
        elif not self.refused(answer, pages_of(size) if flag == "COPY" else 0):
            r.alive = flag != "MOVE"
            self.new_ref(r.pid, answer.a, r.content[at : at + pages_of(size) * PAGE], size)

    def map_ref(self) -> None:
        ref, pid, read_only = self.some_ref(), self.pid(), self.random.random() < 0.2
        if ref is None:
            return
        flags = FLAGS["READ_ONLY"] if read_only else 0
        answer = self.spoken.ask(pid, "MAP_REF", ref.key, ref.length, flags=flags)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
            return
        assert answer.status == "OK"
        ref.holder = None
        self.new_range(pid, answer.a, ref.content, read_only=read_only)

    def clone_ref(self) -> None:
        ref, pid = self.some_ref(), self.pid()
        if ref is None:
            return
        answer = self.spoken.ask(pid, "CLONE_REF", ref.key, ref.length)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
        else:
            self.new_ref(pid, answer.a, ref.content, ref.length)

    def accept_ref(self) -> None:
        ref, pid = self.some_ref(), self.pid()
        if ref is None:
            return
        anew = self.random.random() < 0.5
        flags = FLAGS["ANEW"] if anew else 0
        answer = self.spoken.ask(pid, "ACCEPT_REF", ref.key, ref.length, flags=flags)
        assert answer.status == ("OK" if ref.holder else "REF_CONSUMED")
        if ref.holder and anew:
            self.new_ref(pid, answer.a, ref.content, ref.length)
            ref.holder = None
        elif ref.holder:
            ref.holder = pid
        held = self.spoken.ask(pid, "HELD", ref.key, ref.length)
        assert held.a == int(ref.holder == pid)

    def drop_ref(self) -> None:
        ref, pid = self.some_ref(), self.pid()
        if ref is None:
            return
        anybodys = self.random.random() < 0.3
        flags = FLAGS["ANYBODYS"] if anybodys else 0
        answer = self.spoken.ask(pid, "DROP_REF", ref.key, ref.length, flags=flags)
        dropped = ref.holder == pid or (anybodys and ref.holder is not None)
        assert (answer.status, answer.a) == ("OK", int(dropped))
        if dropped:
            ref.holder = None

    def get(self) -> None:
        ref, pid, keep = self.some_ref(), self.pid(), self.random.random() < 0.5
        if ref is None:
            return
        offset = self.random.choice([0, self.random.randint(0, ref.length)])
        size = self.random.choice(
            [ref.length - offset, self.random.randint(0, ref.length - offset)]
        )
        flags = FLAGS["KEEP"] if keep else 0
        answer = self.spoken.ask(pid, "GET", ref.key, ref.length, offset, size, flags=flags)
        if ref.holder is None:
            assert answer.status == "REF_CONSUMED"
            return
        assert answer.payload == ref.content[offset : offset + size]
        ref.holder = ref.holder if keep else None

    def put(self) -> None:
        pid, size, value = self.pid(), self.size(), self.value()
        keep = self.random.random() < 0.5
        flags = FLAGS["KEEP"] if keep else 0
        answer = self.spoken.ask(pid, "PUT", payload=value * size, flags=flags)
        if self.refused(answer, pages_of(size)):
            return
        content = (value * size).ljust(pages_of(size) * PAGE, b"\0")
        self.new_ref(pid, answer.a, content, size)
        assert bool(answer.b) == keep
        if keep:
            self.new_range(pid, answer.b, content)

    def die(self) -> None:
        """End a process. Its id never comes again."""
        place = self.random.randrange(PROCESSES)
        pid, self.pids[place] = self.pids[place], max(self.pids) + 1
        self.spoken.depart(pid)
        for r in self.ranges:
            if r.pid == pid:
                r.alive = False
        for ref in self.refs:
            if ref.holder == pid:
                ref.holder = None

    # ---------------------------------------------------------------- what must hold

    def account(self, after: str) -> None:
        found = self.spoken.audit(AUDITOR)
        assert found["nr_ranges"] == sum(r.alive for r in self.ranges), after
        assert found["nr_refs"] == sum(ref.holder is not None for ref in self.refs), after

    def look_at_everything(self) -> None:
        for r in self.ranges:
            if r.alive:
                answer = self.spoken.ask(r.pid, "RREAD", r.address, len(r.content))
                assert answer.payload == r.content
        for ref in self.refs:
            if ref.holder is not None:
                pid = self.pids[0]
                answer = self.spoken.ask(
                    pid, "GET", ref.key, ref.length, 0, ref.length, flags=FLAGS["KEEP"]
                )
                assert answer.payload == ref.content[: ref.length]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_any_sequence_of_requests_behaves_like_private_copies(seed: int) -> None:
    note(f"Program({seed}).run(300)")
    Program(seed).run(300)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=1000)
def test_any_long_sequence_of_requests_behaves_like_private_copies(seed: int) -> None:
    note(f"Program({seed}).run(1000)")
    Program(seed).run(1000)

"""Random sequences of every operation on three hosts, against a plain model with private copies.

The hosts are real processes on a device so small that it runs out of frames. Whenever hypothesis
says so, and at the end of each
sequence, everything is compared: bytes of mappings and Refs, and, where a fault serves one page,
page tables and refcounts frame by
frame. At the end all hosts leave and every frame must be in the pool. What fails is shrunk and printed as a program.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dmrpc_cxl.errors import AddressSpaceFull, OutOfFrames, RefConsumed, RefTableFull
from dmrpc_cxl.fabric import device as devices
from tests.fabrics import Fabric
from tests.model_acts import (
    accept,
    attach_again,
    clone,
    create_ref,
    discard,
    drop,
    map_ref,
    move,
    ralloc,
    read,
    receive,
    rfree,
    send,
    view_ref,
    write,
)
from tests.plain_model import Handle, Mapping, Model, Pages, Snapshot, compare, longest_vacancy
from tests.standing import end

NR_FRAMES = 80
MAX_REFS = 12
HOSTS = 3
MOST_PAGES = 12
SMALL_BATCHES = ("--batch", "4", "--batch-max", "16", "--low", "0", "--high", "12",
                 "--recall-timeout", "0.1", "--log-level", "warning")  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """What a fabric of this test is like."""

    page_size: int
    reads_allocate: bool
    copy_around: int = 1

    @property
    def exact(self) -> bool:
        """Whether a fault serves one page, so that the model knows every frame."""
        return self.copy_around == 1


# -------------------------------------------------------------------- the machine


@dataclass
class Stand:
    """The fabric of a mode, used by one sequence after the other."""

    fabric: Fabric
    options: dict[str, Any]
    host_ids: list[int] = field(default_factory=list)

    def begin(self) -> None:
        self.host_ids = [
            host.call(attach_again, self.fabric.name, self.options) for host in self.fabric.hosts
        ]


WAYS = ["memoryview", "memmove", "readinto", "preadv", "recv_into"]
number = st.integers(0, 10_000)
fraction = st.floats(0, 1, exclude_max=True)
hosts = st.integers(0, HOSTS - 1)


class Operations(RuleBasedStateMachine):
    """Every operation, on the fabric and on the model."""

    stand: Stand
    mode: Mode

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(self.mode.page_size, reads_allocate=self.mode.reads_allocate)
        self.next_key = 0
        self.began = self.failed = False

    @initialize()
    def begin(self) -> None:
        self.stand.begin()
        self.device = devices.open(self.stand.fabric.name)
        self.began = True

    def call(self, host: int, function: Any, *args: Any) -> Any:
        self.failed = True  # until the rule has run to its end
        return self.stand.fabric.hosts[host].call(function, *args)

    @invariant()
    def ended(self) -> None:
        self.failed = False

    def key(self) -> int:
        self.next_key += 1
        return self.next_key

    def at_hand(self, host: int) -> int:
        """Return how many frames a host is sure to get, without what others sit on."""
        entry = self.device.host(self.stand.host_ids[host])
        return self.device.audit()["pool"] + entry["nr_free"] - entry["nr_reserved"]

    def refused(self, error: Exception, host: int, frames: int, area_pages: int = 0) -> None:
        """Check that a refusal was right, and that it changed nothing."""
        event(type(error).__name__)
        if isinstance(error, OutOfFrames):
            assert frames > self.at_hand(host), f"{frames} frames refused: {error}"
        elif isinstance(error, AddressSpaceFull):
            assert area_pages > longest_vacancy(self.device, self.stand.host_ids[host]), str(error)
        else:
            assert len(self.model.refs) + len(self.model.views()) == MAX_REFS, str(error)
        self.compare()

    def compare(self) -> None:
        if self.mode.exact:
            compare(self.model, self.device, self.stand.host_ids)
        else:
            audit = self.device.audit()
            assert audit["nr_violations"] == 0, audit["violations"]
            assert audit["live_refs"] == len(self.model.refs) + len(self.model.views())

    # ------------------------------------------------------------ mappings

    @rule(host=hosts, pages=st.floats(0.01, MOST_PAGES), kind=st.sampled_from(["zero", "lazy", "fill"]),
          seed=number)  # fmt: skip
    def ralloc(self, host: int, pages: float, kind: str, seed: int) -> None:
        size = max(1, int(pages * self.mode.page_size))
        nr = self.model.nr_pages(0, size)
        key, lazy = self.key(), kind == "lazy"
        try:
            address = self.call(host, ralloc, key, size, lazy, kind != "fill")
        except (OutOfFrames, AddressSpaceFull) as error:
            self.refused(error, host, 0 if lazy else nr, nr)
            return
        held: Pages = [None] * nr if lazy else self.model.new_frames(nr)
        mapping = Mapping(host, key, address, bytearray(size), held)
        self.model.add_mapping(mapping)
        if kind == "fill":
            self.store(mapping, 0, bytes_of(seed, size), "memoryview")

    @precondition(lambda self: self.model.mappings)
    @rule(which=number, how=st.sampled_from(["rfree", "address", "free", "forget"]))
    def rfree(self, which: int, how: str) -> None:
        mapping = self.mapping(which)
        self.call(mapping.host, rfree, mapping.key, how)
        self.model.mappings.remove(mapping)

    def mapping(self, which: int) -> Mapping:
        return self.model.mappings[which % len(self.model.mappings)]

    def piece(self, mapping: Mapping, where: float, part: float) -> tuple[int, int]:
        size = len(mapping.data)
        offset = int(where * size)
        return offset, max(1, int(part * (size - offset)))

    def store(self, mapping: Mapping, offset: int, data: bytes, how: str) -> None:
        span = self.model.span(mapping, offset, len(data))
        need = len(self.model.short_of(mapping, span))
        if need > self.at_hand(mapping.host) + mapping.reserved:
            event("a store left out: it would end the process for want of frames")
            return
        self.call(mapping.host, write, mapping.key, offset, data, how)
        self.model.write(mapping, offset, data)

    @precondition(lambda self: self.model.mappings)
    @rule(stores=st.lists(st.tuples(number, fraction, st.one_of(fraction, st.just(0.0)), st.sampled_from(WAYS)),
                          min_size=1, max_size=5), seed=number)  # fmt: skip
    def write(self, stores: list[tuple[int, float, float, str]], seed: int) -> None:
        for which, where, part, how in stores:
            mapping = self.mapping(which)
            offset, length = self.piece(mapping, where, part)
            self.store(mapping, offset, bytes_of(seed, length), how)

    @precondition(lambda self: self.model.mappings)
    @rule(which=number, where=fraction, part=fraction, kernel=st.booleans())
    def read(self, which: int, where: float, part: float, kernel: bool) -> None:
        mapping = self.mapping(which)
        self.load(mapping, *self.piece(mapping, where, part), kernel=kernel)

    def load(self, mapping: Mapping, offset: int, length: int, *, kernel: bool) -> None:
        if self.mode.reads_allocate:
            holes = self.model.holes(mapping, self.model.span(mapping, offset, length))
            if len(holes) > self.at_hand(mapping.host) + mapping.reserved:
                event("a load left out: it would end the process for want of frames")
                return
        found = self.call(mapping.host, read, mapping.key, offset, length, kernel)
        assert found == self.model.read(mapping, offset, length)

    # ------------------------------------------------------------ Refs

    @precondition(lambda self: self.model.mappings)
    @rule(which=number, where=fraction, part=fraction, whole=st.booleans(),
          how=st.sampled_from(["buffer", "view", "array", "address"]))  # fmt: skip
    def create_ref(self, which: int, where: float, part: float, whole: bool, how: str) -> None:
        mapping, key = self.mapping(which), self.key()
        piece = (0, len(mapping.data)) if whole else self.piece(mapping, where, part)
        try:
            self.call(mapping.host, create_ref, mapping.key, key, *piece, how)
        except (OutOfFrames, RefTableFull) as error:
            self.refused(error, mapping.host, 1)  # at most one overflow frame: at most 12 runs
            return
        self.model.share(mapping, *piece, Handle(mapping.host, key, ours=True))

    @precondition(lambda self: self.model.mappings)
    @rule(which=number)
    def move(self, which: int) -> None:
        mapping, key = self.mapping(which), self.key()
        try:
            self.call(mapping.host, move, mapping.key, key)
        except (OutOfFrames, RefTableFull) as error:
            self.refused(error, mapping.host, 1)
            return
        self.model.move(mapping, Handle(mapping.host, key, ours=True))

    def handle(self, which: int) -> tuple[Snapshot, Handle] | None:
        found = [(ref, handle) for ref in self.model.refs for handle in ref.handles]
        found = [(ref, handle) for ref, handle in found if not handle.stale]
        return found[which % len(found)] if found else None

    @precondition(lambda self: self.model.refs)
    @rule(which=number, to=hosts)
    def pass_on(self, which: int, to: int) -> None:
        if not (found := self.handle(which)):
            return
        ref, handle = found
        ref.wire = self.call(handle.host, send, handle.key)
        handle.exported = True
        key = self.key()
        self.call(to, receive, key, ref.wire)
        ref.handles.append(Handle(to, key, ours=False))

    @precondition(lambda self: self.model.refs)
    @rule(which=number)
    def accept(self, which: int) -> None:
        if not (found := self.handle(which)):
            return
        ref, handle = found
        if handle.ours and handle.host == ref.holder:
            return
        self.call(handle.host, accept, handle.key)
        others = [other for other in ref.handles if other is not handle]
        before = ref.holder
        self.model.accept(ref, handle)
        handle.exported = False
        if before != handle.host:
            for other in others:
                self.expect_consumed(other)

    def expect_consumed(self, handle: Handle) -> None:
        """Assert that a Ref object that is not good any more does nothing, in no way of using it."""
        with contextlib.suppress(OutOfFrames), pytest.raises(RefConsumed):
            self.call(handle.host, map_ref, handle.key, self.key(), False, False)
        with pytest.raises(RefConsumed):
            self.call(handle.host, view_ref, handle.key, self.key())
        with pytest.raises(RefConsumed):
            self.call(handle.host, clone, handle.key, self.key())
        assert self.call(handle.host, drop, handle.key) is False

    @precondition(lambda self: self.model.refs)
    @rule(which=number)
    def clone(self, which: int) -> None:
        if not (found := self.handle(which)):
            return
        (ref, handle), key = found, self.key()
        try:
            self.call(handle.host, clone, handle.key, key)
        except (OutOfFrames, RefTableFull) as error:
            self.model.accept(ref, handle)  # the one change that stays
            self.refused(error, handle.host, 1)
            return
        self.model.clone(ref, handle, Handle(handle.host, key, ours=True))

    @precondition(lambda self: self.model.refs)
    @rule(which=number)
    def drop(self, which: int) -> None:
        if not (found := self.handle(which)):
            return
        ref, handle = found
        assert self.call(handle.host, drop, handle.key) is True
        self.model.consume(ref)
        for other in ref.handles:
            self.expect_consumed(other)

    @precondition(lambda self: self.model.refs)
    @rule(which=number)
    def discard(self, which: int) -> None:
        """Garbage-collect a Ref object: it is dropped unless its bytes were handed out or it was not accepted."""
        if not (found := self.handle(which)):
            return
        ref, handle = found
        self.call(handle.host, discard, handle.key)
        ref.handles.remove(handle)
        if handle.ours and not handle.exported:
            self.model.consume(ref)

    @precondition(lambda self: self.model.refs)
    @rule(which=number, mode=st.sampled_from(["plain", "view", "view", "copy", "reserve"]))
    def map_ref(self, which: int, mode: str) -> None:
        if found := self.handle(which):
            ref, handle = found
            self.map_it(ref, handle.host, handle.key, mode)

    def map_it(self, ref: Snapshot, host: int, source: int | bytes, mode: str) -> Mapping | None:
        key, nr = self.key(), len(ref.pages)
        copy, reserve = mode == "copy", mode == "reserve"
        try:
            if mode == "view":
                address, view = self.call(host, view_ref, source, key)
            else:
                address = self.call(host, map_ref, source, key, copy, reserve)
        except (OutOfFrames, AddressSpaceFull) as error:
            ref.holder = host  # who tried keeps it, and its bytes stay good
            self.refused(error, host, nr if copy or reserve else 0, nr)
            return None
        if mode == "view":
            event("a view" if view else "no view: a mapping")
            mapping = self.model.show(ref, host, key, address, view=view)
        else:
            mapping = self.model.map(ref, host, key, address, copy=copy, reserve=reserve)
        for other in ref.handles:
            self.expect_consumed(other)
        return mapping

    # ------------------------------------------------------------ looking

    @rule()
    def look(self) -> None:
        """Compare everything; elsewhere only what an operation touched is looked at."""
        self.compare()
        for mapping in self.model.mappings:
            self.load(mapping, 0, len(mapping.data), kernel=False)

    def teardown(self) -> None:
        if self.failed or not self.began:  # hosts may be gone
            return
        self.failed = True
        self.look()
        for mapping in self.model.mappings:
            self.call(mapping.host, rfree, mapping.key, "rfree")
        self.model.mappings.clear()
        for ref in list(self.model.refs):
            handles = [handle for handle in ref.handles if not handle.stale]
            source = handles[0].key if handles else ref.wire
            mapped = self.map_it(ref, handles[0].host if handles else 0, source, "plain")
            assert mapped is not None
            self.load(mapped, 0, len(mapped.data), kernel=False)
            self.call(mapped.host, rfree, mapped.key, "rfree")
            self.model.mappings.clear()
        audit = self.device.audit()
        assert (audit["in_use"], audit["live_refs"], audit["hole_pages"]) == (0, 0, 0), audit
        self.device.close()
        self.stand.begin()  # everybody leaves and comes back
        audit = self.stand.fabric.assert_sound()
        assert audit["pool"] == audit["nr_frames"], audit
        self.failed = False


def bytes_of(seed: int, length: int) -> bytes:
    """Return bytes that look different on every page, for every seed."""
    i = np.arange(length)
    return ((seed * 37 + i * 11 + (i >> 8) * 5 + 1) % 251).astype("u1").tobytes()


class Stands:
    """The fabric of a mode. A sequence that fails may have ended its hosts: the next one gets a new fabric."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.stand: Stand | None = None

    def get(self) -> Stand:
        if self.stand is None:
            mode = self.mode
            fabric = Fabric(
                size=NR_FRAMES * mode.page_size,
                page_size=mode.page_size,
                max_refs=MAX_REFS,
                coordinator=SMALL_BATCHES,
            )
            options = {"reads_allocate": mode.reads_allocate, "copy_around": mode.copy_around}
            self.stand = Stand(fabric, options)
            for _ in range(HOSTS):
                fabric.host(**options)
        return self.stand

    def discard(self) -> None:
        if self.stand is not None:
            fabric, self.stand = self.stand.fabric, None
            end(fabric)


def run(mode: Mode, examples: int, steps: int, *, shrink: bool = True) -> None:
    stands = Stands(mode)

    class Here(Operations):
        def __init__(self) -> None:
            self.mode = mode
            self.stand = stands.get()
            super().__init__()

        def teardown(self) -> None:
            try:
                super().teardown()
            finally:
                if self.failed:
                    stands.discard()

    try:
        run_state_machine_as_test(
            Here,
            settings=settings(
                deadline=None,
                max_examples=examples,
                stateful_step_count=steps,
                # Looking for a shorter sequence takes longer than a test may: what was found would not be said.
                phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
        fabric, stands.stand = stands.get().fabric, None
        fabric.close()
    finally:
        stands.discard()


MODES = [
    Mode(4096, reads_allocate=False),
    Mode(16384, reads_allocate=False),
    Mode(4096, reads_allocate=True),
    Mode(4096, reads_allocate=False, copy_around=512),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_any_sequence_of_operations_behaves_like_private_copies(mode: Mode) -> None:
    run(mode, examples=40, steps=50, shrink=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_any_long_sequence_of_operations_behaves_like_private_copies(mode: Mode) -> None:
    run(mode, examples=1500, steps=100)

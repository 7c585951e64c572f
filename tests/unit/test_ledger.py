"""The coordinator's books against plain sets."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from dmrpc_cxl.coordinator.extents import Extents, FrameConflict, Run
from dmrpc_cxl.coordinator.ledger import Ledger, NoHostSlot, OverQuota, Policy
from dmrpc_cxl.errors import HostFenced, OutOfFrames

NR_FRAMES = 48
MAX_HOSTS = 4


def runs_of(frames):
    """Cut a set of frames into maximal runs."""
    runs: list[Run] = []
    for pfn in sorted(frames):
        if runs and runs[-1].end == pfn:
            runs[-1] = Run(runs[-1].pfn, runs[-1].count + 1)
        else:
            runs.append(Run(pfn, 1))
    return runs


def frames_of(runs):
    return [pfn for run in runs for pfn in range(run.pfn, run.end)]


# ---------------------------------------------------------------- extents


@given(st.sets(st.integers(0, NR_FRAMES - 1)))
def test_extents_are_maximal_runs_however_they_are_loaded(frames):
    whole = Extents(NR_FRAMES, runs_of(frames))
    single = Extents(NR_FRAMES, [(pfn, 1) for pfn in frames])
    assert list(whole) == list(single) == runs_of(frames)
    assert whole.total == len(frames)


@given(st.permutations(range(12)))
def test_frames_that_come_back_in_any_order_are_one_extent_again(order):
    extents = Extents(12)
    for pfn in order:
        extents.add(pfn, 1)
    assert list(extents) == [Run(0, 12)]


@given(
    st.sets(st.integers(0, NR_FRAMES - 1)), st.integers(0, NR_FRAMES - 1), st.integers(1, NR_FRAMES)
)
def test_missing_is_what_a_run_would_add(frames, pfn, count):
    assume(pfn + count <= NR_FRAMES)
    extents = Extents(NR_FRAMES, runs_of(frames))
    assert extents.missing(pfn, count) == runs_of(set(range(pfn, pfn + count)) - frames)
    assert (pfn in extents) == (pfn in frames)


@given(
    st.sets(st.integers(0, NR_FRAMES - 1), min_size=1),
    st.integers(0, NR_FRAMES - 1),
    st.integers(1, NR_FRAMES),
)
def test_a_run_that_overlaps_the_set_is_refused_whole(frames, pfn, count):
    assume(pfn + count <= NR_FRAMES and frames & set(range(pfn, pfn + count)))
    extents = Extents(NR_FRAMES, runs_of(frames))
    with pytest.raises(FrameConflict):
        extents.add(pfn, count)
    assert list(extents) == runs_of(frames)
    assert extents.total == len(frames)


@pytest.mark.parametrize(("pfn", "count"), [(-1, 2), (0, 0), (0, -1), (47, 2), (48, 1), (0, 49)])
def test_frames_that_the_device_does_not_have_are_refused(pfn, count):
    with pytest.raises(FrameConflict):
        Extents(NR_FRAMES).add(pfn, count)
    with pytest.raises(FrameConflict):
        Extents(NR_FRAMES, [(pfn, count)])
    with pytest.raises(FrameConflict):
        Extents(NR_FRAMES).missing(pfn, count)


def test_runs_that_overlap_cannot_be_loaded():
    with pytest.raises(FrameConflict):
        Extents(NR_FRAMES, [(0, 4), (3, 2)])


def test_a_run_is_cut_from_the_smallest_extent_that_is_long_enough():
    extents = Extents(NR_FRAMES, [(0, 20), (24, 6), (32, 4)])
    assert extents.take(5) == [Run(24, 5)]
    assert list(extents) == [Run(0, 20), Run(29, 1), Run(32, 4)]


def test_without_an_extent_long_enough_the_longest_go_first_and_the_rest_fits_best():
    extents = Extents(NR_FRAMES, [(0, 8), (10, 3), (20, 10), (40, 2)])
    assert extents.take(20) == [Run(20, 10), Run(0, 8), Run(40, 2)]
    assert list(extents) == [Run(10, 3)]


def test_nothing_is_taken_when_no_extent_has_the_run_asked_for():
    extents = Extents(NR_FRAMES, [(0, 8), (10, 8)])
    assert extents.take(9, min_run=9) == []
    assert extents.total == 16


def test_a_grant_has_no_more_runs_than_allowed():
    extents = Extents(NR_FRAMES, [(pfn, 1) for pfn in range(0, NR_FRAMES, 2)])
    assert len(extents.take(NR_FRAMES, max_runs=3)) == 3


# ---------------------------------------------------------------- the ledger as a whole


class LedgerMachine(RuleBasedStateMachine):
    """Hosts come, get frames, give some back, pass some on, die; a dict of sets says who has what."""

    hosts = Bundle("hosts")

    @initialize(pool=st.sets(st.integers(0, NR_FRAMES - 1)))
    def start(self, pool):
        """Begin on a device where some frames are free and the others somebody's we know nothing of."""
        self.ledger = Ledger.from_device(NR_FRAMES, MAX_HOSTS, runs_of(pool))
        self.pool = set(pool)
        self.elsewhere = set(range(NR_FRAMES)) - pool
        self.held = {}

    @precondition(lambda self: len(self.held) < MAX_HOSTS)
    @rule(target=hosts, incarnation=st.integers(1))
    def come(self, incarnation):
        account = self.ledger.open(incarnation, "", self.ledger.negotiate())
        assert account.host not in self.held
        self.held[account.host] = set()
        return account

    @precondition(lambda self: len(self.held) == MAX_HOSTS)
    @rule()
    def come_too_late(self):
        with pytest.raises(NoHostSlot):
            self.ledger.open(1, "", self.ledger.negotiate())

    @rule(account=hosts, want=st.integers(1, NR_FRAMES), min_run=st.integers(1, NR_FRAMES))
    def get(self, account, want, min_run):
        longest = max((run.count for run in runs_of(self.pool)), default=0)
        want = max(want, min_run)
        if longest < min_run:
            with pytest.raises(OutOfFrames):
                self.ledger.grant(account, want, min_run)
            return
        runs = self.ledger.grant(account, want, min_run)
        frames = frames_of(runs)
        assert len(frames) == len(set(frames)) == min(want, len(self.pool))
        assert set(frames) <= self.pool, "a frame was granted twice"
        assert runs[0].count >= min_run
        assert (len(runs) == 1) == (longest >= len(frames))
        self.pool -= set(frames)
        self.held[account.host] |= set(frames)

    @rule(account=hosts, data=st.data())
    def give_back(self, account, data):
        held = self.held[account.host]
        assume(held)
        frames = data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1))
        assert self.ledger.give_back(account, runs_of(frames), len(frames)) == len(frames)
        held -= frames
        self.pool |= frames

    @rule(giver=hosts, taker=hosts, data=st.data())
    def pass_on(self, giver, taker, data):
        """Frames travel inside Refs; the ledger does not see it."""
        held = self.held[giver.host]
        assume(held)
        frames = data.draw(st.sets(st.sampled_from(sorted(held)), min_size=1))
        held -= frames
        self.held[taker.host] |= frames

    @rule(account=hosts, data=st.data())
    def give_back_what_is_in_the_pool(self, account, data):
        assume(self.pool)
        pfn = data.draw(st.sampled_from(sorted(self.pool)))
        with pytest.raises(FrameConflict):
            self.ledger.give_back(account, [Run(pfn, 1)], 1)

    @rule(account=consumes(hosts))
    def die(self, account):
        self.ledger.bury(account.host)
        with pytest.raises(HostFenced):
            self.ledger.account(account.host, account.incarnation)
        frames = self.held.pop(account.host)
        assert self.ledger.found(runs_of(frames)) == len(frames)
        self.pool |= frames
        self.ledger.release(account.host)

    @invariant()
    def the_pool_is_what_nobody_has(self):
        if not hasattr(self, "ledger"):
            return
        extents = self.ledger.pool
        assert list(extents) == runs_of(self.pool)
        assert extents.total == len(self.pool)
        assert extents.longest == max((run.count for run in extents), default=0)
        everywhere = [self.pool, self.elsewhere, *self.held.values()]
        assert sum(map(len, everywhere)) == NR_FRAMES

    def teardown(self):
        """When all frames have come back there is one extent."""
        if not hasattr(self, "ledger"):
            return
        for frames in self.held.values():
            self.ledger.found(runs_of(frames))
        self.ledger.found(runs_of(self.elsewhere))
        assert list(self.ledger.pool) == [Run(0, NR_FRAMES)]


TestLedger = LedgerMachine.TestCase


# ---------------------------------------------------------------- watermarks and limits


@given(
    st.integers(1, 1 << 28),
    st.integers(0, 63),
    st.tuples(*[st.integers(0, (1 << 32) - 1)] * 3),
)
def test_watermarks_can_be_lived_with_whatever_is_wished_for(nr_frames, others, wishes):
    ledger = Ledger.from_device(nr_frames, 64, [(0, nr_frames)])
    for incarnation in range(others):
        ledger.open(incarnation, "", ledger.negotiate())
    marks = ledger.negotiate(*wishes)
    assert 0 <= marks.low < marks.high
    assert 1 <= marks.batch <= marks.high
    assert marks.batch <= marks.batch_max
    assert marks.high <= max(1, nr_frames // 8)


def test_a_large_device_gives_the_defaults():
    marks = Ledger.from_device(1 << 20, 64, []).negotiate()
    assert (marks.low, marks.high, marks.batch, marks.batch_max) == (64, 1024, 256, 8192)


def test_the_share_of_a_host_shrinks_when_many_are_live():
    ledger = Ledger.from_device(4096, 64, [])
    alone = ledger.negotiate().high
    for incarnation in range(32):
        ledger.open(incarnation, "", ledger.negotiate())
    assert alone == 512
    assert ledger.negotiate().high == 4096 // 66


def limited(limit, pool=NR_FRAMES):
    ledger = Ledger.from_device(NR_FRAMES, MAX_HOSTS, [(0, pool)], Policy(frame_limit=limit))
    return ledger, ledger.open(1, "", ledger.negotiate())


def test_a_host_gets_frames_up_to_its_limit_and_again_after_it_returned_some():
    ledger, account = limited(10)
    assert ledger.grant(account, 8) == [Run(0, 8)]
    assert ledger.grant(account, 8) == [Run(8, 2)]
    with pytest.raises(OverQuota):
        ledger.grant(account, 1)
    ledger.give_back(account, [Run(0, 4)], 4)
    assert ledger.grant(account, 8) == [Run(0, 4)]


def test_a_run_beyond_the_limit_is_refused_and_nothing_is_granted():
    ledger, account = limited(10)
    with pytest.raises(OverQuota):
        ledger.grant(account, 11, min_run=11)
    assert ledger.pool.total == NR_FRAMES


def test_returning_the_frames_of_others_earns_no_credit():
    ledger, account = limited(10, pool=24)
    ledger.give_back(account, [Run(24, 24)], 24)
    assert sum(run.count for run in ledger.grant(account, NR_FRAMES)) == 10


def test_a_host_that_lives_on_after_a_restart_has_its_slot_and_the_dead_keep_theirs():
    ledger = Ledger.from_device(NR_FRAMES, MAX_HOSTS, [])
    ledger.readmit(1, 11, "live", alive=True, owned=3)
    ledger.readmit(3, 13, "dead", alive=False, owned=0)
    assert ledger.account(1, 11).charged == 3
    for slot, incarnation in [(1, 12), (3, 13), (2, 0), (99, 11)]:
        with pytest.raises(HostFenced):
            ledger.account(slot, incarnation)
    assert [ledger.open(20, "", ledger.negotiate()).host for _ in range(2)] == [2, 4]
    with pytest.raises(NoHostSlot):
        ledger.open(22, "", ledger.negotiate())
    ledger.release(3)
    assert ledger.open(23, "", ledger.negotiate()).host == 3


def test_frames_that_could_not_be_handed_over_are_no_longer_counted_as_granted():
    ledger, account = limited(10)
    ledger.grant(account, 8)
    ledger.lost(account, 3)
    assert (account.granted, account.charged) == (5, 5)
    assert (ledger.totals.frames_granted, ledger.totals.frames_lost) == (5, 3)

"""Frames between the coordinator's pool and hosts: grants, returns, lies, shortage, recalls."""

import random

import pytest

from dmrpc_cxl.coordinator.ledger import OverQuota, Run
from dmrpc_cxl.coordinator.messages import Status
from dmrpc_cxl.coordinator.refusals import Refused
from dmrpc_cxl.errors import OutOfFrames
from tests.coordinators import (
    POOL,
    Raw,
    coordinated,
    frames_of,
    give_back,
    grant,
)
from tests.fabrics import At, HostProcess


@pytest.fixture
def fabric(tmp_path):
    with coordinated(tmp_path, "--recall-timeout", "0.2") as fabric:
        yield fabric


def test_a_grant_has_changed_the_words_when_its_answer_arrives(fabric):
    host = fabric.host()
    runs = host.call(grant, 100)
    assert runs == [Run(0, 100)]
    assert fabric.owners(runs) == {1}
    assert fabric.device.free_runs(POOL) == [(100, fabric.nr_frames - 100)]


def test_a_grant_may_hold_fewer_frames_than_wanted_and_never_none(fabric):
    host = fabric.host()
    assert sum(run.count for run in host.call(grant, 2 * fabric.nr_frames)) == fabric.nr_frames
    with pytest.raises(OutOfFrames):
        host.call(grant, 1)


def test_a_grant_of_nothing_is_a_bad_request(fabric):
    with pytest.raises(Refused) as caught:
        fabric.host().call(grant, 0)
    assert caught.value.status is Status.BAD_REQUEST


def test_a_run_is_granted_whole_or_nothing_is(fabric):
    host = fabric.host()
    runs = host.call(grant, fabric.nr_frames)
    host.call(give_back, [Run(0, 10), Run(20, 30), Run(60, 5)])
    with pytest.raises(OutOfFrames):
        host.call(grant, 31, min_run=31)
    assert fabric.stats()["pool"]["free"] == 45
    assert host.call(grant, 25, min_run=25) == [Run(20, 25)]
    assert host.call(grant, 12, min_run=6) == [Run(0, 10), Run(45, 2)]
    assert frames_of(runs) == list(range(fabric.nr_frames))


def test_returned_frames_coalesce_and_are_granted_again(fabric):
    host, other = fabric.host(), fabric.host()
    runs = host.call(grant, 64)
    pieces = [Run(pfn, 4) for pfn in range(0, 64, 4)]
    random.Random(7).shuffle(pieces)
    for piece in pieces:
        host.call(give_back, [piece])
    assert fabric.stats()["pool"]["extents"] == 1
    assert other.call(grant, 64) == runs
    assert fabric.owners(runs) == {2}


def test_a_host_may_not_hold_more_frames_than_its_limit(tmp_path):
    with coordinated(tmp_path, "--frame-limit", "50") as fabric:
        host, other = fabric.host(), fabric.host()
        runs = host.call(grant, 64)
        assert sum(run.count for run in runs) == 50
        with pytest.raises(OverQuota):
            host.call(grant, 1)
        assert fabric.device.host(1)["frame_limit"] == 50
        assert sum(run.count for run in other.call(grant, 50)) == 50
        host.call(give_back, [Run(0, 10)])
        assert sum(run.count for run in host.call(grant, 64)) == 10


# ---------------------------------------------------------------- lies


def say_returned(raw: Raw, runs: list[Run]) -> None:
    raw.client.give_back(runs)


def only_words(raw: Raw, runs: list[Run]) -> None:
    raw.return_words(runs)


def test_a_return_that_is_repeated_counts_once(fabric):
    host, other = fabric.host(), fabric.host()
    runs = host.call(grant, 40)
    host.call(give_back, runs)
    host.call(say_returned, runs)
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames
    assert other.call(grant, 40) == runs
    host.call(say_returned, runs)  # they are another host's by now
    assert fabric.owners(runs) == {2}
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - 40


def test_frames_whose_words_name_somebody_are_not_taken_whoever_returns_them(fabric):
    host, other = fabric.host(), fabric.host()
    mine, theirs = host.call(grant, 10), other.call(grant, 10)
    host.call(say_returned, mine + theirs)
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - 20
    assert fabric.stats()["totals"]["frames_not_counted"] == 20
    assert (fabric.owners(mine), fabric.owners(theirs)) == ({1}, {2})


def test_of_a_return_only_what_is_true_counts(fabric):
    host = fabric.host()
    runs = host.call(grant, 30)
    host.call(only_words, [Run(5, 5), Run(20, 5)])
    host.call(say_returned, [Run(0, 12), Run(8, 22), Run(0, 100)])  # some are named three times
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - 20
    assert fabric.owners(runs) == {POOL, 1}


@pytest.mark.parametrize(
    "runs",
    [
        [Run(0, 0)],
        [Run(1023, 2)],
        [Run(2**32 - 1, 1)],
        [Run(0, 2**32 - 1)],
        [Run(0, 1024), Run(0, 1)],
        [Run(0, 5), Run(2000, 1)],
    ],
)
def test_a_return_of_frames_that_do_not_exist_is_refused_whole(fabric, runs):
    host = fabric.host()
    host.call(grant, 10)
    host.call(only_words, [Run(0, 5)])
    with pytest.raises(Refused) as caught:
        host.call(say_returned, runs)
    assert caught.value.status is Status.BAD_REQUEST
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - 10


# ---------------------------------------------------------------- shortage


def test_frames_of_a_return_that_never_arrived_are_found_when_the_pool_is_short(fabric):
    host, other = fabric.host(), fabric.host()
    host.call(grant, fabric.nr_frames)
    host.call(only_words, [Run(100, 7)])
    assert fabric.stats()["pool"]["free"] == 0
    assert other.call(grant, 50) == [Run(100, 7)]
    assert fabric.stats()["totals"]["frames_found"] == 7


def test_who_needs_frames_gets_those_of_a_host_that_dies_meanwhile(fabric):
    host, other = fabric.host(), fabric.host()
    host.call(grant, fabric.nr_frames)
    host.kill()
    fabric.host_died()
    assert other.call(grant, fabric.nr_frames) == [Run(0, fabric.nr_frames)]


def hold(at: At, nr_frames: int, apart: int = 0) -> None:
    at.buffer = at.host.ralloc((nr_frames - apart) * 4096)
    at.apart = at.host.ralloc(apart * 4096) if apart else None


def let_go(at: At) -> None:
    # The frames are free, and the host's; what is above its high watermark it gives back.
    del at.buffer


def let_go_apart(at: At) -> None:
    del at.apart


@pytest.fixture
def sitting(fabric):
    """Make a real host that sits on all frames but 24, which are a raw host's."""
    small = fabric.host()
    small.call(grant, 24)
    host = HostProcess(fabric.name, {"low": 8, "high": 1024})
    try:
        yield host, small
    finally:
        host.leave()


def test_a_host_that_sits_on_free_frames_is_asked_for_some_when_another_has_none(fabric, sitting):
    host, small = sitting
    host.call(hold, fabric.nr_frames - 24, 60)
    with pytest.raises(OutOfFrames):
        small.call(grant, 16)
    host.call(let_go_apart)  # fewer than its high watermark: it keeps them unless it is asked
    assert sum(run.count for run in small.call(grant, 16)) > 0
    fabric.coordinator.logged(r"asked host 2 for \d+ free frames")


def test_a_long_run_is_put_together_from_what_hosts_sit_on(fabric, sitting):
    host, small = sitting
    host.call(hold, fabric.nr_frames - 24)
    host.call(let_go)
    assert small.call(grant, 256, min_run=256)[0].count == 256


def sit(raw: Raw) -> None:
    raw.client.grant(1 << 20)


def test_who_cannot_be_helped_is_refused_after_a_bounded_time(fabric):
    host, other = fabric.host(), fabric.host()
    host.call(sit)
    with pytest.raises(OutOfFrames, match="the pool has 0 of 1024 frames"):
        other.call(grant, 1)
    assert fabric.stats()["totals"]["grants_refused"] == 1


# ---------------------------------------------------------------- all at once


def trade(raw: Raw, seed: int, rounds: int) -> list[int]:
    """Get and return frames at random; check each time that they are ours alone."""
    rng = random.Random(seed)
    held: set[int] = set()
    for _ in range(rounds):
        if held and rng.random() < 0.5:
            back = rng.sample(sorted(held), rng.randint(1, len(held)))
            runs = [Run(pfn, 1) for pfn in back]
            raw.return_words(runs)
            raw.client.give_back(runs)
            held -= set(back)
        else:
            want = rng.randint(1, 200)
            try:
                got = frames_of(raw.client.grant(want, rng.choice([0, 0, 1, 2, want])))
            except OutOfFrames:
                continue
            assert not held & set(got)
            assert all(raw.device.frame(pfn)[:2] == (0, raw.registered.host) for pfn in got)
            held |= set(got)
    return sorted(held)


def test_hosts_that_trade_at_random_and_die_never_share_a_frame_and_lose_none(fabric):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    hosts = [fabric.host() for _ in range(4)]
    for number, host in enumerate(hosts):
        host.start(trade, seed + number, 150)
    held = [host.result() for host in hosts]
    everything = [pfn for frames in held for pfn in frames]
    assert len(everything) == len(set(everything))
    assert fabric.stats()["pool"]["free"] == fabric.nr_frames - len(everything)
    for number, host in enumerate(hosts):
        host.start(trade, seed - number, 10_000)
    hosts[0].kill()
    hosts[1].kill()
    fabric.host_died(times=2)
    assert fabric.stats()["pool"]["free"] <= fabric.nr_frames

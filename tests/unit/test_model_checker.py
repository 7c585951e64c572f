"""The model of the protocol (docs/model): it holds, it goes where it must, and it finds mistakes.

`make check-model` explores all scenarios; here are the smallest of them, and every seeded mistake.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

from docs.model import check
from docs.model.explore import Result, TooMany, canonical, explore, initial, orbit, renumbered
from docs.model.invariants import describe
from docs.model.scenarios import CHECKED, MISTAKES, MOVED, ONE_REF, SENT, TWO_SHARE, VIEWED
from docs.model.state import Config
from docs.model.steps import NAMES, TEXTS

SMALL = Config(
    "two stores", frames=3, refs=1, frames_at=(1, 1, 2), setup=TWO_SHARE, ops=1, menu=("store",)
)
BY_NAME = {config.name: config for config in CHECKED}
HOMECOMINGS = ("a run goes home", "home, three hosts")


@cache
def explored(name: str) -> Result:
    """Explore one of the scenarios, once for all tests."""
    return explore(BY_NAME[name])


@pytest.mark.parametrize("config", MISTAKES, ids=lambda config: config.bug)
def test_a_seeded_mistake_is_found_with_the_path_to_it(config: Config) -> None:
    result = explore(config, limit=400_000)
    assert result.error
    assert len(result.trace) > 2
    assert result.trace[0][0] == "the beginning"


@pytest.mark.parametrize(
    "name", ["two copies at once", "one Ref, two deaths", "supply", *HOMECOMINGS]
)
def test_the_protocol_holds_in_every_state(name: str) -> None:
    result = explored(name)
    assert not result.error
    assert result.at_rest > 0


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        ((), "f0: count 0, owner h1"),
        (ONE_REF, "f0: count 2, owner h1, bytes 0;.*Ref 0: LIVE of h1, frames .0."),
        (TWO_SHARE, "f0: count 2, owner h1, bytes 0;.*mapping 0 .PTE 0 shows 0.*mapping 0 .PTE 0"),
        (MOVED, "f0: count 1,.*Ref 0: LIVE of h1 exclusive"),
        (
            SENT,
            "f0: count 0, owner h1, coming, bytes 7;.*h1: active, free .1.\nh2: active, free .2.",
        ),
        (VIEWED, "f0: count 1,.*Ref 0: LIVE of h2 exclusive.*view exclusive .PTE - shows 0"),
    ],
)
def test_what_an_exploration_begins_with(setup: tuple[tuple[int, str], ...], told: str) -> None:
    text = describe(initial(replace(SMALL, setup=setup)))
    assert re.search(told, text, re.DOTALL), text
    assert ("Ref 0" in text) == (setup not in ((), TWO_SHARE, SENT))


def test_two_simultaneous_copies_race_for_the_last_count() -> None:
    sights = explore(SMALL).sights
    assert "two hosts at once before cow.down" in sights
    assert "two hosts at once before cow.copy" in sights


def test_a_frame_is_taken_back_at_the_moment_when_its_home_takes_it_in() -> None:
    sights = explored("a run goes home").sights
    for who in ("a frame is taken back", "recovery takes a frame back"):
        assert f"{who} while home, another process by now, takes it in" in sights
    assert "a frame is taken back while home is reclaimed" in sights


def test_both_ends_are_killed_before_each_step_of_the_way_home() -> None:
    steps = {NAMES[i] for i in range(1, len(NAMES))
             if NAMES[i].startswith(("home.", "recover.home")) and not TEXTS[i].startswith("BUG")}  # fmt: skip
    assert {"home.word", "home.back", "recover.home", "recover.home back"} < steps
    assert steps <= explored("a run goes home").crashed_at


def test_a_host_is_killed_before_each_step_of_a_copy() -> None:
    steps = {name for name in NAMES if name.startswith("cow.")}
    seeded = {"cow.down early", "cow.look", "cow.blind"}
    assert steps - seeded <= explore(SMALL).crashed_at


def test_recovery_is_killed_before_each_of_the_steps_that_it_takes() -> None:
    killed = explored("one Ref").crashed_at
    for step in ("settle", "settled", "refs", "drop", "drop progress", "drop count", "dropped",
                 "pages", "page count", "take", "end"):  # fmt: skip
        assert f"recover.{step}" in killed


def test_each_step_of_the_protocol_is_one_that_somebody_is_killed_before() -> None:
    killed: set[str] = set()
    for name in ("from nothing", "one Ref", "a view", "supply", "a run goes home"):
        killed |= explored(name).crashed_at
    # Steps of mistakes say BUG. back.store is one of two ways on from map.place.
    steps = {NAMES[i] for i in range(1, len(NAMES)) if not TEXTS[i].startswith("BUG")}
    assert steps - killed == {"back.store"}


def test_renumbering_hosts_leaves_a_state_in_its_orbit() -> None:
    w = initial(SMALL)
    mirrored = initial(SMALL)
    mirrored.b = bytearray(renumbered(w, [2, 1]))
    assert mirrored.b != w.b
    assert orbit(mirrored) == orbit(w)
    assert canonical(mirrored) == canonical(w)


def test_an_exploration_that_grows_too_big_says_so() -> None:
    with pytest.raises(TooMany, match="more than 100 states"):
        explore(replace(SMALL, ops=2), limit=100)


def test_the_command_line_explores_what_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--frames", "3", "--refs", "1", "--ops", "1", "--menu", "store"]
    assert check.main([*words, "--coordinator-crashes", "0"]) == 0
    assert "states" in capsys.readouterr().out
    assert check.main([*words, "--bug", "drop before copy"]) == 1
    told = capsys.readouterr().out
    assert "WRONG: " in told
    assert "BUG: drops the count of the old frame too early" in told


def test_an_unknown_mistake_is_refused() -> None:
    with pytest.raises(SystemExit):
        check.main(["--bug", "no such mistake"])

"""What is explored by `make check-model`, the bigger ones of `make model`, and the mistakes.

A mistake is a small change of the protocol that looks harmless. The checker must find each in the
scenario named with it; if it did not, its silence about the real protocol would say nothing.
"""

from __future__ import annotations

from dataclasses import replace

from .state import Config

EVERYTHING = (
    "ralloc", "rfree", "share", "move", "map", "view", "store", "drop", "accept", "clone",
)  # fmt: skip
SUPPLY = ("grant", "return", "ralloc", "rfree")
MAPPED = ((1, "begins ralloc"),)
"""Host 1 has a mapping that nobody shares."""
ONE_REF = ((1, "begins ralloc"), (1, "begins create_ref of"))
"""Host 1 has a mapping, and a Ref of it that it holds."""
TWO_SHARE = (*ONE_REF, (2, "begins map"))
"""Hosts 1 and 2 map the same frame, read-only."""
MOVED = ((1, "begins ralloc"), (1, "begins create_ref(move)"))
"""Host 1 holds an exclusive Ref."""
VIEWED = (*MOVED, (2, "begins view"))
"""Host 2 views a Ref that was exclusive."""
SENT = (*MOVED, (2, "begins drop"))
"""A frame is coming home to host 1."""

CHECKED = (
    Config("from nothing", frames=2, frames_at=(1, 2), menu=EVERYTHING, coordinator_crashes=1),
    Config(
        "an exclusive mapping", frames=3, frames_at=(1, 1, 2), setup=MAPPED,
        menu=("rfree", "share", "move", "map", "store", "drop"),
    ),
    Config(
        "two copies at once", frames=3, refs=1, frames_at=(1, 1, 2), setup=TWO_SHARE, ops=2,
        menu=("store", "rfree", "share"), crashes=2, coordinator_crashes=1,
    ),
    Config(
        "one Ref", frames=2, frames_at=(1, 2), setup=ONE_REF, ops=1, menu=EVERYTHING,
        coordinator_crashes=1, failures=True,
    ),
    Config(
        "one Ref, two deaths", frames=2, frames_at=(1, 2), setup=ONE_REF, ops=1,
        menu=("rfree", "map", "drop", "accept", "view"), crashes=2, restarts=1, failures=True,
    ),
    Config(
        "one Ref, three hosts", hosts=3, frames=2, frames_at=(1, 2), setup=ONE_REF, ops=1,
        menu=("rfree", "map", "drop", "accept", "store"), restarts=1, failures=True,
    ),
    Config(
        "an exclusive Ref", frames=2, frames_at=(1, 2), setup=MOVED,
        menu=("map", "view", "store", "drop", "clone"),
    ),
    Config(
        "a view", frames=2, frames_at=(1, 2), setup=VIEWED,
        menu=("rfree", "share", "move", "map", "store", "drop"),
    ),
    Config(
        "two pages", frames=4, pages=2, frames_at=(1, 1, 2, 2), setup=TWO_SHARE, ops=1,
        menu=("rfree", "share", "move", "map", "store", "drop", "clone"), coordinator_crashes=1,
    ),
    Config(
        "frames go home", frames=2, refs=1, frames_at=(1, 2), setup=MOVED,
        menu=("ralloc", "rfree", "move", "map", "view", "drop"), crashes=2,
        coordinator_crashes=1, restarts=1,
    ),
    Config(
        "a run goes home", frames=2, refs=1, pages=2, frames_at=(1, 1), setup=MOVED,
        menu=("ralloc", "rfree", "move", "view", "drop"), crashes=2, coordinator_crashes=1,
        restarts=1,
    ),
    Config(
        "home, three hosts", hosts=3, frames=2, refs=1, frames_at=(1, 2), setup=MOVED, ops=1,
        menu=("ralloc", "move", "drop"), crashes=2, restarts=1,
    ),
    Config(
        "home, three hosts, all ways", hosts=3, frames=2, refs=1, frames_at=(1, 2), setup=MOVED,
        ops=1, menu=("ralloc", "rfree", "view", "map", "drop", "accept", "move"), crashes=2,
        coordinator_crashes=1, restarts=1,
    ),
    Config(
        "home and supply", frames=2, refs=1, frames_at=(1,), setup=MOVED,
        menu=("ralloc", "move", "drop", "grant", "return"), crashes=1, coordinator_crashes=1,
        restarts=1,
    ),
    Config(
        "supply", frames=2, refs=1, ops=3, menu=SUPPLY, coordinator_crashes=1,
    ),
)  # fmt: skip

_BY_NAME = {config.name: config for config in CHECKED}
_COPIES, _REF = _BY_NAME["two copies at once"], _BY_NAME["one Ref"]
_DEATHS, _PAGES = _BY_NAME["one Ref, two deaths"], _BY_NAME["two pages"]
_THREE, _EXCLUSIVE = _BY_NAME["one Ref, three hosts"], _BY_NAME["an exclusive Ref"]
_HOME, _RUN = _BY_NAME["frames go home"], _BY_NAME["a run goes home"]
_SUPPLY = _BY_NAME["supply"]
_START = _BY_NAME["from nothing"]

MISTAKES = tuple(
    replace(config, name=f"{config.name}, with a mistake", bug=bug)
    for bug, config in (
        ("drop before copy", _COPIES),
        ("decide by a look", _COPIES),
        ("uncount before unmap", _COPIES),
        ("repoint after the drop", _COPIES),
        ("copy progress after count", _COPIES),
        ("upgrade a shared page", _COPIES),
        ("protect last", _BY_NAME["an exclusive mapping"]),
        ("publish before counts", _START),
        ("share progress first", _START),
        ("move without intent", _START),
        ("accept keeps generation", _REF),
        ("accept by a store", _THREE),
        ("put back without a second look", _DEATHS),
        ("put back to the old holder", _DEATHS),
        ("map writable", _START),
        ("map progress first", _PAGES),
        ("drop progress after count", _REF),
        ("clone keeps exclusive", _EXCLUSIVE),
        ("view keeps generation", _EXCLUSIVE),
        ("recovery is not idempotent", _REF),
        ("recovery drops twice", _REF),
        ("recovery drops from the start", _REF),
        ("recovery takes Refs by a store", _REF),
        ("reclaim any free frame", _REF),
        ("send home under the intent", _HOME),
        ("no look behind the words", _HOME),
        ("take back by a store", _HOME),
        ("take in by a store", _HOME),
        ("recovery leaves what was sent", _RUN),
        ("look before rejoining", _SUPPLY),
        ("return before the word", _SUPPLY),
        ("return not looked at", _SUPPLY),
    )
)

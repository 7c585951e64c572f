"""When map_ref fails, the Ref is put back (map.c); and how it should not be."""

from __future__ import annotations

from .refs import claim
from .state import (
    DROPPING,
    INCARNATION,
    LIVE,
    R_EXCL,
    R_HOLDER,
    R_STATE,
    REF,
    TRUE_HOLDER,
    W_EXCL,
    W_HOLDER,
    World,
)  # fmt: skip
from .steps import step

TO_OLD_HOLDER = ("put back to the old holder", "put back without a second look")


@step("back.store")
def back_store(w: World, h: int) -> str:
    """map_ref fails: MAPPING -> LIVE of the same generation, held by who tried"""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_STATE], b[r + R_EXCL] = LIVE, b[o + W_EXCL]
    return ""


def lives(w: World, h: int) -> bool:
    """Tell whether the host that held the Ref before is active, in the incarnation of then."""
    o, b = w.hosts[h], w.b
    return bool(b[o + INCARNATION]) and w.active(b[o + W_HOLDER])


@step("map.incarnation")
def map_incarnation(w: World, h: int) -> str:
    """BUG: remembers which incarnation of its host held the Ref."""
    w.b[w.hosts[h] + INCARNATION] = 1
    return "map.place"


@step("back.look")
def back_look(w: World, h: int) -> str:
    """BUG: looks whether the host lives that held the Ref before, to put it back there."""
    if w.b[w.hosts[h] + W_HOLDER] == h:
        return "back.store"
    return "back.store old" if lives(w, h) else "back.drop"


@step("back.store old")
def back_store_old(w: World, h: int) -> str:
    """BUG: puts the Ref back: LIVE, with its holder of before."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_STATE], b[r + R_HOLDER], b[r + R_EXCL] = LIVE, b[o + W_HOLDER], b[o + W_EXCL]
    return "back.look again" if w.bug == "put back to the old holder" else ""


@step("back.look again")
def back_look_again(w: World, h: int) -> str:
    """BUG: looks again: was it declared dead between the look and the store?"""
    o, b = w.hosts[h], w.b
    if not lives(w, h):
        return "back.swap"
    if not b[o + TRUE_HOLDER]:
        w.wrong(f"host {h} gave Ref {b[o + REF] - 1} to another host than held it before")
    return ""


@step("back.swap")
def back_swap(w: World, h: int) -> str:
    """BUG: then takes it again, by compare-and-swap against recovery: LIVE -> DROPPING."""
    o, b = w.hosts[h], w.b
    return "drop.intent" if claim(w, h, b[o + REF] - 1, DROPPING) else ""


@step("back.drop")
def back_drop(w: World, h: int) -> str:
    """BUG: lets the Ref die with its holder: MAPPING -> DROPPING."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_STATE], b[r + R_HOLDER], b[r + R_EXCL] = DROPPING, h, 0
    return "drop.intent"

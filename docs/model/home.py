"""Frames go home: to the host that made the exclusive Ref they came in (home.c).

The run is free, its words are (0, this host), it is on no list, and the intent of whatever freed it
has ended. The hints that are left for home have no state of their own: it may find a frame that is
coming at any time while nobody works under its lock, so a hint that is lost costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .pages import freed, next_page
from .state import (
    AT,
    COMING,
    COUNT,
    FREE_LIST,
    HOME,
    I_HOME,
    I_NEW,
    I_NR,
    I_OP,
    MAX_PAGES,
    NEW,
    NR,
    OLD,
    OWNER,
    PC,
    SEND_HOME,
    World,
)  # fmt: skip
from .steps import NUMBERS, step

# ---------------------------------------------------------------- who hands over


@step("home.intent", local=True)
def home_intent(w: World, h: int) -> str:
    """The intent HOME is written."""
    o, b = w.hosts[h], w.b
    w.end_intent(h)
    b[o + I_OP], b[o + I_HOME], b[o + I_NR] = SEND_HOME, b[o + HOME], b[o + NR]
    b[o + I_NEW : o + I_NEW + MAX_PAGES] = b[o + NEW : o + NEW + MAX_PAGES]
    return "home.word"


@step("home.word")
def home_word(w: World, h: int) -> str:
    """The word of a frame goes to (0, home, coming)."""
    o, b = w.hosts[h], w.b
    w.send(b[o + NEW + b[o + AT]] - 1, h, b[o + HOME])
    then = "home.end" if w.bug == "no look behind the words" else "home.look"
    return next_page(w, h, "home.word", then)


@step("home.look")
def home_look(w: World, h: int) -> str:
    """Is there somebody at home? If not, what nobody else has taken is taken back."""
    o, b = w.hosts[h], w.b
    return "home.end" if w.active(b[o + HOME]) else "home.back"


def on_its_way(w: World, frame: int, home: int) -> bool:
    """Tell whether a frame is on its way to this home, and nobody has it yet."""
    f, b = w.frames[frame], w.b
    return bool(not b[f + COUNT] and b[f + OWNER] == home and b[f + COMING])


@step("home.back")
def home_back(w: World, h: int) -> str:
    """Compare-and-swap: (0, home, coming) -> (0, this host); the frame goes to the free list."""
    o, b = w.hosts[h], w.b
    frame = b[o + NEW + b[o + AT]] - 1
    if on_its_way(w, frame, b[o + HOME]):
        if w.bug == "take back by a store":
            return "home.back blindly"
        b[w.frames[frame] + OWNER], b[w.frames[frame] + COMING] = h, 0
        freed(w, h, frame)
    return next_page(w, h, "home.back", "home.end")


@step("home.back blindly")
def home_back_blindly(w: World, h: int) -> str:
    """BUG: the frame is taken back by a plain store, after a look."""
    o, b = w.hosts[h], w.b
    frame = b[o + NEW + b[o + AT]] - 1
    b[w.frames[frame] + OWNER], b[w.frames[frame] + COMING] = h, 0
    freed(w, h, frame)
    return next_page(w, h, "home.back", "home.end")


@step("home.end", local=True)
def home_end(w: World, h: int) -> str:
    """The intent ends."""
    w.end_intent(h)
    return ""


# ---------------------------------------------------------------- who is at home


def take_in(h: int, frame: int) -> Callable[[World], None]:
    """Return what makes a frame that is coming host h's alone; a compare-and-swap."""

    def act(w: World) -> None:
        f, o, b = w.frames[frame], w.hosts[h], w.b
        if w.bug == "take in by a store":
            b[o + OLD], b[o + PC] = frame + 1, NUMBERS["take in blindly"]
            return
        b[f + COMING] = 0
        freed(w, h, frame)

    return act


@step("take in blindly")
def take_in_blindly(w: World, h: int) -> str:
    """BUG: the frame is taken in by a plain store, after a look."""
    f = w.frames[w.b[w.hosts[h] + OLD] - 1]
    w.b[f + OWNER], w.b[f + COMING] = h, 0
    w.b[w.hosts[h] + FREE_LIST] |= 1 << w.b[w.hosts[h] + OLD] - 1
    return ""


def find(h: int, frame: int) -> Callable[[World], None]:
    """Return what lists a frame that is host h's, and that it had not heard of."""
    return lambda w: freed(w, h, frame)


def arrivals(w: World, h: int) -> Iterator[tuple[str, Callable[[World], None]]]:
    """Offer what a hint, which need not be true, or a search may lead host h to."""
    b = w.b
    for frame, f in enumerate(w.frames):
        if b[f + COUNT] or b[f + OWNER] != h:
            continue
        if b[f + COMING]:
            yield f"host {h} takes in frame {frame}, which is coming home", take_in(h, frame)
        elif not b[w.hosts[h] + FREE_LIST] >> frame & 1:
            yield f"host {h} finds frame {frame}, of whose grant it has not heard", find(h, frame)

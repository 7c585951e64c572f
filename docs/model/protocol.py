"""The model: what may happen next in a state, and what must hold in it.

Nothing here chooses: every host, the coordinator, its recovery of a dead host, and the crashes are
all offered, and explore.py takes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import pages, recovery, refs, taking
from .state import (
    ABSENT,
    ACTIVE,
    ASKED,
    C_CRASHES,
    C_LEDGER,
    C_UP,
    CARGO,
    COMING,
    COUNT,
    COUNTED,
    CUT,
    CUT_GIVING,
    DEAD,
    FREE_LIST,
    G_FRAME,
    G_HOST,
    GIVING,
    GONE,
    GRANTED,
    HOST_CRASHES,
    HOST_SIZE,
    INCARNATION,
    INTENT,
    LEAKS,
    LINK,
    LIVE,
    M_NR,
    MAX_MAPS,
    MAX_PAGES,
    OPS,
    OWNER,
    PC,
    PROTECTED,
    PTE,
    QUIET,
    R_KNOWN,
    R_STATE,
    R_SUPERSEDED,
    RECOVERY,
    REJOINED,
    RESTARTS,
    STATUS,
    TRUE_HOLDER,
    USED,
    V_HOST,
    V_PC,
    W_HOLDER,
    World,
)  # fmt: skip
from .steps import NUMBERS, STEPS, step

NOT_YET = 255
"""G_FRAME of a grant that was taken up, and for which no frame has changed hands."""
Action = tuple[str, Callable[[World], None]]
"""What a trace prints, and what it does to a copy of the state."""


# ---------------------------------------------------------------- a host


def run(h: int, function: Callable[[World, int], str]) -> Callable[[World], None]:
    """Return what takes one step of host h."""

    def act(w: World) -> None:
        then = function(w, h)
        w.b[w.hosts[h] + PC] = NUMBERS[then]
        if not then:
            w.idle(h)

    return act


def begin(
    h: int, function: Callable[..., str], *details: int | bool | str
) -> Callable[[World], None]:
    """Return what starts an operation of host h."""

    def act(w: World) -> None:
        w.b[w.hosts[h] + OPS] -= 1
        w.b[w.hosts[h] + PC] = NUMBERS[function(w, h, *details)]

    return act


def plain_store(h: int, index: int, page: int) -> Callable[[World], None]:
    """Return what stores to a writable page."""

    def act(w: World) -> None:
        w.b[w.hosts[h] + OPS] -= 1
        pages.store(w, h, index, page)

    return act


def stores(w: World, h: int, idle: bool) -> Iterator[Action]:
    """Offer stores to pages of the program's mappings, by any thread at any moment."""
    for index in range(MAX_MAPS):
        m = w.mapping(h, index)
        if w.b[m + USED] != 1:
            continue
        for page in range(w.b[m + M_NR]):
            at = w.page(h, index, page)
            if not w.b[at + PROTECTED]:
                yield (
                    f"host {h} stores to page {page} of mapping {index}",
                    plain_store(h, index, page),
                )
            elif idle:
                what = f"host {h} stores to page {page} of mapping {index}, which is protected"
                yield what, begin(h, pages.begin_fault, index, page)


def operations(w: World, h: int) -> Iterator[Action]:
    """Offer what an idle host may begin."""
    o, b, menu = w.hosts[h], w.b, w.config.menu
    used = [b[w.mapping(h, i) + USED] for i in range(MAX_MAPS)]
    room = 0 in used
    if "ralloc" in menu and room and b[o + FREE_LIST].bit_count() >= w.config.pages:
        yield f"host {h} begins ralloc", begin(h, pages.begin_ralloc, used.index(0))
    for index in (i for i in range(MAX_MAPS) if used[i] == 1):
        if "rfree" in menu:
            yield f"host {h} begins rfree of mapping {index}", begin(h, pages.begin_rfree, index)
        if "share" in menu:
            what = f"host {h} begins create_ref of mapping {index}"
            yield what, begin(h, refs.begin_create, index, False)
        if "move" in menu:
            what = f"host {h} begins create_ref(move) of mapping {index}"
            yield what, begin(h, refs.begin_create, index, True)
    for ref, r in enumerate(w.refs):
        if b[r + R_STATE] != LIVE or not b[r + R_KNOWN] | b[r + R_SUPERSEDED]:
            continue
        for kind in ("map", "view", "drop", "accept", "clone"):
            if kind not in menu or (kind in ("map", "view") and not room):
                continue
            yield f"host {h} begins {kind} of Ref {ref}", begin(h, taking.begin_use, ref, kind)


def give_back(w: World, h: int) -> str:
    """Change the word of a free frame: it is the pool's."""
    o, b = w.hosts[h], w.b
    frame = next(f for f in range(len(w.frames)) if b[o + FREE_LIST] >> f & 1)
    b[o + FREE_LIST] &= ~(1 << frame)
    b[o + CARGO] = 1 << frame
    if w.bug != "return before the word":
        b[w.frames[frame] + OWNER] = 0
    return "return.send"


@step("return.send")
def return_send(w: World, h: int) -> str:
    """RETURN is sent"""
    o, b = w.hosts[h], w.b
    b[o + LINK] = GIVING
    return "return.word" if w.bug == "return before the word" else ""


@step("return.word")
def return_word(w: World, h: int) -> str:
    """BUG: changes the word of the frame after the message."""
    for frame, f in enumerate(w.frames):
        if w.b[w.hosts[h] + CARGO] >> frame & 1:
            w.b[f + OWNER] = 0
    return ""


def add_granted(w: World, h: int, frames: int) -> None:
    """List granted frames: those whose words agree and that are not listed yet.

    Those that are coming home are taken in one by one: home.arrivals.
    """
    o, b = w.hosts[h], w.b
    for frame, f in enumerate(w.frames):
        if frames >> frame & 1 and not (b[f + COUNT] or b[f + COMING]) and b[f + OWNER] == h:
            b[o + FREE_LIST] |= 1 << frame


def set_link(h: int, state: int, frames: int = 0) -> Callable[[World], None]:
    """Return what changes a host's connection, with frames that arrive."""

    def act(w: World) -> None:
        add_granted(w, h, frames)
        w.b[w.hosts[h] + LINK] = state
        if state in (QUIET, CUT, REJOINED):
            w.b[w.hosts[h] + CARGO] = 0

    return act


def connection(w: World, h: int, idle: bool) -> Iterator[Action]:
    """Offer what may happen on a host's connection to the coordinator."""
    o, b, c = w.hosts[h], w.b, w.coordinator
    link = b[o + LINK]
    calm = b[c + C_UP] and not b[c + G_HOST]  # the coordinator reads the next message
    if link == QUIET and idle and b[o + OPS]:
        if "grant" in w.config.menu:

            def ask(w: World) -> None:
                w.b[o + OPS] -= 1
                w.b[o + LINK] = ASKED

            yield f"host {h} sends GRANT", ask
        if "return" in w.config.menu and b[o + FREE_LIST]:
            yield f"host {h} returns a frame: its word first", begin(h, give_back)
    if link in (ASKED, GRANTED) and w.config.coordinator_crashes:
        yield f"host {h} gives up waiting for a grant and closes the connection", set_link(h, CUT)
    if link == GRANTED and idle:
        yield f"host {h} gets its grant", set_link(h, QUIET, b[o + CARGO])
    if link == COUNTED:
        yield f"host {h} gets the answer to RETURN", set_link(h, QUIET)
    if link == CUT and w.bug == "look before rejoining" and idle:
        yield f"BUG: host {h} looks for its frames, then connects", set_link(h, QUIET, 255)
    elif link == CUT and calm:
        yield f"host {h} connects again", set_link(h, REJOINED)
    if link == REJOINED and idle:
        yield f"host {h} looks for frames of its own", set_link(h, QUIET, 255)
    if link == CUT_GIVING and calm:
        yield f"host {h} connects again and repeats RETURN", set_link(h, GIVING)


# ---------------------------------------------------------------- the coordinator


def take_up(h: int) -> Callable[[World], None]:
    """Return what takes a GRANT up: the connection is still open."""

    def act(w: World) -> None:
        w.b[w.coordinator + G_HOST], w.b[w.coordinator + G_FRAME] = h, NOT_YET

    return act


def grant(h: int) -> Callable[[World], None]:
    """Return what makes a frame of the pool host h's; the answer is sent later."""

    def act(w: World) -> None:
        c, b = w.coordinator, w.b
        frame = next(f for f in range(len(w.frames)) if b[c + C_LEDGER] >> f & 1)
        f = w.frames[frame]
        b[c + C_LEDGER] &= ~(1 << frame)
        if b[f + COUNT] or b[f + OWNER]:
            w.wrong(f"frame {frame} is in the coordinator's pool, and its word says otherwise")
        b[f + OWNER] = h
        b[c + G_HOST], b[c + G_FRAME] = h, frame

    return act


def answer(w: World) -> None:
    """Send the answer to GRANT, if somebody still waits for it."""
    c, b = w.coordinator, w.b
    o = w.hosts[b[c + G_HOST]]
    if b[o + LINK] == ASKED:
        b[o + LINK], b[o + CARGO] = GRANTED, 1 << b[c + G_FRAME]
    b[c + G_HOST] = b[c + G_FRAME] = 0


def count_returned(h: int) -> Callable[[World], None]:
    """Return what counts frames of a RETURN whose words say that they are the pool's."""

    def act(w: World) -> None:
        o, c, b = w.hosts[h], w.coordinator, w.b
        for frame, f in enumerate(w.frames):
            mine = not b[f + COUNT] and not b[f + OWNER]
            if b[o + CARGO] >> frame & 1 and (mine or w.bug == "return not looked at"):
                b[c + C_LEDGER] |= 1 << frame
        b[o + LINK] = COUNTED
        if w.bug != "return before the word":
            b[o + CARGO] = 0

    return act


def declare_dead(h: int) -> Callable[[World], None]:
    """Return what enters a host whose process has ended as dead."""

    def act(w: World) -> None:
        w.b[w.hosts[h] + STATUS] = DEAD

    return act


def begin_recovery(h: int) -> Callable[[World], None]:
    """Return what begins to reclaim host h."""

    def act(w: World) -> None:
        c = w.coordinator
        w.b[c + V_HOST], w.b[c + V_PC] = h, NUMBERS["recover.settle"]

    return act


def recover(w: World) -> None:
    """Take one step of the recovery."""
    c, b = w.coordinator, w.b
    then = STEPS[b[c + V_PC]](w, b[c + V_HOST])
    b[c + V_PC] = NUMBERS[then]
    if not then:
        b[c + RECOVERY.start : c + RECOVERY.stop] = bytes(RECOVERY.stop - RECOVERY.start)


def activate(h: int) -> Callable[[World], None]:
    """Return what lets a new process have slot h."""

    def act(w: World) -> None:
        o, c, b = w.hosts[h], w.coordinator, w.b
        b[c + RESTARTS] -= 1
        b[o + STATUS] = ACTIVE
        b[o + OPS] = 1
        for k in range(1, len(w.hosts)):  # what others know of the slot's holder is out of date
            other = w.hosts[k]
            if b[other + W_HOLDER] == h:
                b[other + INCARNATION] = b[other + TRUE_HOLDER] = 0

    return act


def restart(w: World) -> None:
    """Start a coordinator: its books are made from the frame words."""
    w.b[w.coordinator + C_UP] = 1
    recovery.find_lost(w)


def coordinator(w: World) -> Iterator[Action]:
    """Offer what the coordinator may do, its recovery apart."""
    c, b = w.coordinator, w.b
    if not b[c + C_UP]:
        yield "the coordinator is started again", restart
        return
    if b[c + G_FRAME] == NOT_YET:
        yield f"the coordinator makes a frame host {b[c + G_HOST]}'s", grant(b[c + G_HOST])
        return
    if b[c + G_HOST]:
        yield f"the coordinator answers host {b[c + G_HOST]}", answer
        return
    dead = False
    for h in range(1, len(w.hosts)):
        o = w.hosts[h]
        status = b[o + STATUS]
        dead = dead or status == DEAD
        if status == GONE:
            yield f"the coordinator declares host {h} dead", declare_dead(h)
        if status == DEAD and not b[c + V_PC]:
            yield f"the coordinator begins to reclaim host {h}", begin_recovery(h)
        if status == ABSENT and b[c + RESTARTS]:
            yield f"another process gets the slot of host {h}", activate(h)
        if status == ACTIVE and b[o + LINK] == ASKED and b[c + C_LEDGER]:
            yield (
                f"the coordinator takes up the GRANT of host {h}, whose connection is open",
                take_up(h),
            )
        if status == ACTIVE and b[o + LINK] == GIVING:
            yield f"the coordinator counts what host {h} returned", count_returned(h)
    if not dead:
        lost = [
            i
            for i, f in enumerate(w.frames)
            if not b[f + COUNT] and not b[f + OWNER] and not b[c + C_LEDGER] >> i & 1
        ]
        if lost and any(b[o + LINK] == ASKED for o in w.hosts[1:]):
            yield "the coordinator looks for lost frames", recovery.find_lost


# ---------------------------------------------------------------- crashes


def crash_host(h: int) -> Callable[[World], None]:
    """Return what SIGKILL leaves of host h: what it wrote to the device."""

    def act(w: World) -> None:
        o, c, b = w.hosts[h], w.coordinator, w.b
        intent = bytes(b[o + INTENT.start : o + INTENT.stop])
        entries = [(w.page(h, i, p) + PTE, b[w.page(h, i, p) + PTE])
                   for i in range(MAX_MAPS) for p in range(MAX_PAGES)]  # fmt: skip
        b[o : o + HOST_SIZE] = bytes(HOST_SIZE)
        b[o + STATUS] = GONE
        b[o + INTENT.start : o + INTENT.stop] = intent
        for at, pte in entries:
            b[at] = pte
        b[c + HOST_CRASHES] -= 1
        b[c + LEAKS] += 1

    return act


def crash_coordinator(w: World) -> None:
    """Leave nothing of the coordinator."""
    c, b = w.coordinator, w.b
    b[c + LEAKS] += bool(b[c + V_PC])
    b[c + C_CRASHES] -= 1
    b[c + C_UP] = b[c + C_LEDGER] = b[c + G_HOST] = b[c + G_FRAME] = 0
    b[c + RECOVERY.start : c + RECOVERY.stop] = bytes(RECOVERY.stop - RECOVERY.start)
    for o in w.hosts[1:]:
        if b[o + LINK] in (ASKED, GRANTED, REJOINED):
            b[o + LINK], b[o + CARGO] = CUT, 0
        elif b[o + LINK] == GIVING:
            b[o + LINK] = CUT_GIVING

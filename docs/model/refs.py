"""What taking, claiming and describing a Ref has in common, and create_ref (share.c)."""

from __future__ import annotations

from .pages import next_page, pages_intent
from .state import (
    AT,
    BUILDING,
    COUNT,
    EXPECTED,
    FREE,
    I_FRESH,
    I_NR,
    I_OP,
    I_PROGRESS,
    I_REF,
    I_STATE,
    KIND,
    LIVE,
    M_EXCL,
    M_HOME,
    M_NR,
    M_VIEW,
    MAP,
    MOVE,
    NR,
    PROTECTED,
    PTE,
    R_CREATOR,
    R_EXCL,
    R_FRAMES,
    R_HOLDER,
    R_KNOWN,
    R_NR,
    R_STATE,
    R_SUPERSEDED,
    R_VALUES,
    REF,
    SHARE,
    USED,
    W_EXCL,
    W_FRESH,
    W_HOLDER,
    World,
)  # fmt: skip
from .steps import step

KINDS = ("", "a store", "create_ref", "map", "view", "drop", "accept", "clone")
BY_FAULT, BY_CREATE = KINDS.index("a store"), KINDS.index("create_ref")
"""KIND of a view's materialisation: what asked for it, and goes on afterwards."""


def ref_intent(w: World, h: int, op: int, ref: int, nr: int) -> None:
    """Write an intent record about a Ref, which it describes as it is now; op last."""
    o, b = w.hosts[h], w.b
    b[o + I_REF], b[o + I_STATE], b[o + I_FRESH] = ref + 1, b[w.refs[ref] + R_STATE], 1
    b[o + I_NR], b[o + I_OP] = nr, op


def claim(w: World, h: int, ref: int, state: int) -> bool:
    """Compare-and-swap from the word that was read, to `state` with this host as holder."""
    o, b, r = w.hosts[h], w.b, w.refs[ref]
    same = (
        b[r + R_STATE] == LIVE
        and b[o + W_FRESH]
        and b[r + R_HOLDER] == b[o + W_HOLDER]
        and b[r + R_EXCL] == b[o + W_EXCL]
    )
    if not same and not (w.bug == "accept by a store" and b[o + KIND] == KINDS.index("accept")):
        return False
    if b[r + R_SUPERSEDED] and not b[r + R_KNOWN]:
        w.wrong(f"host {h} used bytes of Ref {ref} that another holder's acceptance had superseded")
    b[r + R_STATE], b[r + R_HOLDER] = state, h
    return True


def take_slot(w: World, h: int) -> int:
    """FREE -> BUILDING, a compare-and-swap; the entry's number plus one, 0 when there is none."""
    for ref, r in enumerate(w.refs):
        if w.b[r + R_STATE] == FREE:
            w.b[r + R_STATE], w.b[r + R_HOLDER], w.b[r + R_CREATOR] = BUILDING, h, h
            return ref + 1
    return 0


# ---------------------------------------------------------------- create_ref


def begin_create(w: World, h: int, index: int, move: bool) -> str:
    """The program makes a Ref of a mapping."""
    o, b = w.hosts[h], w.b
    m = w.mapping(h, index)
    b[o + MAP], b[o + NR] = index, b[m + M_NR]
    if b[m + M_VIEW]:
        b[o + REF] = b[m + M_VIEW]
        if move:
            b[m + USED] = 3
            return "view.move"
        b[o + KIND] = BY_CREATE
        return "view.materialise"
    if move:
        b[m + USED] = 3
    return "move.slot" if move else "share.slot"


@step("share.slot")
def share_slot(w: World, h: int) -> str:
    """A Ref entry is taken: FREE -> BUILDING."""
    o, b = w.hosts[h], w.b
    b[o + KIND] = 0
    b[o + REF] = take_slot(w, h)
    return "share.runs" if b[o + REF] else ""


def fill_in(w: World, h: int) -> None:
    """Write which frames the Ref covers, and (a ghost) what it denotes."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_NR] = b[o + NR]
    for i in range(b[o + NR]):
        at = w.page(h, b[o + MAP], i)
        b[r + R_FRAMES + i], b[r + R_VALUES + i] = b[at + PTE], b[at + EXPECTED]


@step("share.runs", local=True)
def share_runs(w: World, h: int) -> str:
    """The entry is filled in."""
    fill_in(w, h)
    return "share.intent" if w.bug == "protect last" else "share.protect"


@step("share.protect")
def share_protect(w: World, h: int) -> str:
    """The pages are write-protected: from here on the bytes are the Ref's too."""
    o, b = w.hosts[h], w.b
    for i in range(b[o + NR]):
        b[w.page(h, b[o + MAP], i) + PROTECTED] = 1
    if w.bug == "protect last":
        return "share.end"
    fill_in(w, h)
    return "share.publish" if w.bug == "publish before counts" else "share.intent"


@step("share.intent", local=True)
def share_intent(w: World, h: int) -> str:
    """The intent SHARE is written."""
    o, b = w.hosts[h], w.b
    pages_intent(w, h, SHARE, 0, b[o + NR])
    ref_intent(w, h, SHARE, b[o + REF] - 1, b[o + NR])
    return "share.progress" if w.bug == "share progress first" else "share.count"


@step("share.count")
def share_count(w: World, h: int) -> str:
    """The frame gets a count for the Ref."""
    o, b = w.hosts[h], w.b
    w.count_up(b[w.page(h, b[o + MAP], b[o + AT]) + PTE] - 1)
    if w.bug == "share progress first":
        return next_page(w, h, "share.progress", "share.publish")
    return "share.progress"


@step("share.progress", local=True)
def share_progress(w: World, h: int) -> str:
    """Progress says that the count was taken."""
    o, b = w.hosts[h], w.b
    b[o + I_PROGRESS] = b[o + AT] + 1
    if w.bug == "share progress first":
        return "share.count"
    then = "share.end" if w.bug == "publish before counts" else "share.publish"
    return next_page(w, h, "share.count", then)


@step("share.publish")
def share_publish(w: World, h: int) -> str:
    """BUILDING -> LIVE: the Ref is handed out."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    if w.bug == "protect last":
        fill_in(w, h)
    b[r + R_STATE], b[r + R_KNOWN] = LIVE, 1
    m = w.mapping(h, b[o + MAP])
    b[m + M_EXCL] = b[m + M_HOME] = 0
    if w.bug == "publish before counts":
        return "share.intent"
    return "share.protect" if w.bug == "protect last" else "share.end"


@step("share.end", local=True)
def share_end(w: World, h: int) -> str:
    """The intent ends."""
    w.end_intent(h)
    return ""


@step("move.slot")
def move_slot(w: World, h: int) -> str:
    """A Ref entry is taken: FREE -> BUILDING."""
    o, b = w.hosts[h], w.b
    b[o + REF] = take_slot(w, h)
    if b[o + REF]:
        return "move.runs"
    b[w.mapping(h, b[o + MAP]) + USED] = 1
    return ""


@step("move.runs", local=True)
def move_runs(w: World, h: int) -> str:
    """The entry is filled in."""
    fill_in(w, h)
    return "move.look"


@step("move.look")
def move_look(w: World, h: int) -> str:
    """Is the host the only holder? Then so will be the Ref's."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    alone = all(b[w.frames[b[r + R_FRAMES + i] - 1] + COUNT] == 1 for i in range(b[r + R_NR]))
    b[o + W_EXCL] = b[w.mapping(h, b[o + MAP]) + M_EXCL] or alone
    return "move.intent"


@step("move.intent", local=True)
def move_intent(w: World, h: int) -> str:
    """The intent MOVE is written."""
    o, b = w.hosts[h], w.b
    pages_intent(w, h, MOVE, 0, b[o + NR])
    ref_intent(w, h, MOVE, b[o + REF] - 1, b[o + NR])
    if w.bug == "move without intent":
        w.end_intent(h)
    return "move.publish"


@step("move.publish")
def move_publish(w: World, h: int) -> str:
    """BUILDING -> LIVE: the counts are the Ref's from here on."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_STATE], b[r + R_EXCL], b[r + R_KNOWN] = LIVE, b[o + W_EXCL], 1
    return "move.pte"


@step("move.pte", local=True)
def move_pte(w: World, h: int) -> str:
    """The page-table entry is cleared."""
    o, b = w.hosts[h], w.b
    b[w.page(h, b[o + MAP], b[o + AT]) + PTE] = 0
    return next_page(w, h, "move.pte", "move.end")


@step("move.end", local=True)
def move_end(w: World, h: int) -> str:
    """The intent ends; the mapping is forgotten."""
    w.end_intent(h)
    w.delete_mapping(h, w.b[w.hosts[h] + MAP])
    return ""

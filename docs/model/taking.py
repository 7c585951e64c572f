"""What hosts do with Refs that came to them: accept, map, view, drop, clone (map.c, view.c, ref.c)."""

from __future__ import annotations

from .failing import TO_OLD_HOLDER
from .pages import drop_count, keep_or_send, next_page, pages_intent
from .refs import BY_CREATE, BY_FAULT, KINDS, claim, ref_intent, take_slot
from .state import (
    AT,
    CLONE,
    CLONING,
    COPY,
    COUNT,
    DROP,
    DROPPING,
    EXPECTED,
    HOME,
    I_PROGRESS,
    KIND,
    LIVE,
    M_EXCL,
    M_HOME,
    M_NR,
    M_VIEW,
    MAP,
    MAP_OP,
    MAPPING,
    MAX_MAPS,
    MAX_PAGES,
    NEW,
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
    SHOWN,
    TRUE_HOLDER,
    USED,
    W_EXCL,
    W_FRESH,
    W_HOLDER,
    World,
)  # fmt: skip
from .steps import step

# ---------------------------------------------------------------- taking a Ref


def begin_use(w: World, h: int, ref: int, kind: str) -> str:
    """The bytes of a Ref have come; its word is read."""
    o, b, r = w.hosts[h], w.b, w.refs[ref]
    b[o + REF], b[o + KIND], b[o + NR] = ref + 1, KINDS.index(kind), b[r + R_NR]
    b[o + W_EXCL], b[o + W_HOLDER], b[o + W_FRESH] = b[r + R_EXCL], b[r + R_HOLDER], 1
    b[o + TRUE_HOLDER] = 1
    if kind == "clone":
        return "clone.claim" if b[r + R_HOLDER] == h else "accept.swap"
    if kind == "accept":
        return "accept.swap"
    if kind == "drop":
        return "drop.claim"
    return "map.claim"


def home_of(w: World, h: int, ref: int) -> int:
    """Return where host h sends the frames of an exclusive Ref: to who made it, 0 for itself."""
    creator = w.b[w.refs[ref] + R_CREATOR]
    return 0 if creator == h else creator


@step("accept.swap")
def accept_swap(w: World, h: int) -> str:
    """Compare-and-swap: LIVE of the old holder, perhaps this one itself -> LIVE of this one, the next generation."""
    o, b = w.hosts[h], w.b
    ref = b[o + REF] - 1
    if not claim(w, h, ref, LIVE):
        return ""
    r = w.refs[ref]
    if w.bug == "accept keeps generation":
        b[r + R_SUPERSEDED], b[r + R_KNOWN] = 1, 0
    else:
        w.bump(ref)
        b[r + R_KNOWN] = 1
    if b[o + KIND] != KINDS.index("clone"):
        return ""
    b[o + W_HOLDER], b[o + W_FRESH] = h, 1
    return "clone.claim"


@step("map.claim")
def map_claim(w: World, h: int) -> str:
    """Compare-and-swap: LIVE -> MAPPING."""
    o, b = w.hosts[h], w.b
    if not claim(w, h, b[o + REF] - 1, MAPPING):
        return ""
    remembers = w.bug in TO_OLD_HOLDER and b[o + W_HOLDER] != h
    return "map.incarnation" if remembers else "map.place"


@step("map.place")
def map_place(w: World, h: int) -> str:
    """Is the Ref exclusive? Pages are chosen, and made writable or read-only."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    index = next(i for i in range(MAX_MAPS) if not b[w.mapping(h, i) + USED])
    frames = [b[r + R_FRAMES + i] for i in range(b[o + NR])]
    if not all(frames):
        w.wrong(f"Ref {b[o + REF] - 1} was freed while host {h} maps it")
        return ""
    alone = all(b[w.frames[f - 1] + COUNT] == 1 for f in frames)
    exclusive = int(bool(b[o + W_EXCL] or alone or w.bug == "map writable"))
    m = w.mapping(h, index)
    b[o + MAP], b[m + USED], b[m + M_EXCL], b[m + M_NR] = index, 2, exclusive, b[o + NR]
    for i, f in enumerate(frames):
        at = w.page(h, index, i)
        b[at + SHOWN], b[at + PROTECTED], b[at + EXPECTED] = f, 1 - exclusive, b[r + R_VALUES + i]
    if b[o + KIND] == KINDS.index("view"):
        return "view.live"
    b[m + M_HOME] = home_of(w, h, b[o + REF] - 1) if exclusive else 0
    return "map.intent"


@step("map.intent", local=True)
def map_intent(w: World, h: int) -> str:
    """The intent MAP is written."""
    o, b = w.hosts[h], w.b
    pages_intent(w, h, MAP_OP, 0, b[o + NR])
    ref_intent(w, h, MAP_OP, b[o + REF] - 1, b[o + NR])
    return "map.progress" if w.bug == "map progress first" else "map.pte"


@step("map.pte", local=True)
def map_pte(w: World, h: int) -> str:
    """The page-table entry is written."""
    o, b = w.hosts[h], w.b
    at = w.page(h, b[o + MAP], b[o + AT])
    b[at + PTE] = b[at + SHOWN]
    if w.bug == "map progress first":
        return next_page(w, h, "map.pte", "map.free")
    return next_page(w, h, "map.pte", "map.progress")


@step("map.progress", local=True)
def map_progress(w: World, h: int) -> str:
    """Progress 1: the counts are the mapping's from here on."""
    w.b[w.hosts[h] + I_PROGRESS] = 1
    return "map.pte" if w.bug == "map progress first" else "map.free"


@step("map.free")
def map_free(w: World, h: int) -> str:
    """MAPPING -> FREE of the next generation."""
    w.make_free(w.b[w.hosts[h] + REF] - 1)
    return "map.end"


@step("map.end", local=True)
def map_end(w: World, h: int) -> str:
    """The intent ends; it is a mapping."""
    o, b = w.hosts[h], w.b
    m = w.mapping(h, b[o + MAP])
    b[m + USED], b[m + M_VIEW] = 1, 0
    w.end_intent(h)
    kind = b[o + KIND]
    b[o + REF] = b[o + KIND] = 0
    if kind == BY_FAULT:
        return "fault.look"
    return "share.slot" if kind == BY_CREATE else ""


# ---------------------------------------------------------------- views


def claim_view(w: World, h: int, state: int) -> None:
    """Compare-and-swap from the word the view left: nobody can have changed it."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    if b[r + R_STATE] != LIVE or b[r + R_HOLDER] != h:
        w.wrong(f"the Ref of a view of host {h} was taken from under it")
        return
    b[r + R_STATE] = state


@step("view.live")
def view_live(w: World, h: int) -> str:
    """Compare-and-swap: MAPPING -> LIVE of the next generation; it is a view."""
    o, b = w.hosts[h], w.b
    ref = b[o + REF] - 1
    r, m = w.refs[ref], w.mapping(h, b[o + MAP])
    b[r + R_STATE], b[r + R_EXCL] = LIVE, b[o + W_EXCL] | b[m + M_EXCL]
    if w.bug != "view keeps generation":
        w.bump(ref)
    b[m + USED], b[m + M_VIEW] = 1, ref + 1
    return ""


@step("view.materialise")
def view_materialise(w: World, h: int) -> str:
    """The view becomes a mapping: LIVE -> MAPPING."""
    o, b = w.hosts[h], w.b
    claim_view(w, h, MAPPING)
    m = w.mapping(h, b[o + MAP])
    b[o + AT], b[o + NR] = 0, b[m + M_NR]
    b[m + M_HOME] = home_of(w, h, b[o + REF] - 1) if b[m + M_EXCL] else 0
    return "map.intent"


@step("view.free")
def view_free(w: World, h: int) -> str:
    """rfree of a view: LIVE -> DROPPING."""
    o, b = w.hosts[h], w.b
    claim_view(w, h, DROPPING)
    w.delete_mapping(h, b[o + MAP])
    return "drop.intent"


@step("view.move")
def view_move(w: World, h: int) -> str:
    """The Ref that is there is handed out: LIVE -> LIVE."""
    o, b = w.hosts[h], w.b
    claim_view(w, h, LIVE)
    b[w.refs[b[o + REF] - 1] + R_KNOWN] = 1
    w.delete_mapping(h, b[o + MAP])
    return ""


# ---------------------------------------------------------------- drop


@step("drop.claim")
def drop_claim(w: World, h: int) -> str:
    """Compare-and-swap: LIVE -> DROPPING."""
    return "drop.intent" if claim(w, h, w.b[w.hosts[h] + REF] - 1, DROPPING) else ""


@step("drop.intent", local=True)
def drop_intent(w: World, h: int) -> str:
    """The intent DROP is written."""
    o, b = w.hosts[h], w.b
    ref = b[o + REF] - 1
    b[o + AT], b[o + NR] = 0, b[w.refs[ref] + R_NR]
    w.end_intent(h)
    ref_intent(w, h, DROP, ref, b[o + NR])
    if b[w.refs[ref] + R_EXCL]:
        b[o + HOME] = home_of(w, h, ref)
        b[o + NEW : o + NEW + MAX_PAGES] = b[w.refs[ref] + R_FRAMES : w.refs[ref] + R_VALUES]
        return "drop.leave"
    return "drop.down" if w.bug == "drop progress after count" else "drop.progress"


@step("drop.leave")
def drop_leave(w: World, h: int) -> str:
    """An exclusive Ref's frame goes to 0 by a plain store."""
    o, b = w.hosts[h], w.b
    frame = b[o + NEW + b[o + AT]] - 1
    w.leave_use(frame, h)
    if w.bug == "send home under the intent" and b[o + HOME]:
        return "drop.leave home"
    return next_page(w, h, "drop.leave", "drop.left")


@step("drop.leave home")
def drop_leave_home(w: World, h: int) -> str:
    """BUG: the frame is sent home while the intent DROP says that its count is to be dropped."""
    o, b = w.hosts[h], w.b
    w.send(b[o + NEW + b[o + AT]] - 1, h, b[o + HOME])
    return next_page(w, h, "drop.leave", "drop.left")


@step("drop.left", local=True)
def drop_left(w: World, h: int) -> str:
    """Progress says that no count is left to drop."""
    o, b = w.hosts[h], w.b
    b[o + I_PROGRESS] = b[o + NR]
    return "drop.free"


@step("drop.progress", local=True)
def drop_progress(w: World, h: int) -> str:
    """Progress says that the count is as good as dropped."""
    o, b = w.hosts[h], w.b
    b[o + I_PROGRESS] = b[o + AT] + 1
    if w.bug == "drop progress after count":
        return next_page(w, h, "drop.down", "drop.free")
    return "drop.down"


@step("drop.down")
def drop_down(w: World, h: int) -> str:
    """The count is dropped."""
    o, b = w.hosts[h], w.b
    drop_count(w, h, b[w.refs[b[o + REF] - 1] + R_FRAMES + b[o + AT]] - 1)
    if w.bug == "drop progress after count":
        return "drop.progress"
    return next_page(w, h, "drop.progress", "drop.free")


@step("drop.free")
def drop_free(w: World, h: int) -> str:
    """DROPPING -> FREE of the next generation."""
    w.make_free(w.b[w.hosts[h] + REF] - 1)
    return "drop.end"


@step("drop.end", local=True)
def drop_end(w: World, h: int) -> str:
    """The intent ends; frames that were exclusive go to the free list, or home."""
    w.end_intent(h)
    exclusive = w.b[w.hosts[h] + NEW]
    if not exclusive or (w.bug == "send home under the intent" and w.b[w.hosts[h] + HOME]):
        return ""
    return keep_or_send(w, h)


# ---------------------------------------------------------------- clone


@step("clone.claim")
def clone_claim(w: World, h: int) -> str:
    """Compare-and-swap: LIVE -> CLONING."""
    o, b = w.hosts[h], w.b
    return "clone.slot" if claim(w, h, b[o + REF] - 1, CLONING) else ""


@step("clone.slot")
def clone_slot(w: World, h: int) -> str:
    """An entry for the clone is taken: FREE -> BUILDING."""
    o, b = w.hosts[h], w.b
    b[o + COPY] = take_slot(w, h)
    return "clone.runs" if b[o + COPY] else "clone.done"


@step("clone.runs", local=True)
def clone_runs(w: World, h: int) -> str:
    """The clone is filled in."""
    o, b = w.hosts[h], w.b
    source, copy = w.refs[b[o + REF] - 1], w.refs[b[o + COPY] - 1]
    b[copy + R_NR : copy + R_KNOWN] = b[source + R_NR : source + R_KNOWN]
    return "clone.intent"


@step("clone.intent", local=True)
def clone_intent(w: World, h: int) -> str:
    """The intent CLONE is written."""
    o, b = w.hosts[h], w.b
    w.end_intent(h)
    ref_intent(w, h, CLONE, b[o + COPY] - 1, b[o + NR])
    return "clone.count"


@step("clone.count")
def clone_count(w: World, h: int) -> str:
    """The frame gets a count for the clone."""
    o, b = w.hosts[h], w.b
    w.count_up(b[w.refs[b[o + COPY] - 1] + R_FRAMES + b[o + AT]] - 1)
    return "clone.progress"


@step("clone.progress", local=True)
def clone_progress(w: World, h: int) -> str:
    """Progress says that the count was taken."""
    o, b = w.hosts[h], w.b
    b[o + I_PROGRESS] = b[o + AT] + 1
    return next_page(w, h, "clone.count", "clone.publish")


@step("clone.publish")
def clone_publish(w: World, h: int) -> str:
    """The clone is handed out: BUILDING -> LIVE."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + COPY] - 1]
    b[r + R_STATE], b[r + R_KNOWN] = LIVE, 1
    if w.bug != "clone keeps exclusive":
        b[o + W_EXCL] = 0
    return "clone.end"


@step("clone.end", local=True)
def clone_end(w: World, h: int) -> str:
    """The intent ends."""
    w.end_intent(h)
    return "clone.done"


@step("clone.done")
def clone_done(w: World, h: int) -> str:
    """The source may be used again: CLONING -> LIVE."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + REF] - 1]
    b[r + R_STATE], b[r + R_EXCL] = LIVE, b[o + W_EXCL]
    return ""

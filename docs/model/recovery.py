"""What the coordinator does about a dead host (recover.c), one step after the other.

Where a step is marked local, it changes only the dead host's intent record or page table. Each
function gets the dead host; where recovery stands is kept in the coordinator's block (V_*), which a
crash of the coordinator wipes out, while the device keeps the rest.
"""

from __future__ import annotations

from .home import on_its_way
from .state import (
    ABSENT,
    ALLOC,
    BUILDING,
    C_LEDGER,
    CLONE,
    CLONING,
    COMING,
    COUNT,
    COW,
    DEAD,
    DROP,
    DROPPING,
    FREE_X,
    HOST_SIZE,
    I_FRESH,
    I_HOME,
    I_MAP,
    I_NEW,
    I_NR,
    I_OLD,
    I_OP,
    I_PAGE,
    I_PROGRESS,
    I_REF,
    I_STATE,
    LIVE,
    MAP_OP,
    MAPPING,
    MAX_MAPS,
    MAX_PAGES,
    MOVE,
    OPS,
    OWNER,
    PTE,
    R_FRAMES,
    R_HOLDER,
    R_NR,
    R_STATE,
    SEND_HOME,
    SHARE,
    STATUS,
    V_AT,
    V_BACK,
    V_FRAME,
    V_PAGE,
    V_REF,
    World,
)  # fmt: skip
from .steps import step


def reclaim(w: World, h: int, frame: int) -> None:
    """Give a frame to the pool whose word still names the dead host; a compare-and-swap."""
    f, b = w.frames[frame], w.b
    if b[f + COUNT] > 1 or (b[f + OWNER] != h and w.bug != "reclaim any free frame"):
        return
    if b[f + COUNT]:
        w.count_down(frame, 0)
    b[f + OWNER] = b[f + COMING] = 0


def untouched(w: World, h: int) -> bool:
    """Tell whether the Ref of the intent is still as the operation found it."""
    o, b = w.hosts[h], w.b
    r = w.refs[b[o + I_REF] - 1]
    return bool(b[o + I_FRESH] and b[r + R_STATE] == b[o + I_STATE] and b[r + R_HOLDER] == h)


@step("recover.settle")
def settle(w: World, h: int) -> str:
    """Recovery reads the intent record."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    op = b[o + I_OP]
    b[c + V_AT] = 0
    if op in (ALLOC, FREE_X):
        return "recover.clear"
    if op in (SHARE, CLONE):
        return "recover.undo" if untouched(w, h) and b[o + I_PROGRESS] else "recover.settled"
    if op == MOVE:
        return "recover.settled" if untouched(w, h) else "recover.clear"
    if op == MAP_OP:
        if not b[o + I_PROGRESS]:
            return "recover.clear"
        return "recover.free mapped" if untouched(w, h) else "recover.settled"
    if op == DROP:
        r = w.refs[b[o + I_REF] - 1]
        if b[r + R_STATE] == DROPPING and b[r + R_HOLDER] == h:
            b[c + V_REF], b[c + V_AT] = b[o + I_REF] - 1, b[o + I_PROGRESS]
            if w.bug == "recovery drops from the start":
                b[c + V_AT] = 0
            b[c + V_BACK] = 0
            return "recover.drop"
    if op == COW:
        return "recover.new frames"
    if op == SEND_HOME and w.bug != "recovery leaves what was sent":
        return "recover.home"
    return "recover.settled"


@step("recover.clear", local=True)
def clear(w: World, h: int) -> str:
    """Recovery clears a page-table entry of the interrupted operation."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    b[w.page(h, b[o + I_MAP], b[o + I_PAGE] + b[c + V_AT]) + PTE] = 0
    b[c + V_AT] += 1
    if b[c + V_AT] < b[o + I_NR]:
        return "recover.clear"
    b[c + V_AT] = 0
    if b[o + I_OP] == ALLOC:
        return "recover.allocated"
    if b[o + I_OP] == FREE_X:
        b[c + V_AT] = b[o + I_PROGRESS]
        return "recover.finish" if b[c + V_AT] < b[o + I_NR] else "recover.settled"
    return "recover.settled"


@step("recover.allocated")
def allocated(w: World, h: int) -> str:
    """Recovery takes back a frame that was being allocated."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    reclaim(w, h, b[o + I_NEW + b[c + V_AT]] - 1)
    b[c + V_AT] += 1
    return "recover.allocated" if b[c + V_AT] < b[o + I_NR] else "recover.settled"


@step("recover.finish", local=True)
def finish(w: World, h: int) -> str:
    """Recovery notes that it frees the next frame of an exclusive run."""
    w.b[w.hosts[h] + I_PROGRESS] = w.b[w.coordinator + V_AT] + 1
    return "recover.finish free"


@step("recover.finish free")
def finish_free(w: World, h: int) -> str:
    """Recovery frees a frame that the host was freeing."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    frame = b[o + I_NEW + b[c + V_AT]] - 1
    if b[w.frames[frame] + COUNT] == 1:
        w.count_down(frame, 0)
    else:
        reclaim(w, h, frame)
    b[c + V_AT] += 1
    return "recover.finish" if b[c + V_AT] < b[o + I_NR] else "recover.settled"


@step("recover.undo", local=True)
def undo(w: World, h: int) -> str:
    """Recovery notes that a count taken for an unborn Ref is as good as dropped."""
    w.b[w.hosts[h] + I_PROGRESS] -= 1
    return "recover.undo count"


@step("recover.undo count")
def undo_count(w: World, h: int) -> str:
    """Recovery drops a count that was taken for an unborn Ref."""
    o, b = w.hosts[h], w.b
    i = b[o + I_PROGRESS]
    if b[o + I_OP] == SHARE:
        frame = b[w.page(h, b[o + I_MAP], i) + PTE]
    else:
        frame = b[w.refs[b[o + I_REF] - 1] + R_FRAMES + i]
    if frame:
        w.count_down(frame - 1, 0)
    return "recover.undo" if i else "recover.settled"


@step("recover.free mapped")
def free_mapped(w: World, h: int) -> str:
    """Recovery frees the entry of a Ref that has become a mapping."""
    w.make_free(w.b[w.hosts[h] + I_REF] - 1)
    return "recover.settled"


@step("recover.new frames")
def new_frames(w: World, h: int) -> str:
    """Recovery looks whether a page shows its new frame, and takes the frame back if not."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    at = b[c + V_AT]
    new = b[o + I_NEW + at]
    if b[w.page(h, b[o + I_MAP], b[o + I_PAGE] + at) + PTE] != new:
        reclaim(w, h, new - 1)
    elif at == b[o + I_PROGRESS]:
        return "recover.moved"
    b[c + V_AT] += 1
    return "recover.new frames" if b[c + V_AT] < b[o + I_NR] else "recover.settled"


@step("recover.moved", local=True)
def moved(w: World, h: int) -> str:
    """Recovery notes that the page's old frame is as good as dropped."""
    w.b[w.hosts[h] + I_PROGRESS] += 1
    return "recover.moved count"


@step("recover.moved count")
def moved_count(w: World, h: int) -> str:
    """Recovery drops the count of the old frame."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    w.count_down(b[o + I_OLD] - 1, 0)
    b[c + V_AT] += 1
    return "recover.new frames" if b[c + V_AT] < b[o + I_NR] else "recover.settled"


@step("recover.home")
def home(w: World, h: int) -> str:
    """Recovery looks whether there is somebody at home, where frames were being sent."""
    o, b = w.hosts[h], w.b
    return "recover.settled" if w.active(b[o + I_HOME]) else "recover.home back"


@step("recover.home back")
def home_back(w: World, h: int) -> str:
    """Compare-and-swap: recovery takes a frame that was being sent home; it is the pool's."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    frame = b[o + I_NEW + b[c + V_AT]] - 1
    if on_its_way(w, frame, b[o + I_HOME]):
        b[w.frames[frame] + OWNER] = b[w.frames[frame] + COMING] = 0
    b[c + V_AT] += 1
    return "recover.home" if b[c + V_AT] < b[o + I_NR] else "recover.settled"


@step("recover.settled", local=True)
def settled(w: World, h: int) -> str:
    """Recovery ends the intent."""
    w.end_intent(h)
    w.b[w.coordinator + V_AT] = w.b[w.coordinator + V_REF] = 0
    return "recover.refs"


# ---------------------------------------------------------------- Refs


@step("recover.refs")
def refs(w: World, h: int) -> str:
    """Recovery looks at a Ref, and takes it by compare-and-swap if the dead host held it."""
    c, b = w.coordinator, w.b
    r = w.refs[b[c + V_REF]]
    state = b[r + R_STATE]
    b[c + V_BACK] = 1
    b[c + V_AT] = 0
    if b[r + R_HOLDER] == h:
        if state == BUILDING:
            w.make_free(b[c + V_REF])
        elif w.bug == "recovery takes Refs by a store" and state == LIVE:
            return "recover.take blindly"
        elif state in (LIVE, MAPPING, CLONING, DROPPING):
            b[r + R_STATE] = DROPPING
            return "recover.drop"
    return next_ref(w)


def next_ref(w: World) -> str:
    """Go on with the next Ref."""
    c, b = w.coordinator, w.b
    b[c + V_AT] = 0
    b[c + V_REF] += 1
    if b[c + V_REF] < len(w.refs):
        return "recover.refs"
    b[c + V_REF] = 0
    return "recover.pages"


@step("recover.take blindly")
def take_blindly(w: World, h: int) -> str:
    """BUG: recovery takes a Ref by a plain store."""
    r = w.refs[w.b[w.coordinator + V_REF]]
    w.b[r + R_STATE], w.b[r + R_HOLDER] = DROPPING, h
    return "recover.drop"


@step("recover.drop", local=True)
def drop(w: World, h: int) -> str:
    """Recovery writes the intent DROP."""
    o, c, b = w.hosts[h], w.coordinator, w.b
    at = b[c + V_AT]
    w.end_intent(h)
    b[o + I_OP], b[o + I_REF], b[o + I_PROGRESS] = DROP, b[c + V_REF] + 1, at
    if at >= b[w.refs[b[c + V_REF]] + R_NR]:
        return "recover.dropped"
    return "recover.drop count" if w.bug == "recovery drops twice" else "recover.drop progress"


@step("recover.drop progress", local=True)
def drop_progress(w: World, h: int) -> str:
    """Recovery notes that a count of the Ref is as good as dropped."""
    c, b = w.coordinator, w.b
    b[w.hosts[h] + I_PROGRESS] = b[c + V_AT] + 1
    if w.bug == "recovery drops twice":
        b[c + V_AT] += 1
        more = b[c + V_AT] < b[w.refs[b[c + V_REF]] + R_NR]
        return "recover.drop count" if more else "recover.dropped"
    return "recover.drop count"


@step("recover.drop count")
def drop_count(w: World, h: int) -> str:
    """Recovery drops a count of the Ref."""
    c, b = w.coordinator, w.b
    r = w.refs[b[c + V_REF]]
    w.count_down(b[r + R_FRAMES + b[c + V_AT]] - 1, 0)
    if w.bug == "recovery drops twice":
        return "recover.drop progress"
    b[c + V_AT] += 1
    return "recover.drop progress" if b[c + V_AT] < b[r + R_NR] else "recover.dropped"


@step("recover.dropped")
def dropped(w: World, h: int) -> str:
    """Recovery frees the entry of a Ref that it has dropped."""
    w.make_free(w.b[w.coordinator + V_REF])
    return "recover.drop end"


@step("recover.drop end", local=True)
def drop_end(w: World, h: int) -> str:
    """Recovery ends the intent DROP."""
    w.end_intent(h)
    return next_ref(w) if w.b[w.coordinator + V_BACK] else "recover.settled"


# ---------------------------------------------------------------- pages and free frames


@step("recover.pages", local=True)
def pages(w: World, h: int) -> str:
    """Recovery clears a page-table entry."""
    c, b = w.coordinator, w.b
    for at in range(b[c + V_PAGE], MAX_MAPS * MAX_PAGES):
        pte = w.page(h, *divmod(at, MAX_PAGES)) + PTE
        if b[pte]:
            b[c + V_PAGE], b[c + V_FRAME] = at, b[pte]
            if w.bug != "recovery is not idempotent":
                b[pte] = 0
            return "recover.page count"
    b[c + V_PAGE] = b[c + V_FRAME] = 0
    return "recover.take"


@step("recover.page count")
def page_count(w: World, h: int) -> str:
    """Recovery drops the count of a page that was mapped."""
    c, b = w.coordinator, w.b
    w.count_down(b[c + V_FRAME] - 1, 0)
    return "recover.page late" if w.bug == "recovery is not idempotent" else "recover.pages"


@step("recover.page late", local=True)
def page_late(w: World, h: int) -> str:
    """BUG: recovery clears the page-table entry after its count."""
    c, b = w.coordinator, w.b
    b[w.page(h, *divmod(b[c + V_PAGE], MAX_PAGES)) + PTE] = 0
    return "recover.pages"


@step("recover.take")
def take(w: World, h: int) -> str:
    """Recovery takes a free frame of the dead host's."""
    c, b = w.coordinator, w.b
    frame = b[c + V_AT]
    if not b[w.frames[frame] + COUNT]:
        reclaim(w, h, frame)
    b[c + V_AT] += 1
    return "recover.take" if b[c + V_AT] < len(w.frames) else "recover.end"


def find_lost(w: World) -> None:
    """Count frames into the pool whose words say that they are the pool's."""
    b = w.b
    for frame, f in enumerate(w.frames):
        if not b[f + COUNT] and not b[f + OWNER]:
            b[w.coordinator + C_LEDGER] |= 1 << frame


@step("recover.end")
def end(w: World, h: int) -> str:
    """The pool is counted, and the slot of the dead host is free"""
    o, b = w.hosts[h], w.b
    find_lost(w)
    if b[o + STATUS] != DEAD:
        w.wrong(f"host {h} was reclaimed, and was not dead")
    ops = b[o + OPS]
    b[o : o + HOST_SIZE] = bytes(HOST_SIZE)
    b[o + STATUS], b[o + OPS] = ABSENT, ops
    return ""

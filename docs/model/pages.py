"""What hosts do to their own pages: ralloc, rfree, and the store fault (alloc.c, fault.c)."""

from __future__ import annotations

from .state import (
    ALLOC,
    AT,
    CONTENT,
    COPY,
    COUNT,
    COW,
    EXPECTED,
    FREE_LIST,
    FREE_X,
    HOME,
    I_MAP,
    I_NEW,
    I_NR,
    I_OLD,
    I_OP,
    I_PAGE,
    I_PROGRESS,
    KIND,
    M_EXCL,
    M_HOME,
    M_NR,
    M_VIEW,
    MAP,
    MAX_PAGES,
    NEW,
    NR,
    OLD,
    POISON,
    PROTECTED,
    PTE,
    R_VALUES,
    REF,
    SEEN,
    SHOWN,
    USED,
    ZEROED,
    World,
)  # fmt: skip
from .steps import step


def take_free(w: World, h: int, nr: int) -> list[int]:
    """Take the first `nr` frames of the free list; none if there are fewer."""
    o, b = w.hosts[h], w.b
    frames = [f for f in range(w.config.frames) if b[o + FREE_LIST] >> f & 1][:nr]
    if len(frames) < nr:
        return []
    for f in frames:
        b[o + FREE_LIST] &= ~(1 << f)
    return frames


def freed(w: World, h: int, frame: int) -> None:
    """Put a frame on the free list."""
    if w.b[w.hosts[h] + FREE_LIST] >> frame & 1:
        w.wrong(f"host {h} puts frame {frame} on its free list twice")
    w.b[w.hosts[h] + FREE_LIST] |= 1 << frame


def pages_intent(w: World, h: int, op: int, first: int, nr: int) -> None:
    """Write an intent record about pages of the mapping at hand, its op last."""
    o, b = w.hosts[h], w.b
    w.end_intent(h)
    b[o + I_OP], b[o + I_MAP], b[o + I_PAGE], b[o + I_NR] = op, b[o + MAP], first, nr


def store(w: World, h: int, index: int, page: int) -> None:
    """Change the bytes of a writable page, through the kernel mapping: no lock, no look."""
    at, b = w.page(h, index, page), w.b
    f = w.frames[b[at + SHOWN] - 1]
    value = 1 if b[at + EXPECTED] == 2 else 2
    b[f + CONTENT] = b[at + EXPECTED] = value
    view = b[w.mapping(h, index) + M_VIEW]
    if view:  # nobody can ask meanwhile what its Ref denotes
        b[w.refs[view - 1] + R_VALUES + page] = value


def next_page(w: World, h: int, again: str, then: str) -> str:
    """Go on with the next of the operation's pages."""
    o, b = w.hosts[h], w.b
    b[o + AT] += 1
    if b[o + AT] < b[o + NR]:
        return again
    b[o + AT] = 0
    return then


def drop_count(w: World, h: int, frame: int) -> None:
    """Give one count of a frame up."""
    if w.count_down(frame, h):
        freed(w, h, frame)


def keep_or_send(w: World, h: int) -> str:
    """A run that was exclusive is free, and on no list: it is kept, or sent home (home.py)."""
    o, b = w.hosts[h], w.b
    b[o + AT] = 0
    if b[o + HOME]:
        return "home.intent"
    for i in range(b[o + NR]):
        freed(w, h, b[o + NEW + i] - 1)
    return ""


# ---------------------------------------------------------------- ralloc


def begin_ralloc(w: World, h: int, index: int) -> str:
    """Take frames off the free list, and write the intent ALLOC."""
    o, b = w.hosts[h], w.b
    frames = take_free(w, h, w.config.pages)
    m = w.mapping(h, index)
    b[o + MAP], b[o + NR] = index, len(frames)
    b[m + USED], b[m + M_EXCL], b[m + M_NR] = 2, 1, len(frames)
    pages_intent(w, h, ALLOC, 0, len(frames))
    for i, f in enumerate(frames):
        b[o + NEW + i] = b[o + I_NEW + i] = f + 1
    return "ralloc.use"


@step("ralloc.use")
def ralloc_use(w: World, h: int) -> str:
    """The frame word goes from free to count 1."""
    o, b = w.hosts[h], w.b
    w.enter_use(b[o + NEW + b[o + AT]] - 1, h)
    return next_page(w, h, "ralloc.use", "ralloc.pte")


@step("ralloc.pte", local=True)
def ralloc_pte(w: World, h: int) -> str:
    """The page-table entry is written."""
    o, b = w.hosts[h], w.b
    at = w.page(h, b[o + MAP], b[o + AT])
    b[at + PTE] = b[at + SHOWN] = b[o + NEW + b[o + AT]]
    return next_page(w, h, "ralloc.pte", "ralloc.end")


@step("ralloc.end")
def ralloc_end(w: World, h: int) -> str:
    """The intent ends; the frames are cleared, and the mapping is the program's."""
    o, b = w.hosts[h], w.b
    for i in range(b[o + NR]):
        b[w.frames[b[o + NEW + i] - 1] + CONTENT] = ZEROED
        b[w.page(h, b[o + MAP], i) + EXPECTED] = ZEROED
    b[w.mapping(h, b[o + MAP]) + USED] = 1
    w.end_intent(h)
    return ""


# ---------------------------------------------------------------- rfree


def begin_rfree(w: World, h: int, index: int) -> str:
    """The program gives the mapping up."""
    o, b = w.hosts[h], w.b
    m = w.mapping(h, index)
    b[m + USED] = 3
    b[o + MAP], b[o + NR], b[o + HOME] = index, b[m + M_NR], b[m + M_HOME]
    if b[m + M_VIEW]:
        b[o + REF] = b[m + M_VIEW]
        return "view.free"
    if b[m + M_EXCL]:
        return "freex.intent"
    return "rfree.down first" if w.bug == "uncount before unmap" else "rfree.pte"


@step("freex.intent", local=True)
def freex_intent(w: World, h: int) -> str:
    """The intent FREE_X is written."""
    o, b = w.hosts[h], w.b
    pages_intent(w, h, FREE_X, 0, b[o + NR])
    for i in range(b[o + NR]):
        b[o + I_NEW + i] = b[w.page(h, b[o + MAP], i) + PTE]
    return "freex.pte"


@step("freex.pte", local=True)
def freex_pte(w: World, h: int) -> str:
    """The page-table entry is cleared."""
    o, b = w.hosts[h], w.b
    b[w.page(h, b[o + MAP], b[o + AT]) + PTE] = 0
    return next_page(w, h, "freex.pte", "freex.leave")


@step("freex.leave")
def freex_leave(w: World, h: int) -> str:
    """The frame word goes to 0 by a plain store: the host is its only holder."""
    o, b = w.hosts[h], w.b
    w.leave_use(b[o + I_NEW + b[o + AT]] - 1, h)
    return next_page(w, h, "freex.leave", "freex.end")


@step("freex.end", local=True)
def freex_end(w: World, h: int) -> str:
    """The intent ends; the frames go to the free list, or home."""
    o, b = w.hosts[h], w.b
    b[o + NEW : o + NEW + MAX_PAGES] = b[o + I_NEW : o + I_NEW + MAX_PAGES]
    w.end_intent(h)
    w.delete_mapping(h, b[o + MAP])
    return keep_or_send(w, h)


@step("rfree.pte", local=True)
def rfree_pte(w: World, h: int) -> str:
    """The page-table entry is cleared."""
    o, b = w.hosts[h], w.b
    at = w.page(h, b[o + MAP], b[o + AT])
    b[o + OLD] = b[at + PTE]
    b[at + PTE] = b[at + SHOWN] = 0
    return "rfree.look" if w.bug == "decide by a look" else "rfree.down"


@step("rfree.down")
def rfree_down(w: World, h: int) -> str:
    """The count is dropped."""
    o, b = w.hosts[h], w.b
    drop_count(w, h, b[o + OLD] - 1)
    return next_page(w, h, "rfree.pte", "rfree.end")


@step("rfree.end", local=True)
def rfree_end(w: World, h: int) -> str:
    """The mapping is forgotten."""
    w.delete_mapping(h, w.b[w.hosts[h] + MAP])
    return ""


@step("rfree.look")
def rfree_look(w: World, h: int) -> str:
    """BUG: looks whether its count is the last one."""
    o, b = w.hosts[h], w.b
    b[o + SEEN] = b[w.frames[b[o + OLD] - 1] + COUNT]
    return "rfree.blind"


@step("rfree.blind")
def rfree_blind(w: World, h: int) -> str:
    """BUG: drops the count, and frees the frame if it looked like the last one."""
    o, b = w.hosts[h], w.b
    frame = b[o + OLD] - 1
    if b[o + SEEN] == 1:
        w.leave_use(frame, h)
        freed(w, h, frame)
    else:
        b[w.frames[frame] + COUNT] -= 1
    return next_page(w, h, "rfree.pte", "rfree.end")


@step("rfree.down first")
def rfree_down_first(w: World, h: int) -> str:
    """BUG: drops the count, while the page-table entry stands."""
    o, b = w.hosts[h], w.b
    drop_count(w, h, b[w.page(h, b[o + MAP], b[o + AT]) + PTE] - 1)
    return "rfree.pte last"


@step("rfree.pte last", local=True)
def rfree_pte_last(w: World, h: int) -> str:
    """BUG: clears the page-table entry behind the count."""
    o, b = w.hosts[h], w.b
    b[w.page(h, b[o + MAP], b[o + AT]) + PTE] = 0
    return next_page(w, h, "rfree.down first", "rfree.end")


# ---------------------------------------------------------------- the store fault


def begin_fault(w: World, h: int, index: int, page: int) -> str:
    """A store hits a protected page, and sleeps until the handler has served it."""
    o, b = w.hosts[h], w.b
    b[o + MAP], b[o + AT], b[o + COPY] = index, page, page
    view = b[w.mapping(h, index) + M_VIEW]
    if view:
        b[o + REF], b[o + KIND] = view, 1  # refs.BY_FAULT
        return "view.materialise"
    return "fault.look"


@step("fault.look")
def fault_look(w: World, h: int) -> str:
    """The handler looks whether others hold the frame too."""
    o, b = w.hosts[h], w.b
    index, first = b[o + MAP], b[o + COPY]
    b[o + AT] = 0
    nr = 0
    for page in range(first, b[w.mapping(h, index) + M_NR]):  # a window, as long as it is alike
        at = w.page(h, index, page)
        count = b[w.frames[b[at + PTE] - 1] + COUNT] if b[at + PTE] else 0
        if not b[at + PROTECTED] or count <= (2 if w.bug == "upgrade a shared page" else 1):
            break
        nr += 1
    if not nr:
        return "fault.upgrade"
    frames = take_free(w, h, nr) or take_free(w, h, 1)
    if not frames:
        return ""  # put aside: the thread sleeps on
    b[o + NR] = len(frames)
    for i, f in enumerate(frames):
        b[o + NEW + i] = f + 1
    return "cow.intent"


@step("fault.upgrade")
def fault_upgrade(w: World, h: int) -> str:
    """The page is made writable in place, and the store happens."""
    o, b = w.hosts[h], w.b
    b[w.page(h, b[o + MAP], b[o + COPY]) + PROTECTED] = 0
    return "fault.store"


@step("fault.store")
def fault_store(w: World, h: int) -> str:
    """The store goes on."""
    o, b = w.hosts[h], w.b
    store(w, h, b[o + MAP], b[o + COPY])
    return ""


@step("cow.intent", local=True)
def cow_intent(w: World, h: int) -> str:
    """The intent COW is written."""
    o, b = w.hosts[h], w.b
    pages_intent(w, h, COW, b[o + COPY], b[o + NR])
    for i in range(b[o + NR]):
        b[o + I_NEW + i] = b[o + NEW + i]
    return "cow.use"


@step("cow.use")
def cow_use(w: World, h: int) -> str:
    """The new frame's word goes from free to count 1."""
    o, b = w.hosts[h], w.b
    w.enter_use(b[o + NEW + b[o + AT]] - 1, h)
    then = "cow.down early" if w.bug == "drop before copy" else "cow.copy"
    return next_page(w, h, "cow.use", then)


@step("cow.copy")
def cow_copy(w: World, h: int) -> str:
    """The bytes are copied."""
    o, b = w.hosts[h], w.b
    old = b[w.page(h, b[o + MAP], b[o + COPY] + b[o + AT]) + PTE]
    b[w.frames[b[o + NEW + b[o + AT]] - 1] + CONTENT] = b[w.frames[old - 1] + CONTENT]
    return next_page(w, h, "cow.copy", "cow.show")


@step("cow.show")
def cow_show(w: World, h: int) -> str:
    """The pages show the new frames, writable."""
    o, b = w.hosts[h], w.b
    for i in range(b[o + NR]):
        at = w.page(h, b[o + MAP], b[o + COPY] + i)
        b[at + SHOWN], b[at + PROTECTED] = b[o + NEW + i], 0
    return "cow.old"


@step("cow.old", local=True)
def cow_old(w: World, h: int) -> str:
    """The record names the old frame."""
    o, b = w.hosts[h], w.b
    b[o + OLD] = b[o + I_OLD] = b[w.page(h, b[o + MAP], b[o + COPY] + b[o + AT]) + PTE]
    return "cow.down" if w.bug == "repoint after the drop" else "cow.pte"


@step("cow.pte", local=True)
def cow_pte(w: World, h: int) -> str:
    """The page-table entry names the new frame."""
    o, b = w.hosts[h], w.b
    b[w.page(h, b[o + MAP], b[o + COPY] + b[o + AT]) + PTE] = b[o + NEW + b[o + AT]]
    if w.bug in ("repoint after the drop", "drop before copy"):
        return next_page(w, h, "cow.old", "cow.end")
    return "cow.down early" if w.bug == "copy progress after count" else "cow.progress"


@step("cow.progress", local=True)
def cow_progress(w: World, h: int) -> str:
    """Progress says that the page has moved."""
    o, b = w.hosts[h], w.b
    b[o + I_PROGRESS] = b[o + AT] + 1
    if w.bug == "copy progress after count":
        return next_page(w, h, "cow.old", "cow.end")
    return "cow.look" if w.bug == "decide by a look" else "cow.down"


@step("cow.down")
def cow_down(w: World, h: int) -> str:
    """The count of the old frame is dropped."""
    o, b = w.hosts[h], w.b
    drop_count(w, h, b[o + OLD] - 1)
    if w.bug == "repoint after the drop":
        return "cow.pte"
    return next_page(w, h, "cow.old", "cow.end")


@step("cow.end", local=True)
def cow_end(w: World, h: int) -> str:
    """The intent ends."""
    w.end_intent(h)
    return "fault.store"


@step("cow.down early")
def cow_down_early(w: World, h: int) -> str:
    """BUG: drops the count of the old frame too early."""
    o, b = w.hosts[h], w.b
    if w.bug == "copy progress after count":
        drop_count(w, h, b[o + OLD] - 1)
        return "cow.progress"
    drop_count(w, h, b[w.page(h, b[o + MAP], b[o + COPY] + b[o + AT]) + PTE] - 1)
    return next_page(w, h, "cow.down early", "cow.copy")


@step("cow.look")
def cow_look(w: World, h: int) -> str:
    """BUG: looks whether its count of the old frame is the last one."""
    o, b = w.hosts[h], w.b
    b[o + SEEN] = b[w.frames[b[o + OLD] - 1] + COUNT]
    return "cow.blind"


@step("cow.blind")
def cow_blind(w: World, h: int) -> str:
    """BUG: drops the count, and frees the frame only if it looked like the last one."""
    o, b = w.hosts[h], w.b
    f = w.frames[b[o + OLD] - 1]
    if b[o + SEEN] == 1:
        b[f + CONTENT] = POISON
        freed(w, h, b[o + OLD] - 1)
    b[f + COUNT] -= 1
    return next_page(w, h, "cow.old", "cow.end")

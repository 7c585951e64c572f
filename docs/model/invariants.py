"""What must hold: in every state, and exactly whenever nothing is under way."""

from __future__ import annotations

from .state import (
    ACTIVE,
    C_LEDGER,
    C_UP,
    CLONING,
    COMING,
    CONTENT,
    COUNT,
    DEAD,
    EXPECTED,
    FREE,
    FREE_LIST,
    G_HOST,
    GONE,
    I_OP,
    I_PROGRESS,
    INTENTS,
    LEAKS,
    LINK,
    LIVE,
    M_EXCL,
    M_NR,
    M_VIEW,
    MAP_SIZE,
    MAPPING,
    MAPS,
    MAX_MAPS,
    MAX_PAGES,
    OWNER,
    PAGE_SIZE,
    PAGES,
    PC,
    PROTECTED,
    PTE,
    QUIET,
    R_EXCL,
    R_FRAMES,
    R_HOLDER,
    R_NR,
    R_STATE,
    R_VALUES,
    REF_STATES,
    SHOWN,
    STATUS,
    STATUSES,
    USED,
    V_PC,
    World,
)  # fmt: skip
from .steps import NAMES

ALWAYS = (
    "isolation: the bytes of every mapping and Ref are those its own stores left",
    "no frame is free that a mapping shows or a Ref covers",
    "a frame on a free list or in the pool's books has count 0, and its word names that owner",
    "no word is taken to use, counted or freed by one who may not (checked in each step)",
    "a Ref has one holder: no superseded bytes are honoured, nobody gets what it never held",
)
AT_REST = (
    "conservation: every frame is in use, or free on one live host's list, or coming home to one, or "
    "in the pool's books",
    "counts: refcount = pages mapping the frame + live Refs covering it; at most one count too "
    "many for each crash, never one too few",
    "recovery: no Ref has a holder that is gone, none is stuck between two states",
)


def host_wrong(w: World, h: int) -> str:
    """Check the mappings and the free list of a living host."""
    b, frames, o = w.b, w.frames, w.hosts[h]
    for index in range(MAX_MAPS):
        m = o + MAPS + MAP_SIZE * index
        if b[m + USED] != 1:
            continue
        for page in range(b[m + M_NR]):
            at = m + PAGES + PAGE_SIZE * page
            f = frames[b[at + SHOWN] - 1]
            where = f"page {page} of mapping {index} of host {h}"
            if not b[f + COUNT]:
                return f"{where} shows frame {b[at + SHOWN] - 1}, which is free"
            if b[f + CONTENT] != b[at + EXPECTED]:
                return changed(where, b[f + CONTENT], b[at + EXPECTED])
    listed = b[o + FREE_LIST]
    if listed:
        for frame, f in enumerate(frames):
            if listed >> frame & 1 and (b[f + COUNT] or b[f + OWNER] != h or b[f + COMING]):
                return f"frame {frame} is on the free list of host {h}, and its word says otherwise"
    return ""


def changed(where: str, now: int, before: int) -> str:
    """Say that somebody else has stored to these bytes."""
    return f"the bytes of {where} have changed: {now} instead of {before}"


def always(w: World) -> str:
    """Check what must hold in every state; return what does not."""
    b, frames = w.b, w.frames
    for h in range(1, len(w.hosts)):
        if b[w.hosts[h] + STATUS] == ACTIVE:
            error = host_wrong(w, h)
            if error:
                return error
    for ref, r in enumerate(w.refs):
        if b[r + R_STATE] in (LIVE, MAPPING, CLONING):
            for i in range(b[r + R_NR]):
                f = frames[b[r + R_FRAMES + i] - 1]
                if not b[f + COUNT]:
                    return f"Ref {ref} covers frame {b[r + R_FRAMES + i] - 1}, which is free"
                if b[f + CONTENT] != b[r + R_VALUES + i]:
                    return changed(f"Ref {ref}", b[f + CONTENT], b[r + R_VALUES + i])
    ledger = b[w.coordinator + C_LEDGER]
    if ledger:
        for frame, f in enumerate(frames):
            if ledger >> frame & 1 and (b[f + COUNT] or b[f + OWNER]):
                return f"frame {frame} is in the pool's books, and its word says otherwise"
    return ""


def resting(w: World) -> bool:
    """Tell whether nothing is under way: no operation, message, unsettled death or recovery."""
    b, c = w.b, w.coordinator
    if not b[c + C_UP] or b[c + G_HOST] or b[c + V_PC]:
        return False
    for o in w.hosts[1:]:
        if b[o + PC] or b[o + LINK] != QUIET or b[o + STATUS] in (GONE, DEAD):
            return False
    return True


def holders_of(w: World) -> list[int]:
    """Count, for each frame, the pages that map it and the live Refs that cover it."""
    b, holders = w.b, [0] * len(w.frames)
    for h in range(1, len(w.hosts)):
        for at in range(MAX_MAPS * MAX_PAGES):
            pte = b[w.page(h, *divmod(at, MAX_PAGES)) + PTE]
            if pte:
                holders[pte - 1] += 1
    for r in w.refs:
        if b[r + R_STATE] == LIVE:
            for i in range(b[r + R_NR]):
                holders[b[r + R_FRAMES + i] - 1] += 1
    return holders


def at_rest(w: World) -> str:
    """Account for every frame exactly, in a state in which nothing is under way."""
    b, c = w.b, w.coordinator
    for h in range(1, len(w.hosts)):
        if b[w.hosts[h] + I_OP]:
            return f"host {h} does nothing, and has an intent"
    for ref, r in enumerate(w.refs):
        if b[r + R_STATE] not in (FREE, LIVE):
            return f"Ref {ref} is stuck in state {REF_STATES[b[r + R_STATE]]}"
        if b[r + R_STATE] == LIVE and b[w.hosts[b[r + R_HOLDER]] + STATUS] != ACTIVE:
            return f"Ref {ref} is held by host {b[r + R_HOLDER]}, which is gone"
    holders, extra = holders_of(w), 0
    for frame, f in enumerate(w.frames):
        count, owner = b[f + COUNT], b[f + OWNER]
        if count < holders[frame]:
            return f"frame {frame} has {holders[frame]} holders and a count of {count}"
        extra += count - holders[frame]
        if count:
            continue
        if owner and b[w.hosts[owner] + STATUS] != ACTIVE:
            return f"frame {frame} is lost: host {owner}, which is gone, owns it"
        if b[f + COMING]:
            continue  # its owner finds it when it looks
        if owner and not b[w.hosts[owner] + FREE_LIST] >> frame & 1:
            return f"frame {frame} is lost: host {owner} owns it and does not know"
        if not owner and not b[c + C_LEDGER] >> frame & 1:
            return f"frame {frame} is lost: the pool owns it and the coordinator does not know"
    if extra > b[c + LEAKS]:
        return f"{extra} counts too many are left behind, by {b[c + LEAKS]} crashes"
    return ""


def describe(w: World) -> str:
    """Write a state down in one paragraph."""
    b, c = w.b, w.coordinator
    parts = []
    for frame, f in enumerate(w.frames):
        who = f"h{b[f + OWNER]}" if b[f + OWNER] else "pool"
        who += ", coming" if b[f + COMING] else ""
        parts.append(f"f{frame}: count {b[f + COUNT]}, owner {who}, bytes {b[f + CONTENT]}")
    lines = ["; ".join(parts)]
    for ref, r in enumerate(w.refs):
        if b[r + R_STATE]:
            covers = [b[r + R_FRAMES + i] - 1 for i in range(b[r + R_NR])]
            flag = " exclusive" if b[r + R_EXCL] else ""
            lines.append(
                f"Ref {ref}: {REF_STATES[b[r + R_STATE]]} of h{b[r + R_HOLDER]}{flag}, frames {covers}"
            )
    for h in range(1, len(w.hosts)):
        o = w.hosts[h]
        parts = [STATUSES[b[o + STATUS]]]
        if b[o + PC]:
            parts.append(f"at {NAMES[b[o + PC]]}")
        if b[o + I_OP]:
            parts.append(f"intent {INTENTS[b[o + I_OP]]}, progress {b[o + I_PROGRESS]}")
        free = [f for f in range(len(w.frames)) if b[o + FREE_LIST] >> f & 1]
        parts.append(f"free {free}")
        for index in range(MAX_MAPS):
            m = w.mapping(h, index)
            pages = [w.page(h, index, p) for p in range(MAX_PAGES)]
            if not b[m + USED] and not any(b[at + PTE] for at in pages):
                continue
            kind = ("dead", "", "being made", "given up")[b[m + USED]]
            kind += " view" if b[m + M_VIEW] else ""
            kind += " exclusive" if b[m + M_EXCL] else ""
            shown = ", ".join(
                f"PTE {b[at + PTE] - 1 if b[at + PTE] else '-'}"
                f" shows {b[at + SHOWN] - 1 if b[at + SHOWN] else '-'}"
                + (" read-only" if b[at + PROTECTED] else "")
                for at in pages[: max(1, b[m + M_NR])]
            )
            parts.append(f"mapping {index}{' ' + kind.strip() if kind.strip() else ''} ({shown})")
        lines.append(f"h{h}: " + ", ".join(parts))
    if not b[c + C_UP]:
        lines.append("no coordinator")
    elif b[c + V_PC]:
        lines.append(f"recovery at {NAMES[b[c + V_PC]]}")
    return "\n".join(lines)

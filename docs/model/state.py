"""The state of the model: one string of bytes, so that states are cheap to copy, compare and keep.

Frames and Ref entries are what the device holds; a host's block holds its page table and intent
record (device), its free list, mappings and registers (its process), and its connection. Numbers of
frames and Refs that may be absent are stored plus one; 0 means none. Hosts count from 1, as in the
device, so an owner of 0 is the pool.

Generations are not numbers here, for only one question is ever asked of them: is it still the one
that was read? So whatever remembers a generation has a mark "fresh", and `bump` takes the marks
away.
"""

from __future__ import annotations

from dataclasses import dataclass

# Frame block: the word (refcount, owner, coming) and the content, one small value.
COUNT, OWNER, COMING, CONTENT, FRAME_SIZE = 0, 1, 2, 3, 4
ZEROED, POISON = 0, 7
"""Content of a frame that ralloc has cleared, and of one that is free: anything may be in it."""

# Ref block. KNOWN: the bytes of this generation were handed out. SUPERSEDED (a ghost): bytes of this
# generation were handed out and the Ref has changed its holder since, which must never be.
R_STATE, R_EXCL, R_HOLDER, R_NR, R_FRAMES, R_VALUES = 0, 1, 2, 3, 4, 6
R_KNOWN, R_SUPERSEDED, R_CREATOR, REF_SIZE = 8, 9, 10, 11
FREE, BUILDING, LIVE, MAPPING, DROPPING, CLONING = range(6)
REF_STATES = ("FREE", "BUILDING", "LIVE", "MAPPING", "DROPPING", "CLONING")

# Host block: entry, registers, free list, connection, intent record, mappings.
STATUS, PC, OPS, MAP, REF, COPY, AT, NR, NEW, OLD, SEEN = 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11
W_EXCL, W_HOLDER, W_FRESH, INCARNATION, TRUE_HOLDER, KIND = 12, 13, 14, 15, 16, 17
HOME, FREE_LIST, LINK, CARGO = 18, 19, 20, 21
I_OP, I_REF, I_STATE, I_FRESH, I_MAP, I_PAGE, I_NR = 22, 23, 24, 25, 26, 27, 28
I_PROGRESS, I_NEW, I_OLD, I_HOME, MAPS = 29, 30, 32, 33, 34
REGISTERS = slice(MAP, FREE_LIST)
INTENT = slice(I_OP, MAPS)
ABSENT, ACTIVE, GONE, DEAD = range(4)
"""A host's slot is free; its process lives; its process has ended; it was declared dead."""
STATUSES = ("free", "active", "gone", "dead")
NO_OP, ALLOC, FREE_X, SHARE, MOVE, MAP_OP, CLONE, DROP, COW, SEND_HOME = range(10)
INTENTS = ("none", "ALLOC", "FREE_X", "SHARE", "MOVE", "MAP", "CLONE", "DROP", "COW", "HOME")
QUIET, ASKED, GRANTED, GIVING, COUNTED, CUT, CUT_GIVING, REJOINED = range(8)
"""A connection: nothing under way; GRANT sent; its answer under way; RETURN sent; its answer under
way; cut; cut with a RETURN unanswered; up again, and the frame words not looked through yet."""

# Mapping block, and its pages. USED: 0 no mapping, 1 the program's, 2 being made, 3 given up.
# M_HOME: who made the Ref that an exclusive mapping came in, if that was another host.
USED, M_EXCL, M_VIEW, M_NR, M_HOME, PAGES = 0, 1, 2, 3, 4, 5
PTE, SHOWN, PROTECTED, EXPECTED, PAGE_SIZE = 0, 1, 2, 3, 4
MAX_PAGES, MAX_MAPS = 2, 2
MAP_SIZE = PAGES + MAX_PAGES * PAGE_SIZE
HOST_SIZE = MAPS + MAX_MAPS * MAP_SIZE

# Coordinator block. C_*: itself; G_*: a grant it is making; V_*: a recovery it is making.
C_UP, C_LEDGER, G_HOST, G_FRAME, V_PC, V_HOST, V_AT, V_PAGE, V_FRAME = range(9)
V_REF, V_BACK, HOST_CRASHES, C_CRASHES, RESTARTS, LEAKS, COORDINATOR_SIZE = range(9, 16)
RECOVERY = slice(V_PC, HOST_CRASHES)


@dataclass(frozen=True)
class Config:
    """What is explored: sizes, what hosts may do, and how often what may happen."""

    name: str
    hosts: int = 2
    frames: int = 2
    refs: int = 2
    pages: int = 1
    ops: int = 2
    crashes: int = 1
    coordinator_crashes: int = 0
    restarts: int = 0
    failures: bool = False
    """map_ref may fail after it took the Ref, and puts it back."""
    menu: tuple[str, ...] = ()
    setup: tuple[tuple[int, str], ...] = ()
    """Operations (host, name) that are done, undisturbed, before the exploration begins."""
    frames_at: tuple[int, ...] = ()
    """Whose each frame is in the beginning; missing ones are the pool's."""
    bug: str = ""


class World:
    """One state, opened for a step: its bytes, where its blocks are, and what went wrong."""

    __slots__ = ("b", "bug", "config", "coordinator", "error", "frames", "hosts", "refs")

    def __init__(self, config: Config) -> None:
        """Begin with every frame in the pool and every host active and idle."""
        self.config, self.bug, self.error = config, config.bug, ""
        at = 0
        self.frames = [at + FRAME_SIZE * i for i in range(config.frames)]
        at += FRAME_SIZE * config.frames
        self.refs = [at + REF_SIZE * i for i in range(config.refs)]
        at += REF_SIZE * config.refs
        self.hosts = [0, *(at + HOST_SIZE * i for i in range(config.hosts))]
        at += HOST_SIZE * config.hosts
        self.coordinator = at
        self.b = bytearray(at + COORDINATOR_SIZE)
        for f in self.frames:
            self.b[f + CONTENT] = POISON
        for h in self.hosts[1:]:
            self.b[h + STATUS] = ACTIVE
            self.b[h + OPS] = config.ops
        self.b[at + C_UP] = 1
        self.b[at + HOST_CRASHES] = config.crashes
        self.b[at + C_CRASHES] = config.coordinator_crashes
        self.b[at + RESTARTS] = config.restarts
        for index, owner in enumerate(config.frames_at):
            self.b[self.frames[index] + OWNER] = owner
            if owner:
                self.b[self.hosts[owner] + FREE_LIST] |= 1 << index
        for index, f in enumerate(self.frames):
            if not self.b[f + OWNER]:
                self.b[at + C_LEDGER] |= 1 << index

    def wrong(self, what: str) -> None:
        """Take note of the first thing that went wrong in this step."""
        self.error = self.error or what

    # ---------------------------------------------------------------- words

    def enter_use(self, frame: int, host: int) -> None:
        """0 -> 1, a plain store: nobody else may change the word of this host's free frame."""
        at = self.frames[frame]
        if self.b[at + COUNT] or self.b[at + OWNER] != host or self.b[at + COMING]:
            self.wrong(f"host {host} takes frame {frame} into use, which is not its free frame")
        self.b[at + COUNT] = 1
        self.b[at + OWNER] = host

    def leave_use(self, frame: int, host: int) -> None:
        """1 -> 0, a plain store of one who believes that it is the only holder."""
        at = self.frames[frame]
        if self.b[at + COUNT] != 1:
            self.wrong(f"host {host} frees frame {frame} as its only holder; it is not")
        self.b[at + COUNT] = 0
        self.b[at + OWNER], self.b[at + COMING] = host, 0
        self.b[at + CONTENT] = POISON

    def send(self, frame: int, host: int, home: int) -> None:
        """Hand a free frame of this host's over: a plain store, for nobody else may change it."""
        at = self.frames[frame]
        if self.b[at + COUNT] or self.b[at + OWNER] != host or self.b[at + COMING]:
            self.wrong(f"host {host} sends frame {frame} home, which is not its free frame")
        self.b[at + OWNER], self.b[at + COMING] = home, 1

    def count_up(self, frame: int) -> None:
        """+1, atomic."""
        at = self.frames[frame]
        if not self.b[at + COUNT]:
            self.wrong(f"a count is taken of frame {frame}, which is free")
        self.b[at + COUNT] += 1

    def count_down(self, frame: int, owner: int) -> bool:
        """-1, atomic; the last one makes the frame the owner's. True when it was the last."""
        at = self.frames[frame]
        if not self.b[at + COUNT]:
            if owner:
                self.wrong(f"host {owner} drops a count of frame {frame}, which is free")
            return False  # recovery passes over it
        self.b[at + COUNT] -= 1
        if self.b[at + COUNT]:
            return False
        self.b[at + OWNER] = owner
        self.b[at + CONTENT] = POISON
        return True

    def bump(self, ref: int) -> None:
        """Take the next generation: what was read of the Ref before is stale, for ever."""
        b = self.b
        for h in self.hosts[1:]:
            if b[h + REF] == ref + 1:
                b[h + W_FRESH] = 0
            if b[h + I_OP] and b[h + I_REF] == ref + 1:
                b[h + I_FRESH] = 0
        r = self.refs[ref]
        b[r + R_KNOWN] = b[r + R_SUPERSEDED] = 0

    def make_free(self, ref: int) -> None:
        """Free a Ref entry: the next generation."""
        self.bump(ref)
        self.b[self.refs[ref] : self.refs[ref] + REF_SIZE] = bytes(REF_SIZE)

    # ---------------------------------------------------------------- host h

    def active(self, h: int) -> bool:
        """Tell whether the entry of host h says ACTIVE: its process may have ended already."""
        return self.b[self.hosts[h] + STATUS] in (ACTIVE, GONE)

    def idle(self, h: int) -> None:
        """Forget the registers of a host that ends an operation."""
        self.b[self.hosts[h] + MAP : self.hosts[h] + FREE_LIST] = bytes(FREE_LIST - MAP)

    def end_intent(self, h: int) -> None:
        """Zero the record. With op 0 the other fields mean nothing, so they need not differ."""
        self.b[self.hosts[h] + I_OP : self.hosts[h] + MAPS] = bytes(MAPS - I_OP)

    def mapping(self, h: int, index: int) -> int:
        """Return where a mapping's block is."""
        return self.hosts[h] + MAPS + MAP_SIZE * index

    def page(self, h: int, index: int, page: int) -> int:
        """Return where the block of a mapping's page is."""
        return self.hosts[h] + MAPS + MAP_SIZE * index + PAGES + PAGE_SIZE * page

    def delete_mapping(self, h: int, index: int) -> None:
        """Forget a mapping whose page-table entries are gone."""
        m = self.mapping(h, index)
        if any(self.b[self.page(h, index, p) + PTE] for p in range(MAX_PAGES)):
            self.wrong(f"host {h} forgets a mapping that has page-table entries")
        self.b[m : m + MAP_SIZE] = bytes(MAP_SIZE)

"""Breadth-first exploration of every interleaving, up to two reductions that lose nothing.

Symmetry. Hosts differ in their number alone, so of the states that renumbering turns into one
another one is kept. Sound because no step asks which of two hosts has the lower number; where the
order of hosts could matter, all are offered.

Local steps. When the next step of a process touches nothing but what it alone looks at (its intent
record, its page table), then only that step and the process's crash right before it are followed
from this state: every other step can come just as well afterwards, with the same result. Local
steps never end a promise that `invariants.always` checks, they only begin some.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from . import failing, home, invariants, protocol
from .state import (
    ACTIVE,
    AT,
    C_CRASHES,
    C_UP,
    G_HOST,
    HOME,
    HOST_CRASHES,
    HOST_SIZE,
    I_HOME,
    M_HOME,
    MAP_SIZE,
    MAPS,
    MAX_MAPS,
    NEW,
    OPS,
    OWNER,
    PC,
    R_CREATOR,
    R_HOLDER,
    STATUS,
    V_HOST,
    V_PC,
    W_HOLDER,
    Config,
    World,
)  # fmt: skip
from .steps import LOCAL, NAMES, NUMBERS, STEPS, TEXTS

NUMBERED = (W_HOLDER, HOME, I_HOME, *(MAPS + MAP_SIZE * i + M_HOME for i in range(MAX_MAPS)))
"""Where a host's block holds the number of a host."""
SETUP_MENU = ("ralloc", "share", "move", "map", "view", "drop")


class TooMany(Exception):
    """More states than were allowed."""


@dataclass
class Result:
    """What an exploration found."""

    config: Config
    states: int = 0
    transitions: int = 0
    depth: int = 0
    at_rest: int = 0
    seconds: float = 0.0
    error: str = ""
    trace: list[tuple[str, str]] = field(default_factory=list)
    """What happened, and the state behind it, from the initial state to the error."""
    sights: set[str] = field(default_factory=set)
    """Situations of note that the exploration went through."""
    crashed_at: set[str] = field(default_factory=set)
    """The steps before which a host or a recovery was killed."""


def local_only(w: World) -> list[protocol.Action]:
    """Return what may happen to a process whose next step is local; empty when there is none."""
    b, c = w.b, w.coordinator
    for h in range(1, len(w.hosts)):
        pc = b[w.hosts[h] + PC]
        if pc and LOCAL[pc]:
            found: list[protocol.Action] = [(f"host {h}: {TEXTS[pc]}", protocol.run(h, STEPS[pc]))]
            if b[c + HOST_CRASHES]:
                found.append((f"host {h} is killed (before {NAMES[pc]})", protocol.crash_host(h)))
            return found
    pc = b[c + V_PC]
    if pc and LOCAL[pc]:
        found = [(f"recovery of host {b[c + V_HOST]}: {TEXTS[pc]}", protocol.recover)]
        if b[c + C_CRASHES]:
            found.append(
                (f"the coordinator is killed (before {NAMES[pc]})", protocol.crash_coordinator)
            )
        return found
    return []


def everything(w: World) -> Iterator[protocol.Action]:
    """Offer all that may happen."""
    b, c = w.b, w.coordinator
    for h in range(1, len(w.hosts)):
        o = w.hosts[h]
        if b[o + STATUS] != ACTIVE:
            continue
        pc = b[o + PC]
        if pc:
            yield f"host {h}: {TEXTS[pc]}", protocol.run(h, STEPS[pc])
            if NAMES[pc] == "map.place" and w.config.failures:
                back = NUMBERS["back.look" if w.bug in failing.TO_OLD_HOLDER else "back.store"]
                yield f"host {h}: {TEXTS[back]}", protocol.run(h, STEPS[back])
        elif b[o + OPS]:
            yield from protocol.operations(w, h)
        if not pc or NAMES[pc] == "fault.look":  # who takes in has the host's lock
            yield from home.arrivals(w, h)
        if b[o + OPS] and "store" in w.config.menu:
            yield from protocol.stores(w, h, not pc)
        if "grant" in w.config.menu or "return" in w.config.menu:
            yield from protocol.connection(w, h, not pc)
        if b[c + HOST_CRASHES]:
            yield (
                f"host {h} is killed (before {NAMES[pc] or 'its next operation'})",
                protocol.crash_host(h),
            )
    yield from protocol.coordinator(w)
    if b[c + V_PC]:
        yield f"recovery of host {b[c + V_HOST]}: {TEXTS[b[c + V_PC]]}", protocol.recover
    if b[c + C_UP] and b[c + C_CRASHES]:
        at = NAMES[b[c + V_PC]] or ("its answer" if b[c + G_HOST] else "anything else")
        yield f"the coordinator is killed (before {at})", protocol.crash_coordinator


def canonical(w: World) -> bytes:
    """Return the state with its hosts in the order of their blocks.

    Of hosts that differ only in what others say of them either may come first. So a few states are
    kept twice, which costs time and nothing else.
    """
    b, hosts = w.b, w.hosts
    blocks = []
    for h in range(1, len(hosts)):
        block = b[hosts[h] : hosts[h] + HOST_SIZE]
        for at in NUMBERED:
            block[at] = 0
        blocks.append((block, h))
    if all(blocks[i][0] <= blocks[i + 1][0] for i in range(len(blocks) - 1)):
        return bytes(b)
    blocks.sort()
    return renumbered(w, [old for _, old in blocks])


def renumbered(w: World, order: Sequence[int]) -> bytes:
    """Return the state with its hosts in this order."""
    b, hosts, c = bytearray(w.b), w.hosts, w.coordinator
    number = [0] * len(hosts)
    for new, old in enumerate(order, 1):
        number[old] = new
    for new, old in enumerate(order, 1):
        o = hosts[new]
        b[o : o + HOST_SIZE] = w.b[hosts[old] : hosts[old] + HOST_SIZE]
        for at in NUMBERED:
            b[o + at] = number[b[o + at]]
    for f in w.frames:
        b[f + OWNER] = number[b[f + OWNER]]
    for r in w.refs:
        b[r + R_HOLDER] = number[b[r + R_HOLDER]]
        b[r + R_CREATOR] = number[b[r + R_CREATOR]]
    b[c + G_HOST], b[c + V_HOST] = number[b[c + G_HOST]], number[b[c + V_HOST]]
    return bytes(b)


def orbit(w: World) -> bytes:
    """Return what all renumberings of the state have in common, and no other state has."""
    return min(renumbered(w, order) for order in permutations(range(1, len(w.hosts))))


def initial(config: Config) -> World:
    """Return the state in which the exploration begins."""
    w = World(config)
    w.config, w.bug = replace(config, menu=SETUP_MENU), ""  # by hosts that make no mistake
    for h, name in config.setup:
        o = w.hosts[h]
        kept = w.b[o + OPS]
        w.b[o + OPS] = 1
        offered = [*protocol.operations(w, h), *protocol.stores(w, h, True)]
        act = next(act for text, act in offered if f"host {h} {name}" in text)
        act(w)
        while w.b[o + PC]:
            protocol.run(h, STEPS[w.b[o + PC]])(w)
        w.b[o + OPS] = kept
    if w.error:
        raise AssertionError(f"{config.name}: {w.error}")
    w.config, w.bug = config, config.bug
    return w


def who_else(w: World, home: int) -> str:
    """Say who may take a frame at this moment that was being sent to this home."""
    if w.b[w.hosts[home] + STATUS] == ACTIVE:
        return "while home, another process by now, takes it in"
    if w.b[w.coordinator + V_HOST] == home:
        return "while home is reclaimed"
    return "from nobody"


def sights(w: World) -> Iterator[str]:
    """Name what this state is an example of."""
    b = w.b
    at = [NAMES[b[o + PC]] for o in w.hosts[1:]]
    for name in {name for name in at if name and at.count(name) > 1}:
        yield f"two hosts at once before {name}"
    for h in (h for h, name in enumerate(at, 1) if name == "home.back"):
        if home.on_its_way(w, b[w.hosts[h] + NEW + b[w.hosts[h] + AT]] - 1, b[w.hosts[h] + HOME]):
            yield f"a frame is taken back {who_else(w, b[w.hosts[h] + HOME])}"
    if NAMES[b[w.coordinator + V_PC]] == "recover.home back":
        to = b[w.hosts[b[w.coordinator + V_HOST]] + I_HOME]
        yield f"recovery takes a frame back {who_else(w, to)}"
    if b[w.coordinator + V_PC] and any(at):
        yield "a host works while another is reclaimed"


def explore(config: Config, limit: int = 10_000_000) -> Result:
    """Visit every state that can be reached; stop at the first that breaks an invariant.

    Raises:
        TooMany: there are more states than `limit`.
    """
    began = time.process_time()
    result = Result(config)
    w = initial(config)
    start = canonical(w)
    states, parents, seen = [start], [0], {start}
    depth = [0]
    result.error = invariants.always(w)
    at = 0
    while at < len(states) and not result.error:
        state = states[at]
        w.b = bytearray(state)
        if invariants.resting(w):
            result.at_rest += 1
            result.error = invariants.at_rest(w)
            if result.error:
                break
        else:
            result.sights.update(sights(w))
        for text, act in local_only(w) or list(everything(w)):
            w.b, w.error = bytearray(state), ""
            act(w)
            result.transitions += 1
            if "killed" in text:
                result.crashed_at.add(text[text.index("(before ") + 8 : -1])
            then = canonical(w)
            if then in seen:
                continue
            seen.add(then)
            states.append(then)
            parents.append(at)
            depth.append(depth[at] + 1)
            error = w.error or invariants.always(w)
            if error:
                result.error = error
                at = len(states) - 1
                break
        else:
            at += 1
            if len(states) > limit:
                raise TooMany(f"{config.name}: more than {limit} states")
    result.states, result.depth = len(states), depth[-1]
    if result.error:
        path = [at]
        while path[-1]:
            path.append(parents[path[-1]])
        result.trace = retrace(config, [states[i] for i in reversed(path)])
    result.seconds = time.process_time() - began
    return result


def retrace(config: Config, path: list[bytes]) -> list[tuple[str, str]]:
    """Say what happened along a path, each host keeping its number."""
    w, other = initial(config), World(config)
    trace = [("the beginning", invariants.describe(w))]
    for then in path[1:]:
        now = bytes(w.b)
        other.b = bytearray(then)
        wanted = orbit(other)
        for text, act in local_only(w) or list(everything(w)):
            w.b, w.error = bytearray(now), ""
            act(w)
            if orbit(w) == wanted:
                trace.append((text, invariants.describe(w)))
                break
            w.b = bytearray(now)
        else:
            raise AssertionError("the path of a counter-example cannot be walked again")
    return trace

"""Acts of hosts in the DM layer: creating, mapping, freeing, storing. Functions run in the victim, with its At."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadSize, OutOfFrames, TooManyRefs
from dmrpc_cxl.fabric import device as devices
from tests.crash import damage, keeper
from tests.crash.acts import Act
from tests.crash.keeper import PAGE, PAGES, filled, in_pieces, moved
from tests.crash.processes import Host
from tests.crash.stage import Stage
from tests.fabrics import At
from tests.standing import until

MOST_COUNTS = 0x7FFFFFFF

# ---------------------------------------------------------------- occasions


@contextlib.contextmanager
def nothing_but_fragments(stage: Stage) -> Iterator[None]:
    stage.keeper.call(keeper.hold_all_but_fragments, 10)
    yield
    stage.keeper.call(keeper.let_go)


@contextlib.contextmanager
def no_frames(stage: Stage) -> Iterator[None]:
    stage.keeper.call(keeper.hold_all_but_fragments, 0)
    yield
    stage.keeper.call(keeper.let_go)


@contextlib.contextmanager
def as_many_counts_as_there_can_be(stage: Stage, victim: Host) -> Iterator[None]:
    """Raise the refcount of a frame that keeper and victim share, behind everybody's back, until all is reclaimed."""
    pfn = victim.call(fourth_frame)
    raised = MOST_COUNTS - damage.count_of(stage.name, pfn)
    damage.add_to_count(stage.name, pfn, raised)
    try:
        yield
        stage.wait_until_reclaimed()
    finally:
        damage.add_to_count(stage.name, pfn, -raised)


def fourth_frame(at: At) -> int:
    """Return the frame of the fourth page that has one, of all that this host maps or holds."""
    with devices.open(at.host.fabric, writable=False) as device:
        mapped, held = device.holdings()
    frames = [
        first + i for host, _, first, count in mapped if host == at.host.id for i in range(count)
    ]
    if not frames:
        frames = [
            first + i for _, host, first, count in held if host == at.host.id for i in range(count)
        ]
    return frames[3]


# ---------------------------------------------------------------- preparing


def own_buffer(at: At, *_: bytes) -> None:
    at.buffer = filled(at, PAGES, 40)


def own_much(at: At) -> None:
    at.buffer = filled(at, 60, 46)


def own_pieces(at: At) -> None:
    at.buffer = in_pieces(at, 41)


def own_holes(at: At) -> None:
    at.buffer = at.host.ralloc(PAGES * PAGE, lazy=True)


def own_ref(at: At) -> None:
    at.ref = moved(at, filled(at, PAGES, 42))


def take_wires(at: At, *wires: bytes) -> None:
    at.wires = list(wires)


def map_it(at: At, wire: bytes) -> None:
    at.buffer = at.host.map_ref(wire)


def map_with_promise(at: At, wire: bytes) -> None:
    at.buffer = at.host.map_ref(wire, reserve=True)


def view_it(at: At, wire: bytes) -> None:
    at.buffer = at.host.view_ref(wire)


def accept_it(at: At, wire: bytes) -> None:
    at.ref = Ref.from_bytes(wire, at.host).accept()


def map_and_take(at: At, first: bytes, second: bytes) -> None:
    map_it(at, first)
    at.wires = [second]


def hold_everything(at: At, shared: bytes, exclusive: bytes, long: bytes) -> None:
    """One of each: a buffer, holes, mappings, a view, Refs of both kinds, free frames."""
    own_buffer(at)
    at.more = in_pieces(at, 43)
    at.mine = at.host.create_ref(at.buffer)
    at.mapped = at.host.map_ref(shared)
    at.viewed = at.host.view_ref(exclusive)
    accept_it(at, long)
    at.moved = moved(at, in_pieces(at, 44))
    for ref in (at.mine, at.ref):
        ref.to_bytes()  # sent, for all we know: not dropped when it is forgotten
    at.alone = filled(at, 4, 45)
    filled(at, 4, 46).free()


def send_one_away(at: At) -> bytes:
    """Make a Ref to frames of ours that nobody else has."""
    at.ref = moved(at, filled(at, PAGES, 47))
    return at.ref.to_bytes()


def free_what_came(at: At, wire: bytes) -> None:
    """Map and free, in the keeper: the frames go home."""
    at.host._forget_given()
    at.host.map_ref(wire).free()


# ---------------------------------------------------------------- operating


def allocate(at: At) -> None:
    at.result = at.host.ralloc(6 * PAGE)


def allocate_lazily(at: At) -> None:
    at.result = at.host.ralloc(6 * PAGE, lazy=True)


def share(at: At) -> None:
    at.result = at.host.create_ref(at.buffer)


def share_too_often(at: At) -> None:
    with contextlib.suppress(TooManyRefs):
        at.result = at.host.create_ref(at.buffer)


def move(at: At) -> None:
    at.result = at.host.create_ref(at.buffer, move=True)


def clone(at: At) -> None:
    at.result = at.ref.clone()


def clone_what_came(at: At) -> None:
    at.ref = Ref.from_bytes(at.wires[0], at.host)
    at.result = at.ref.clone()


def clone_too_often(at: At) -> None:
    with contextlib.suppress(TooManyRefs):
        at.result = at.ref.clone()


def accept(at: At) -> None:
    accept_it(at, at.wires[0])


def map_ref(at: At) -> None:
    map_it(at, at.wires[0])


def map_with_frames_promised(at: At) -> None:
    at.buffer = at.host.map_ref(at.wires[0], reserve=True)


def map_in_vain(at: At) -> None:
    with contextlib.suppress(OutOfFrames):
        at.buffer = at.host.map_ref(at.wires[0], reserve=True)


def map_a_copy(at: At) -> None:
    at.buffer = at.host.map_ref(at.wires[0], copy=True)


def view(at: At) -> None:
    view_it(at, at.wires[0])


def free(at: At) -> None:
    at.buffer.free()


def drop(at: At) -> None:
    at.ref.drop()


def drop_several(at: At) -> None:
    at.host.drop_refs(b"".join(at.wires))


def free_and_give_back(at: At) -> None:
    """Free more than a host keeps: another thread gives the rest back, and has been answered when it lets us in."""
    asked = at.host.stats()["coordinator_round_trips"]
    at.buffer.free()
    until(lambda: at.host.stats()["coordinator_round_trips"] > asked)
    with contextlib.suppress(BadSize):
        at.host.ralloc(0)


def detach(at: At) -> None:
    host = at.host
    at.__dict__.clear()
    at.host = host
    host.detach()


def store(at: At) -> None:
    ctypes.memset(at.buffer.address + PAGE, 7, 1)


def store_in_order(at: At) -> None:
    ctypes.memset(at.buffer.address, 7, len(at.buffer))


def store_to_a_hole(at: At) -> None:
    ctypes.memset(at.buffer.address + 3 * PAGE, 7, 1)


ACTS: list[Act] = []


def _act(
    role: str, name: str, operate: Any, prepare: Any = None, *offers: str, **more: Any
) -> None:
    ACTS.append(Act(role, name, operate, prepare, offers=offers, **more))


_CROWDED = {"meddle": as_many_counts_as_there_can_be}
_FRUGAL = (("high", 8), ("batch", 8))

_act("creator", "attaches", None, at_attach=True)
_act("creator", "allocates", allocate)
_act("creator", "allocates from fragments", allocate, occasion=nothing_but_fragments)
_act("creator", "allocates lazily", allocate_lazily)
_act("creator", "allocates what came home", allocate, send_one_away, answer=free_what_came)
_act("creator", "shares", share, own_buffer)
_act("creator", "shares pieces", share, own_pieces)
_act("creator", "shares what it maps", share, map_it, "shared")
_act("creator", "shares a view", share, view_it, "exclusive")
_act("creator", "shares too often", share_too_often, map_it, "shared", **_CROWDED)
_act("creator", "moves", move, own_buffer)
_act("creator", "moves pieces", move, own_pieces)
_act("creator", "moves what it maps", move, map_it, "shared")
_act("creator", "moves a view", move, view_it, "exclusive")
_act("creator", "clones", clone, own_ref)
_act("creator", "clones pieces", clone, accept_it, "long")
_act("creator", "clones what came", clone_what_came, take_wires, "exclusive")
_act("creator", "clones too often", clone_too_often, accept_it, "shared", **_CROWDED)

_act("mapper", "accepts", accept, take_wires, "exclusive")
_act("mapper", "maps, exclusive", map_ref, take_wires, "exclusive")
_act("mapper", "maps, shared", map_ref, take_wires, "shared")
_act("mapper", "maps pieces", map_ref, take_wires, "pieces")
_act("mapper", "maps pieces, shared", map_ref, take_wires, "long")
_act("mapper", "maps twice", map_ref, map_and_take, "shared", "shared")
_act("mapper", "maps with frames promised", map_with_frames_promised, take_wires, "shared")
_act("mapper", "maps in vain", map_in_vain, take_wires, "shared", occasion=no_frames)
_act("mapper", "maps a copy", map_a_copy, take_wires, "shared")
_act("mapper", "maps a copy of pieces", map_a_copy, take_wires, "long")
_act("mapper", "views, exclusive", view, take_wires, "exclusive")
_act("mapper", "views, shared", view, take_wires, "shared")
_act("mapper", "views pieces", view, take_wires, "pieces")

_act("freeing host", "frees", free, own_buffer)
_act("freeing host", "frees, received", free, map_it, "exclusive")
_act("freeing host", "frees, shared", free, map_it, "shared")
_act("freeing host", "frees pieces", free, own_pieces)
_act("freeing host", "frees pieces, shared", free, map_it, "long")
_act("freeing host", "frees a view", free, view_it, "exclusive")
_act("freeing host", "frees a view, shared", free, view_it, "shared")
_act("freeing host", "drops", drop, own_ref)
_act("freeing host", "drops, shared", drop, accept_it, "shared")
_act("freeing host", "drops pieces", drop, accept_it, "pieces")
_act("freeing host", "drops pieces, shared", drop, accept_it, "long")
_act("freeing host", "drops several", drop_several, take_wires, "shared", "exclusive", "long")
_act("freeing host", "gives back", free_and_give_back, own_much, options=_FRUGAL)
_act("freeing host", "leaves", detach, hold_everything, "shared", "exclusive", "long")

_act("faulting host", "stores", store, map_it, "shared")
_act("faulting host", "stores in order", store_in_order, map_it, "shared")
_act("faulting host", "stores to pieces", store, map_it, "long")
_act("faulting host", "stores to a view", store, view_it, "shared")
_act("faulting host", "stores to a view in order", store_in_order, view_it, "shared")
_act("faulting host", "stores to a hole", store_to_a_hole, own_holes)
_act("faulting host", "fills holes in order", store_in_order, own_holes)
_act("faulting host", "stores with frames promised", store_in_order, map_with_promise, "shared")

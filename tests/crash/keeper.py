"""What the surviving host does: it holds things that must not change, and makes Refs for the one that dies.

Its estate: a buffer, a mapping of a part of it, a Ref to one run of frames, a Ref to more runs than its entry holds, all
full of bytes that differ from place to place. Functions here run in its process.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from dmrpc_cxl import Buffer, Ref
from dmrpc_cxl.errors import DmError
from tests.fabrics import At
from tests.standing import take_all_frames

PAGE = 4096
PAGES = 8  # of most things here: what one fault of several pages copies
SCATTERED = (
    24  # pages of the long Ref, every other one with a frame: more runs than fit in its entry
)


def pattern(nbytes: int, salt: int) -> np.ndarray:
    """Return bytes that differ from place to place; never 0, which is what a hole shows."""
    return ((np.arange(nbytes) // 16 + salt) % 199 + 1).astype("u1")


def filled(at: At, pages: int, salt: int) -> Buffer:
    buffer = at.host.ralloc(pages * PAGE, zero=False)
    buffer.numpy()[:] = pattern(pages * PAGE, salt)
    return buffer


def in_pieces(at: At, salt: int) -> Buffer:
    """Return a buffer of which every other page has a frame."""
    buffer = at.host.ralloc(SCATTERED * PAGE, lazy=True)
    view = buffer.numpy()
    for page in range(0, SCATTERED, 2):
        view[page * PAGE : (page + 1) * PAGE] = pattern(PAGE, salt)
    return buffer


def bytes_of(ref: Ref) -> bytes:
    """Return what a Ref denotes; the Ref is as before."""
    with ref.host.map_ref(ref.clone()) as shown:
        return bytes(memoryview(shown))


def moved(at: At, buffer: Buffer) -> Ref:
    return at.host.create_ref(buffer, move=True)


def settle_in(at: At) -> None:
    """Make the estate."""
    at.host.threshold = PAGE
    at.kept = filled(at, PAGES, 1)
    at.mapped = at.host.map_ref(at.host.create_ref(at.kept.address + PAGE, 2 * PAGE))
    at.held = moved(at, filled(at, 5, 2))
    at.long = moved(at, in_pieces(at, 3))
    at.long_bytes = bytes_of(at.long)
    at.spare = filled(at, PAGES, 4)
    at.offers = []


def offer(at: At, kinds: tuple[str, ...]) -> list[bytes]:
    """Make Refs for the victim: "shared" to what is kept here, "exclusive" and "pieces" to what nobody else has,
    "long" to the same frames as ours.
    """
    wires = []
    for number, kind in enumerate(kinds):
        if kind == "shared":
            ref = at.host.create_ref(at.kept)
        elif kind == "exclusive":
            ref = moved(at, filled(at, PAGES, 10 + number))
        elif kind == "pieces":
            ref = moved(at, in_pieces(at, 20 + number))
        else:
            assert kind == "long"
            ref = at.long.clone()
        at.offers.append((ref, bytes_of(ref)))
        wires.append(ref.to_bytes())
    forget_given(at)
    return wires


def unharmed(at: At) -> list[str]:
    """Say what has changed that must not have; drop the Refs that the victim has not taken."""
    complaints = []
    want = pattern(PAGES * PAGE, 1)
    if (at.kept.numpy() != want).any():
        complaints.append("the buffer")
    if (at.mapped.numpy() != want[PAGE : 3 * PAGE]).any():
        complaints.append("the mapping")
    if bytes_of(at.held) != pattern(5 * PAGE, 2).tobytes():
        complaints.append("the Ref")
    if bytes_of(at.long) != at.long_bytes:
        complaints.append("the Ref in pieces")
    for number, (ref, expected) in enumerate(at.offers):
        with contextlib.suppress(DmError):  # taken
            if bytes_of(ref) != expected:
                complaints.append(f"what Ref {number} denotes, which was not taken")
        ref.drop()
    at.offers = []
    return complaints


def forget_given(at: At) -> None:
    """Have frames go home again, whatever earlier acts have taken from this host and died with."""
    at.host._forget_given()


def works(at: At) -> None:
    """Allocate, share, map, store, free: all that a host does."""
    mine = filled(at, 3, 7)
    with at.host.map_ref(at.host.create_ref(mine)) as other:
        other.numpy()[:PAGE] = 5
        assert (mine.numpy() == pattern(3 * PAGE, 7)).all()


def go_on(at: At) -> None:
    """Work while no coordinator is there to be asked, with the frames of the spare buffer."""
    asked = at.host.stats()["coordinator_round_trips"]
    at.spare.free()
    works(at)
    at.spare = filled(at, PAGES, 4)
    assert at.host.stats()["coordinator_round_trips"] == asked


def hold_all_but_fragments(at: At, fragments: int) -> None:
    """Take every frame there is, and free every other one of the last: what is free then is `fragments` single frames."""
    take_all_frames(at)
    by_frame = sorted(at.rest, key=lambda buffer: buffer.address)
    at.rest = by_frame
    for buffer in by_frame[1 : 2 * fragments : 2]:
        buffer.free()


def let_go(at: At) -> None:
    """Free what was held for the occasion."""
    at.__dict__.pop("rest", None)


def stats(at: At) -> dict[str, Any]:
    return dict(at.host.stats())

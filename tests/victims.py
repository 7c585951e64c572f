"""A keeper whose bytes must not change, and a victim that shares them, to which things are done."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmrpc_cxl.fabric import device as devices
from tests.fabrics import At, Fabric, HostProcess
from tests.standing import Standing, until

PAGE = 4096
PAGES = 64
MARK = 0xEE


class Scene:
    """The two, on a fabric."""

    def __init__(self, fabric: Fabric, keeper: HostProcess, victim: HostProcess) -> None:
        self.fabric = fabric
        self.keeper = keeper
        self.victim = victim

    def share(self, pages: int = PAGES, *, reserve: bool = False) -> None:
        """Let the victim map what the keeper has; with reserve its stores need no coordinator."""
        self.victim.call(map_it, self.keeper.call(make, pages), reserve)

    def copied(self) -> int:
        """Return how many pages the victim has copied, without asking it."""
        with devices.open(self.fabric.name) as opened:
            return int(opened.host(self.victim.id)["counters"]["frames_copied"])

    def assert_unchanged(self) -> None:
        """Assert that the keeper sees what it stored."""
        assert self.keeper.call(changed) == []

    def wait_until_reclaimed(self) -> None:
        """Wait until nothing is left of the victim."""
        until(lambda: all(h["host"] != self.victim.id for h in self.fabric.host_states()))


@contextlib.contextmanager
def scene(standing: Standing, **options: Any) -> Iterator[Scene]:
    """A scene on a standing fabric of one host, the keeper; options are the victim's."""
    with standing.use() as (fabric, (keeper,)):
        here = Scene(fabric, keeper, fabric.host(**options))
        yield here
        if not here.victim.left:
            here.victim.leave()
        here.wait_until_reclaimed()
        keeper.call(drop_refs)


# -------------------------------------------------------------------- sent to hosts


def pattern(pages: int) -> np.ndarray:
    """Return bytes that differ from place to place and are nowhere MARK."""
    return (np.arange(pages * PAGE) // 32 % 200).astype("u1")


def make(at: At, pages: int = PAGES) -> bytes:
    """Share a buffer full of the pattern."""
    at.buffer = at.host.ralloc(pages * PAGE)
    at.buffer.numpy()[:] = pattern(pages)
    return another_ref(at)


def another_ref(at: At) -> bytes:
    ref = at.host.create_ref(at.buffer)
    at.__dict__.setdefault("refs", []).append(ref)
    return ref.to_bytes()


def drop_refs(at: At) -> None:
    """Drop what was handed out and taken by nobody."""
    for ref in at.__dict__.get("refs", []):
        ref.drop()


def map_it(at: At, wire: bytes, reserve: bool = False) -> None:
    at.buffer = at.host.map_ref(wire, reserve=reserve)


def changed(at: At) -> list[int]:
    """Return the pages that do not hold the pattern any more."""
    found = at.buffer.numpy().reshape(-1, PAGE)
    return np.flatnonzero((found != pattern(len(found)).reshape(-1, PAGE)).any(axis=1)).tolist()


def store_everywhere(at: At) -> bool:
    """Store to every page in one go, without the GIL; say whether all is there."""
    ctypes.memset(at.buffer.address, MARK, len(at.buffer))
    return bytes(at.buffer) == bytes([MARK]) * len(at.buffer)

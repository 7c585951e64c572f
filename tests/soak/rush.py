"""The last thing that a host does when its plan says that it dies of itself: one kind of operation, again and again.

So the signal mostly comes inside an operation of native code, and which one is chosen evenly. What becomes of the model does not
matter any more: all that is checked afterwards is that nothing is left of this host, and that others are unharmed.
"""

from __future__ import annotations

import random
import time

from dmrpc_cxl import Buffer

from .acts import Acts
from .calls import Calls

PAGES = 16
SECONDS = 5.0  # until it is given up: the signal is missing


class Rush:
    """The operations of one host."""

    def __init__(self, acts: Acts, calls: Calls) -> None:
        self._acts = acts
        self._calls = calls
        self._holdings = acts.holdings
        self._host = acts.host
        self._kinds = (
            *(self._allocate, self._fill, self._share, self._move, self._move_shared),
            *(self._map, self._map_scattered, self._view, self._copy, self._clone),
            *(self._store, self._store_to_view, self._receive, self._send, self._call),
        )

    def until_killed(self, rng: random.Random) -> None:
        """Do one thing until this process is killed; return if it is not for long."""
        kind = rng.choice(self._kinds)
        buffer = self._host.ralloc(PAGES * self._host.page_size)
        give_up = time.monotonic() + SECONDS
        self._holdings.strike()
        while time.monotonic() < give_up:
            kind(buffer, rng)

    def _allocate(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.ralloc(rng.randrange(1, PAGES) << 12, zero=False)

    def _fill(self, buffer: Buffer, rng: random.Random) -> None:
        holes = self._host.ralloc(PAGES << 12, lazy=True)
        with memoryview(holes) as view:
            view[::4096] = b"x" * PAGES

    def _share(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.create_ref(buffer).drop()

    def _move(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.create_ref(self._host.ralloc(PAGES << 12), move=True).drop()

    def _move_shared(self, buffer: Buffer, rng: random.Random) -> None:
        mapped = self._host.map_ref(self._host.create_ref(buffer))
        self._host.create_ref(mapped, move=True).drop()

    def _map(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.map_ref(self._host.create_ref(buffer)).free()

    def _map_scattered(self, buffer: Buffer, rng: random.Random) -> None:
        with memoryview(buffer) as view:
            view[:: 2 << 12] = b"x" * (PAGES // 2)
        ref = self._host.create_ref(buffer)
        self._host.map_ref(ref).free()

    def _view(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.view_ref(self._host.create_ref(buffer)).free()

    def _copy(self, buffer: Buffer, rng: random.Random) -> None:
        self._host.map_ref(self._host.create_ref(buffer), copy=True).free()

    def _clone(self, buffer: Buffer, rng: random.Random) -> None:
        for claim in self._holdings.claims[:8]:
            claim.ref.clone().drop()
        self._host.create_ref(buffer).clone().drop()

    def _store(self, buffer: Buffer, rng: random.Random) -> None:
        ref = self._host.create_ref(buffer)
        with memoryview(buffer) as view:
            view[::4096] = b"x" * PAGES
        ref.drop()

    def _store_to_view(self, buffer: Buffer, rng: random.Random) -> None:
        seen = self._host.view_ref(self._host.create_ref(buffer))
        with memoryview(seen) as view:
            view[rng.randrange(PAGES) << 12] = 1
        seen.free()

    def _receive(self, buffer: Buffer, rng: random.Random) -> None:
        if not self._acts.receive(rng):
            self._share(buffer, rng)

    def _send(self, buffer: Buffer, rng: random.Random) -> None:
        self._holdings.claims.append(self._holdings.claim_of(buffer))
        self._acts.send(rng)
        self._acts.take_back(rng)

    def _call(self, buffer: Buffer, rng: random.Random) -> None:
        self._calls.act(rng)

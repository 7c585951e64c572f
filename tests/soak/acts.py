"""Operations on memory, each chosen and shaped by the generator of its act, each with what it does to the model."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.errors import OutOfFrames, RefConsumed

from .board import Board
from .holdings import Claim, Held, Holdings, Violation, crc_of
from .mail import Letter, Mail
from .plan import SLOTS, Life

MOST_PAGES = 200  # that a host holds; then it only lets go
MOST_ENTRIES = 60


class Acts:
    """What a host does with its memory."""

    def __init__(self, life: Life, board: Board, mail: Mail, holdings: Holdings) -> None:
        self.life = life
        self.board = board
        self.mail = mail
        self.holdings = holdings
        self.host = holdings.host
        self.tally: Counter[str] = Counter()
        self.lost: list[tuple[int, int]] = []  # slot and life of who sent a Ref that was gone
        self._file = tempfile.TemporaryFile(buffering=0)
        self.kinds: dict[Callable[[random.Random], object], int] = {
            self.allocate: 14,
            self.store: 24,
            self.check: 12,
            self.share: 14,
            self.move: 8,
            self.map: 12,
            self.clone: 5,
            self.look: 4,
            self.drop: 4,
            self.free: 6,
            self.send: 12,
            self.take_back: 3,
            self.put: 3,
            self.scatter: 2,
        }

    def act(self, rng: random.Random) -> None:
        """Do one thing."""
        holdings = self.holdings
        holdings.take_from_shelf()
        self.receive(rng)
        if holdings.pages() > MOST_PAGES or holdings.nr_entries() > MOST_ENTRIES:
            kind: Callable[[random.Random], object] = rng.choice((self.free, self.drop, self.send))
        else:
            (kind,) = rng.choices(list(self.kinds), list(self.kinds.values()))
        try:
            kind(rng)
            self.tally[kind.__name__] += 1
        except OutOfFrames:
            self.tally["out of frames"] += 1

    def _where(self, what: str) -> str:
        return f"slot {self.life.slot}, life {self.life.number}, {what}"

    def _some_held(self, rng: random.Random) -> Held | None:
        held = self.holdings.held
        return rng.choice(held) if held else None

    def _some_claim(self, rng: random.Random) -> Claim | None:
        claims = self.holdings.claims
        return rng.choice(claims) if claims else None

    # ---------------------------------------------------------------- mappings

    def allocate(self, rng: random.Random) -> None:
        nbytes = rng.choice((1, 100, 4096, rng.randrange(1, 1 << 14), rng.randrange(1, 1 << 16)))
        lazy = rng.random() < 0.3
        zero = lazy or rng.random() < 0.3
        self.holdings.strike()
        buffer = self.host.ralloc(nbytes, lazy=lazy, zero=zero)
        expected = bytearray(nbytes)
        if not zero:
            expected[:] = rng.randbytes(nbytes)
            with memoryview(buffer) as view:
                view[:] = expected
        self.holdings.held.append(Held(buffer, expected))

    def scatter(self, rng: random.Random) -> None:
        """Take single pages and free every other one, so that runs get short."""
        self.holdings.strike()
        pages = [self.host.ralloc(self.host.page_size) for _ in range(rng.randrange(2, 20))]
        for page in pages[::2]:
            self.holdings.held.append(Held(page, bytearray(self.host.page_size)))
        while len(self.holdings.held) > MOST_ENTRIES:
            self.holdings.held.pop(0)

    def store(self, rng: random.Random) -> None:
        held = self._some_held(rng)
        if held is None:
            return
        size = len(held.expected)
        offset = rng.randrange(size)
        length = rng.choice((1, 8, rng.randrange(1, size + 1), size))
        data = rng.randbytes(min(length, size - offset))
        end = offset + len(data)
        self.holdings.strike()
        with memoryview(held.target) as view:
            if rng.random() < 0.25:  # the kernel stores
                os.pwrite(self._file.fileno(), data, 0)
                with view[offset:end] as part:
                    assert os.preadv(self._file.fileno(), [part], 0) == len(data)
            else:
                view[offset:end] = data
        held.expected[offset:end] = data

    def check(self, rng: random.Random) -> None:
        held = self._some_held(rng)
        if held is not None:
            held.check(self._where("in between"))

    def free(self, rng: random.Random) -> None:
        held = self._some_held(rng)
        if held is None:
            return
        held.check(self._where("before it is freed"))
        self.holdings.strike()
        self.holdings.held.remove(held)
        if isinstance(held.target, np.ndarray):
            return  # with the last reference
        how = rng.randrange(3)
        if how == 0:
            held.target.free()
        elif how == 1:
            self.host.rfree(held.target.address)

    # ---------------------------------------------------------------- Refs

    def share(self, rng: random.Random) -> None:
        held = self._some_held(rng)
        if held is None:
            return
        size = len(held.expected)
        offset, length = 0, size
        if rng.random() < 0.4:
            offset = rng.randrange(size)
            length = rng.randrange(1, size - offset + 1)
        self.holdings.claims.append(self.holdings.share(held, offset, length))

    def move(self, rng: random.Random) -> None:
        held = self._some_held(rng)
        if held is not None:
            self.holdings.claims.append(self.holdings.move(held))

    def map(self, rng: random.Random) -> None:
        claim = self._some_claim(rng)
        if claim is not None:
            self.holdings.held.append(self._mapped(rng, claim, claim.ref))
            self.holdings.claims.remove(claim)

    def _mapped(self, rng: random.Random, claim: Claim, ref: dmrpc_cxl.Ref | bytes) -> Held:
        self.holdings.strike()
        how = rng.randrange(5)
        if how < 2:
            buffer = self.host.view_ref(ref)
        else:
            buffer = self.host.map_ref(ref, copy=how == 2, reserve=how == 3)
        return self.holdings.receive(buffer, claim, self._where("mapped"))

    def clone(self, rng: random.Random) -> None:
        claim = self._some_claim(rng)
        if claim is not None:
            self.holdings.claims.append(self.holdings.clone(claim))

    def look(self, rng: random.Random) -> None:
        claim = self._some_claim(rng)
        if claim is not None:
            self.holdings.look(claim, self._where("looked at"))

    def drop(self, rng: random.Random) -> None:
        claim = self._some_claim(rng)
        if claim is None:
            return
        self.holdings.strike()
        self.holdings.claims.remove(claim)
        if rng.random() < 0.5 and not claim.ref.drop():
            raise Violation(self._where("a Ref that nobody else knew of was gone"))

    def put(self, rng: random.Random) -> None:
        """Place an object, and take it out of a copy of the Ref."""
        data = np.frombuffer(rng.randbytes(rng.randrange(1, 1 << 14)), "u1")
        self.holdings.strike()
        ref = self.host.put({"data": data, "life": self.life.number})
        found = self.host.get(ref.clone())
        if found["life"] != self.life.number or not np.array_equal(found["data"], data):
            raise Violation(self._where("an object came back changed"))
        del found
        with self.host.map_ref(ref.clone()) as buffer, memoryview(buffer) as view:
            claim = Claim(ref, len(view), crc_of(view), buffer.address % self.host.page_size)
        self.holdings.claims.append(claim)

    # ---------------------------------------------------------------- Refs that pass from host to host

    def send(self, rng: random.Random) -> None:
        claim = self._some_claim(rng)
        slot = rng.randrange(SLOTS - 1)
        if claim is None:
            return
        slot += slot >= self.life.slot
        letter = Letter(
            self.life.slot,
            self.life.number,
            slot,
            self.board.life(slot),
            claim.nbytes,
            claim.crc,
            claim.page_offset,
            rng.random() < 0.25,
            claim.ref.to_bytes(),
        )
        if self.mail.send(letter):
            self.holdings.claims.remove(claim)
            self.holdings.sent.append((letter, claim))
        else:
            claim.ref.accept()  # as if its bytes had never been handed out

    def take_back(self, rng: random.Random) -> None:
        """Drop what was sent to somebody who is no more, or may be dropped anyway."""
        for letter, claim in list(self.holdings.sent):
            gone = self.board.life(letter.to_slot) != letter.to_life
            if gone or (letter.revocable and rng.random() < 0.2):
                claim.ref.drop()
                self.holdings.sent.remove((letter, claim))
            elif not self.host.ref_is_held(letter.wire):
                self.holdings.sent.remove((letter, claim))

    def receive(self, rng: random.Random) -> bool:
        """Take what has arrived, one letter; its Ref is good unless its sender is dead. False: there is none."""
        letter = self.mail.receive()
        if letter is None:
            return False
        if letter.to_life != self.life.number:
            return True  # for who was here before; its sender takes it back
        self.tally["received"] += 1
        ref = dmrpc_cxl.Ref.from_bytes(letter.wire, self.host)
        claim = Claim(ref, letter.nbytes, letter.crc, letter.page_offset)
        self.holdings.strike()
        how = rng.randrange(6)
        try:
            if how == 0:
                self.holdings.held.append(self._mapped(rng, claim, letter.wire))
            elif how == 1 and not letter.revocable:
                self.holdings.claims.append(self.holdings.clone(claim))
                self.holdings.claims.append(claim)
            elif how == 2:
                if not ref.drop():
                    raise RefConsumed("dropped")
            else:
                ref.accept()
                self.holdings.claims.append(claim)
        except OutOfFrames:
            ref.drop()
        except RefConsumed:
            if not letter.revocable:
                self.lost.append((letter.from_slot, letter.from_life))
            self.tally["lost"] += 1
        return True

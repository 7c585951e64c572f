"""The model of one host: what it has mapped, which Refs it holds, and what each must show.

A mapping is remembered with its bytes, a Ref with their checksum, so that what is sent stays small. Nothing of what
other hosts do appears here: it must make no difference.
"""

from __future__ import annotations

import dataclasses
import gc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.rpc import move

from .mail import Letter


class Violation(AssertionError):
    """Something that must never happen has happened."""


def crc_of(data: Any) -> int:
    return zlib.crc32(data)


@dataclasses.dataclass(eq=False)
class Held:
    """A mapping: a Buffer, or an array in DM that came by RPC and is all that refers to its memory."""

    target: Any
    expected: bytearray

    @property
    def address(self) -> int:
        if isinstance(self.target, np.ndarray):
            return int(self.target.__array_interface__["data"][0])
        return int(self.target.address)

    def pages(self, page_size: int) -> int:
        return -(-(self.address % page_size + len(self.expected)) // page_size)

    def check(self, where: str) -> None:
        """Compare every byte with the model."""
        with memoryview(self.target) as view:
            if view == self.expected:
                return
            found = np.frombuffer(view, "u1")
            wrong = np.flatnonzero(found != np.frombuffer(self.expected, "u1"))
            raise Violation(
                f"{where}: a mapping of {len(view)} bytes at {self.address:#x} differs in {len(wrong)} bytes, from {wrong[0]}"
                f" to {wrong[-1]}: {bytes(found[wrong[:16]]).hex()} for {self.expected[wrong[0] : wrong[0] + 16].hex()}"
            )


@dataclasses.dataclass(eq=False)
class Claim:
    """A Ref."""

    ref: dmrpc_cxl.Ref
    nbytes: int
    crc: int
    page_offset: int

    def pages(self, page_size: int) -> int:
        return -(-(self.page_offset + self.nbytes) // page_size)


class Holdings:
    """All that a host holds and knows of."""

    def __init__(self, host: dmrpc_cxl.Host, strike: Callable[[], None]) -> None:
        """Begin with nothing; strike is called right before each operation of native code."""
        self.host = host
        self.strike = strike
        self.held: list[Held] = []
        self.claims: list[Claim] = []
        self.sent: list[tuple[Letter, Claim]] = []  # until the addressee has them
        self.shelf: list[Claim] = []  # brought by calls, in threads of the server

    def take_from_shelf(self) -> None:
        while self.shelf:
            self.claims.append(self.shelf.pop(0))

    def pages(self) -> int:
        size = self.host.page_size
        everything = [*self.held, *self.claims, *(claim for _, claim in self.sent)]
        return sum(thing.pages(size) for thing in everything)

    def nr_entries(self) -> int:
        return len(self.held) + len(self.claims) + len(self.sent)

    # ---------------------------------------------------------------- from one to the other

    def claim_of(self, buffer: dmrpc_cxl.Buffer) -> Claim:
        """Make a Ref of what a mapping shows, whatever that is."""
        with memoryview(buffer) as view:
            crc = crc_of(view)
        at = buffer.address % self.host.page_size
        return Claim(self.host.create_ref(buffer), buffer.nbytes, crc, at)

    def share(self, held: Held, offset: int, length: int) -> Claim:
        """Make a Ref of a part."""
        if (offset, length) == (0, len(held.expected)):
            target = held.target
        else:
            target = (held.address + offset, length)
        self.strike()
        ref = self.host.create_ref(target)
        part = memoryview(held.expected)[offset : offset + length]
        return Claim(ref, length, crc_of(part), (held.address + offset) % self.host.page_size)

    def move(self, held: Held) -> Claim:
        """Make a Ref of a mapping, which is gone then."""
        at = held.address % self.host.page_size
        self.strike()
        if isinstance(held.target, np.ndarray):
            ref = move(held.target).ref
        else:
            ref = self.host.create_ref(held.target, move=True)
        self.held.remove(held)
        return Claim(ref, len(held.expected), crc_of(held.expected), at)

    def clone(self, claim: Claim) -> Claim:
        self.strike()
        return dataclasses.replace(claim, ref=claim.ref.clone())

    def receive(self, buffer: dmrpc_cxl.Buffer, claim: Claim, where: str) -> Held:
        """Take what a Ref was mapped to into the model, if it is what it must be."""
        with memoryview(buffer) as view:
            expected = bytearray(view)
        held = Held(buffer, expected)
        if (len(expected), crc_of(expected)) != (claim.nbytes, claim.crc):
            raise Violation(
                f"{where}: a Ref of {claim.nbytes} bytes with checksum {claim.crc:#x} shows {len(expected)} bytes with"
                f" checksum {crc_of(expected):#x}, beginning {bytes(expected[:32]).hex()}"
            )
        if buffer.address % self.host.page_size != claim.page_offset:
            raise Violation(f"{where}: a Ref at {claim.page_offset} of its page shows {held}")
        return held

    def look(self, claim: Claim, where: str) -> None:
        """Check what a Ref shows, and leave it as it is."""
        with self.host.map_ref(claim.ref.clone()) as buffer:
            self.receive(buffer, claim, where)

    def check(self, where: str) -> None:
        """Check everything."""
        for held in self.held:
            held.check(where)
        for claim in self.claims:
            self.look(claim, where)

    def let_go(self) -> None:
        """Free everything; Refs on their way are their addressees'."""
        self.held.clear()
        for claim in self.claims:
            if not claim.ref.drop():
                raise Violation("a Ref that this host holds was gone when it was dropped")
        self.claims.clear()
        gc.collect()

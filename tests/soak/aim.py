"""Which hosts are inside an operation right now: read from their entries in the device, some times a microsecond.

Operations are short, so a moment chosen blindly falls between two of them. Who spins on the words of all hosts until one
is inside kills it there: somewhere in what it has begun, or anywhere in it if it is not running at the moment.
"""

from __future__ import annotations

import mmap
import random
import time

from dmrpc_cxl._native import LAYOUT, Device

ACTIVITY = 56  # offsets in struct dm_host_entry; checked below
INTENT_OP = 64
SECONDS = 0.02  # to spin


class Aim:
    """The words of the host table."""

    def __init__(self, device: Device) -> None:
        superblock = device.superblock
        begin: int = superblock["host_table_off"]
        size = superblock["max_hosts"] * LAYOUT["HOST_ENTRY_BYTES"]
        mapping = mmap.mmap(device.fileno(), begin + size, prot=mmap.PROT_READ)
        self._words = memoryview(mapping)[begin:].cast("Q")
        self._device = device

    def _at(self, host: int, offset: int) -> int:
        return ((host - 1) * LAYOUT["HOST_ENTRY_BYTES"] + offset) // 8

    def check(self, host: int) -> None:
        """Assert that the offsets are those of this layout, by a host that rests."""
        entry = self._device.host(host)
        assert self._words[self._at(host, ACTIVITY)] == entry["activity"] > 0
        assert self._words[self._at(host, INTENT_OP)] & 0xFFFFFFFF == entry["intent"]["op"]

    def find(self, hosts: list[int], rng: random.Random) -> int | None:
        """Return a host that is inside an operation at this moment; None if none is for a while."""
        words = self._words
        announced = rng.random() < 0.7
        mask = 0xFFFFFFFF if announced else 1
        places = [(self._at(host, INTENT_OP if announced else ACTIVITY), host) for host in hosts]
        rng.shuffle(places)
        give_up = time.monotonic() + SECONDS
        while time.monotonic() < give_up:
            for _ in range(20):
                for at, host in places:
                    if words[at] & mask:
                        return host
        return None

"""Damage done to a device by hand, behind the back of hosts that are at rest: what the scrubber is for."""

from __future__ import annotations

import struct

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.fabric import device as devices

POOL: int = LAYOUT["OWNER_POOL"]
REF_BYTES = 128  # of an entry; its state word comes first


def _change(fabric: str, offset: int, mask: int, value: int) -> None:
    """Replace the masked bits of a word."""
    with open(devices.path_of(fabric), "r+b") as file:
        file.seek(offset)
        (word,) = struct.unpack("<Q", file.read(8))
        file.seek(offset)
        file.write(struct.pack("<Q", word & ~mask | value))


def count_of(fabric: str, pfn: int) -> int:
    with devices.open(fabric, writable=False) as device:
        return int(device.frame(pfn)[0])


def set_count(fabric: str, pfn: int, count: int) -> None:
    with devices.open(fabric, writable=False) as device:
        offset = device.superblock["frame_table_off"] + 8 * pfn
    _change(fabric, offset, 0xFFFFFFFF, count)


def add_to_count(fabric: str, pfn: int, number: int) -> None:
    set_count(fabric, pfn, count_of(fabric, pfn) + number)


def set_owner(fabric: str, pfn: int, owner: int) -> None:
    with devices.open(fabric, writable=False) as device:
        offset = device.superblock["frame_table_off"] + 8 * pfn
    _change(fabric, offset, 0xFFFF << 32, owner << 32)


def set_holder(fabric: str, entry: int, holder: int) -> None:
    """Make somebody else the holder of a Ref."""
    with devices.open(fabric, writable=False) as device:
        offset = device.superblock["ref_table_off"] + REF_BYTES * entry
    _change(fabric, offset, 0xFFFF << 16, holder << 16)


def frames_of_the_pool(fabric: str, number: int) -> list[int]:
    """Return the last frames that the pool has."""
    with devices.open(fabric, writable=False) as device:
        runs = device.free_runs(POOL)
    frames = [first + i for first, count in runs for i in range(count)]
    return frames[-number:]


def refs_of(fabric: str, host: int) -> list[int]:
    """Return the entries of the Refs that a host holds, by what they are: where they lie is up to chance."""
    with devices.open(fabric, writable=False) as device:
        held = [ref for ref in device.refs() if ref["holder"] == host]
    held.sort(key=lambda ref: (ref["nr_pages"], ref["exclusive"], ref["entry"]))
    return [ref["entry"] for ref in held]

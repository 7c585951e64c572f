"""All that a device's tables say is held, to be compared before and after."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dmrpc_cxl.fabric import device


@dataclass(frozen=True)
class Picture:
    """All that a device's tables say is held: for `nothing_changes`."""

    refcounts: bytes
    page_tables: tuple[bytes, ...]
    refs: tuple[tuple[int, ...], ...]
    reserved: tuple[int, ...]

    @classmethod
    def of(cls, fabric: str) -> Picture:
        with device.open(fabric, writable=False) as opened:
            sb, fd = opened.superblock, opened.fileno()
            words = os.pread(fd, 8 * sb["nr_frames"], sb["frame_table_off"])
            table = 4 * sb["ptes_per_host"]
            hosts = opened.hosts()
            return cls(
                (np.frombuffer(words, "<u8") & 0xFFFFFFFF).tobytes(),
                tuple(
                    os.pread(fd, table, sb["page_table_off"] + table * (host["host"] - 1))
                    for host in hosts
                ),
                tuple(
                    tuple(ref[key] for key in ("entry", "state", "holder", "generation", "length"))
                    for ref in opened.refs()
                ),
                tuple(host["nr_reserved"] for host in hosts),
            )


@contextlib.contextmanager
def nothing_changes(fabric: str, taker: int = 0) -> Iterator[None]:
    """Assert that no refcount, page table or Ref of a device is different after the block.

    Refs that `taker` tried to map and could not are its own afterwards, under the same generation.
    """
    before = Picture.of(fabric)
    yield
    after = Picture.of(fabric)
    assert before.refcounts == after.refcounts, "a refcount changed"
    assert before.page_tables == after.page_tables, "a page table changed"
    refs = tuple((ref[0], ref[1], taker or ref[2], *ref[3:]) for ref in before.refs)
    assert refs == after.refs, f"Refs changed: {before.refs} -> {after.refs}"
    assert before.reserved == after.reserved, "the number of reserved frames changed"

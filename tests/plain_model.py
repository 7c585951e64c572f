"""What a fabric must behave like, in plain Python: every mapping and Ref has bytes of its own, and names its frames.

Frames have numbers of the model's own; which PFN stands for which is found when the device is
looked at: `compare` demands that
page tables, refcounts, holes, Refs and reserved frames are exactly the model's, up to that
renaming. The model assumes that a
fault serves one page (attach(copy_around=1)).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmrpc_cxl._native import LAYOUT, Device

HEAD, HOLE, PRESENT, PFN = (LAYOUT[f"PTE_{name}"] for name in ("HEAD", "HOLE", "PRESENT", "PFN"))
Pages = list["int | None"]  # a model frame, or None for a hole


@dataclass(eq=False)
class Mapping:
    """What ralloc or map_ref returned."""

    host: int
    key: int
    address: int
    data: bytearray
    pages: Pages
    page_offset: int = 0
    reserved: int = 0
    view: bool = False  # the device knows it as a Ref
    exclusive: bool = False  # when it was viewed: stores change nothing about that


@dataclass(eq=False)
class Handle:
    """A Ref object in a host process."""

    host: int
    key: int
    ours: bool
    exported: bool = False
    stale: bool = False  # somebody accepted or used the Ref since


@dataclass(eq=False)
class Snapshot:
    """A Ref."""

    data: bytes
    pages: Pages
    page_offset: int
    holder: int
    handles: list[Handle] = field(default_factory=list)
    wire: bytes = b""  # what stands for it, if its bytes were handed out since it was accepted


class Model:
    """All mappings and Refs of a fabric."""

    def __init__(self, page_size: int, *, reads_allocate: bool) -> None:
        self.page_size = page_size
        self.reads_allocate = reads_allocate
        self.mappings: list[Mapping] = []
        self.refs: list[Snapshot] = []
        self._frames = itertools.count()

    # ---------------------------------------------------------------- frames

    def nr_pages(self, page_offset: int, length: int) -> int:
        return -(-(page_offset + length) // self.page_size)

    def new_frames(self, count: int) -> Pages:
        return [next(self._frames) for _ in range(count)]

    def counts(self) -> Counter[int]:
        """Return the refcount of every frame in use."""
        lists = [mapping.pages for mapping in self.mappings] + [ref.pages for ref in self.refs]
        return Counter(frame for pages in lists for frame in pages if frame is not None)

    def span(self, mapping: Mapping, offset: int, length: int) -> range:
        """Return the pages under some bytes of a mapping."""
        start = mapping.page_offset + offset
        return range(start // self.page_size, (start + length - 1) // self.page_size + 1)

    def short_of(self, mapping: Mapping, span: range) -> list[int]:
        """Return the pages that need a new frame before they can be written."""
        counts = self.counts()
        pages = mapping.pages
        return [i for i in span if pages[i] is None or counts[pages[i]] > 1]

    def holes(self, mapping: Mapping, span: range) -> list[int]:
        return [i for i in span if mapping.pages[i] is None]

    def give_frames(self, mapping: Mapping, pages: list[int]) -> None:
        """Let pages have frames of their own, as faults on them do."""
        for i in pages:
            mapping.pages[i] = next(self._frames)
            mapping.reserved -= mapping.reserved > 0

    # ---------------------------------------------------------------- operations

    def add_mapping(self, mapping: Mapping) -> None:
        self.mappings.append(mapping)

    def views(self) -> list[Mapping]:
        return [mapping for mapping in self.mappings if mapping.view]

    def write(self, mapping: Mapping, offset: int, data: bytes) -> None:
        mapping.view = mapping.view and mapping.exclusive
        self.give_frames(mapping, self.short_of(mapping, self.span(mapping, offset, len(data))))
        mapping.data[offset : offset + len(data)] = data

    def read(self, mapping: Mapping, offset: int, length: int) -> bytes:
        if self.reads_allocate:
            self.give_frames(mapping, self.holes(mapping, self.span(mapping, offset, length)))
        return bytes(mapping.data[offset : offset + length])

    def share(self, mapping: Mapping, offset: int, length: int, handle: Handle) -> Snapshot:
        mapping.view = False
        span = self.span(mapping, offset, length)
        ref = Snapshot(
            bytes(mapping.data[offset : offset + length]),
            mapping.pages[span.start : span.stop],
            (mapping.page_offset + offset) % self.page_size,
            handle.host,
            [handle],
        )
        self.refs.append(ref)
        return ref

    def move(self, mapping: Mapping, handle: Handle) -> Snapshot:
        ref = self.share(mapping, 0, len(mapping.data), handle)
        self.mappings.remove(mapping)
        return ref

    def accept(self, ref: Snapshot, handle: Handle) -> None:
        if handle.host != ref.holder:
            for other in ref.handles:
                other.stale = other is not handle
            ref.holder = handle.host
            ref.wire = b""
        handle.ours = True

    def clone(self, ref: Snapshot, handle: Handle, copy: Handle) -> Snapshot:
        self.accept(ref, handle)
        made = Snapshot(ref.data, list(ref.pages), ref.page_offset, copy.host, [copy])
        self.refs.append(made)
        return made

    def consume(self, ref: Snapshot) -> None:
        """Use a Ref up."""
        for handle in ref.handles:
            handle.stale = True
        self.refs.remove(ref)

    def map(
        self, ref: Snapshot, host: int, key: int, address: int, *, copy: bool, reserve: bool
    ) -> Mapping:
        exclusive = all(self.counts()[frame] == 1 for frame in ref.pages if frame is not None)
        pages = self.new_frames(len(ref.pages)) if copy else list(ref.pages)
        mapping = Mapping(host, key, address, bytearray(ref.data), pages, ref.page_offset)
        if reserve and not copy and not (exclusive and None not in pages):
            mapping.reserved = len(pages)
        self.consume(ref)
        self.add_mapping(mapping)
        return mapping

    def show(self, ref: Snapshot, host: int, key: int, address: int, *, view: bool) -> Mapping:
        exclusive = all(self.counts()[frame] == 1 for frame in ref.pages if frame is not None)
        mapping = self.map(ref, host, key, address, copy=False, reserve=False)
        mapping.view, mapping.exclusive = view, exclusive
        return mapping


# -------------------------------------------------------------------- the device


def _page_table(device: Device, host_id: int) -> np.ndarray:
    layout = device.superblock
    per_host = layout["ptes_per_host"]
    start = layout["page_table_off"] + 4 * per_host * (host_id - 1)
    return np.frombuffer(os.pread(device.fileno(), 4 * per_host, start), "<u4")


def longest_vacancy(device: Device, host_id: int) -> int:
    """Return the longest run of free pages in a host's VMA area."""
    area = _page_table(device, host_id)[2 * device.superblock["nr_frames"] :]
    used = np.concatenate(([-1], np.flatnonzero(area), [len(area)]))
    return int(np.diff(used).max()) - 1


def _compare_mapping(mapping: Mapping, ptes: list[int], pfn_of: dict[int, int]) -> None:
    where = f"mapping {mapping.key} of host {mapping.host}"
    for i, (frame, pte) in enumerate(zip(mapping.pages, ptes, strict=True)):
        assert bool(pte & HEAD) == (i == 0), f"{where}, page {i}: PTE {pte:#x}: head"
        if frame is None:
            assert pte & ~HEAD == HOLE, f"{where}, page {i}: PTE {pte:#x} is no hole"
            continue
        assert pte & PRESENT, f"{where}, page {i}: PTE {pte:#x} has no frame"
        pfn = pte & PFN
        known = pfn_of.setdefault(frame, pfn)
        assert known == pfn, f"{where}, page {i} shows frame {pfn}, others that share it {known}"


def compare(model: Model, device: Device, host_ids: list[int]) -> None:
    """Assert that the device accounts for exactly what the model has; while no operation is in flight."""
    audit = device.audit()
    assert audit["nr_violations"] == 0, audit["violations"]
    pfn_of: dict[int, int] = {}
    for host, host_id in enumerate(host_ids):
        mine = [m for m in model.mappings if m.host == host and not m.view]
        mine.sort(key=lambda m: m.address)
        table = _page_table(device, host_id)
        heads = np.flatnonzero(table & HEAD)
        assert len(heads) == len(mine), f"host {host}: {len(heads)} mappings, not {len(mine)}"
        for at, mapping in zip(heads, mine, strict=True):
            _compare_mapping(mapping, table[at : at + len(mapping.pages)].tolist(), pfn_of)
        used = np.count_nonzero(table)
        assert used == sum(len(m.pages) for m in mine), f"host {host}: pages of no mapping"
        reserved = device.host(host_id)["nr_reserved"]
        assert reserved == sum(m.reserved for m in mine), f"host {host}: {reserved} reserved"
    assert len(set(pfn_of.values())) == len(pfn_of), "one frame under pages that share nothing"

    counts = model.counts()
    for frame, pfn in pfn_of.items():
        found = device.frame(pfn)[0]
        assert found == counts[frame], f"frame {pfn}: refcount {found}, not {counts[frame]}"
    # What only Refs hold: which frame is which cannot be seen, how often each is held can.
    expected = Counter(counts[frame] for frame in counts if frame not in pfn_of)
    expected[1] += audit["overflow_frames"]
    shown = set(pfn_of.values())
    seldom = Counter(device.frame(pfn)[0] for pfn in range(audit["nr_frames"]) if pfn not in shown)
    del seldom[0]
    assert seldom == +expected, f"frames that only Refs hold: refcounts {seldom}, not {+expected}"

    refs: list[Any] = sorted((r["length"], r["page_offset"], r["holder"]) for r in device.refs())
    expect = [(len(ref.data), ref.page_offset, host_ids[ref.holder]) for ref in model.refs]
    expect += [(len(m.data), m.page_offset, host_ids[m.host]) for m in model.views()]
    assert refs == sorted(expect)

"""A set of free frames, kept as extents: maximal runs of consecutive frame numbers.

Two sorted lists describe the same set, one by frame number and one by length, so that the
neighbours of a run and the best fit for a length are found by bisection. Insertion into a list
moves memory, which is cheaper than a tree up to hundreds of thousands of extents; frames that come
back coalesce, so there are few.

Pure: no device, no clock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dmrpc_cxl.errors import DeviceError


class Run(NamedTuple):
    """Consecutive frames: the first one's number and how many."""

    pfn: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs

    @property
    def end(self) -> int:
        """Frame number after the last one."""
        return self.pfn + self.count


class FrameConflict(DeviceError):
    """Frames that should become free are in the pool already, or not in the device."""


class Extents:
    """The set. A frame is in it once or not at all; whoever adds one twice gets FrameConflict."""

    def __init__(self, nr_frames: int, runs: Iterable[tuple[int, int]] = ()) -> None:
        """Begin with `runs`, in any order, of a device of `nr_frames` frames."""
        self.nr_frames = nr_frames
        self.total = 0
        self._starts: list[int] = []
        self._count: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []  # (count, pfn)
        self._load(runs)

    def _load(self, runs: Iterable[tuple[int, int]]) -> None:
        """Fill the empty set in one pass: inserting one by one would be quadratic."""
        start = end = 0
        merged: list[Run] = []
        for pfn, count in sorted(runs):
            self._check(pfn, count)
            if pfn < end:
                raise FrameConflict(f"frames {pfn}..{pfn + count - 1} overlap frame {end - 1}")
            if pfn > end or end == start:
                if end > start:
                    merged.append(Run(start, end - start))
                start = pfn
            end = pfn + count
        if end > start:
            merged.append(Run(start, end - start))
        self._starts = [run.pfn for run in merged]
        self._count = dict(merged)
        self._by_length = sorted((run.count, run.pfn) for run in merged)
        self.total = sum(run.count for run in merged)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Run]:
        """Yield the extents by frame number."""
        return (Run(pfn, self._count[pfn]) for pfn in self._starts)

    def __contains__(self, pfn: int) -> bool:
        """Tell whether one frame is in the set."""
        at = bisect_right(self._starts, pfn) - 1
        return at >= 0 and pfn < self._starts[at] + self._count[self._starts[at]]

    @property
    def longest(self) -> int:
        """Length of the longest extent, 0 when there is none."""
        return self._by_length[-1][0] if self._by_length else 0

    def missing(self, pfn: int, count: int) -> list[Run]:
        """Return the parts of frames [pfn, pfn + count) that are not in the set, ascending."""
        self._check(pfn, count)
        parts: list[Run] = []
        end = pfn + count
        at = max(bisect_right(self._starts, pfn) - 1, 0)
        while pfn < end and at < len(self._starts):
            start = self._starts[at]
            if start >= end:
                break
            if start > pfn:
                parts.append(Run(pfn, start - pfn))
            pfn = max(pfn, start + self._count[start])
            at += 1
        if pfn < end:
            parts.append(Run(pfn, end - pfn))
        return parts

    def add(self, pfn: int, count: int) -> None:
        """Put frames [pfn, pfn + count) in, all or nothing; they coalesce with neighbours.

        Raises:
            FrameConflict: one of them is in the set already, or is no frame of the device.
        """
        self._check(pfn, count)
        end = pfn + count
        at = bisect_left(self._starts, pfn)
        before = self._starts[at - 1] if at > 0 else None
        after = self._starts[at] if at < len(self._starts) else None
        if before is not None and before + self._count[before] > pfn:
            raise FrameConflict(f"frame {pfn} is in the pool already")
        if after is not None and after < end:
            raise FrameConflict(f"frame {after} is in the pool already")
        self.total += count
        if after == end:
            count += self._remove(after)
        if before is not None and before + self._count[before] == pfn:
            count += self._remove(before)
            pfn = before
        self._insert(pfn, count)

    def take(self, want: int, min_run: int = 1, max_runs: int | None = None) -> list[Run]:
        """Take up to `want` frames out, in as few runs as possible and at most `max_runs`.

        One run if one is long enough, cut from the extent that fits best; otherwise the longest
        extents, whole, then the best fit for what remains. Nothing is taken when no extent has
        `min_run` frames.
        """
        if want < 1 or self.longest < max(min_run, 1):
            return []
        runs: list[Run] = []
        while want > 0 and self._by_length and len(runs) != max_runs:
            at = bisect_left(self._by_length, (want, 0))
            length, pfn = self._by_length[min(at, len(self._by_length) - 1)]
            count = min(length, want)
            self._remove(pfn)
            if length > count:
                self._insert(pfn + count, length - count)
            runs.append(Run(pfn, count))
            want -= count
            self.total -= count
        return runs

    def _check(self, pfn: int, count: int) -> None:
        if count < 1 or pfn < 0 or pfn + count > self.nr_frames:
            raise FrameConflict(f"{count} frames from {pfn} on: the device has {self.nr_frames}")

    def _insert(self, pfn: int, count: int) -> None:
        self._starts.insert(bisect_left(self._starts, pfn), pfn)
        self._count[pfn] = count
        entry = (count, pfn)
        self._by_length.insert(bisect_left(self._by_length, entry), entry)

    def _remove(self, pfn: int) -> int:
        count = self._count.pop(pfn)
        del self._starts[bisect_left(self._starts, pfn)]
        del self._by_length[bisect_left(self._by_length, (count, pfn))]
        return count

"""What every receiver of a block does, whatever brought the block there."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PAGE = 4096
COLD_BYTES = (
    32 << 20
)  # source arrays that take turns have so many bytes together, so that they are not in a cache
MOST_SOURCES = 512
VALUES = 97  # stored values run from 100 on

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def overwrite(block: Bytes, pages: int, nbytes: int, value: int) -> int:
    """Store a value to the first bytes of each of the first pages; return the sum of the first byte of every page."""
    rows = block.reshape(-1, PAGE)
    if pages:
        rows[:pages, :nbytes] = value
    return int(rows[:, 0].sum())


def sum_after(block: Bytes, pages: int, value: int) -> int:
    """Return what overwrite() has to return for a block of one value."""
    return pages * value + (block.size // PAGE - pages) * int(block[0])


@functools.cache
def sources(size: int) -> tuple[Bytes, ...]:
    """Return blocks in ordinary memory, each of one value, no two neighbours alike; requests of one process share them."""
    number = min(max(COLD_BYTES // size, 4), MOST_SOURCES)
    return tuple(np.full(size, i % 13 + 1, "u1") for i in range(number))


class Requests:
    """What is sent, request after request: a source block, and the value to store; and what must come back."""

    def __init__(self, size: int, pages: int, *, same: bool = False) -> None:
        self.sources = sources(size)[:1] if same else sources(size)
        self.pages = pages
        self._sent = self._order()
        self._checked = self._order()

    def _order(self) -> Iterator[tuple[Bytes, int]]:
        values = itertools.cycle(range(100, 100 + VALUES))
        return zip(itertools.cycle(self.sources), values)

    def next(self) -> tuple[Bytes, int]:
        """Return the next block and value to send."""
        return next(self._sent)

    def expected(self) -> int:
        """Return what has to come back of the next request that is checked."""
        block, value = next(self._checked)
        return sum_after(block, self.pages, value)


Request = Callable[[], Any]

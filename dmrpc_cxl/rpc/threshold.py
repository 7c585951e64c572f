"""From which size on it pays to go by Ref: measured, for each host, in a few milliseconds.

By value, the bytes are copied into the ring and out of it. By Ref, an array that is not in DM is copied once, and the life
cycle of a Ref comes on top: ralloc, create_ref, map, rfree. So the sizes are equal where one copy costs as much as that.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from .places import Attachment

__all__ = ["measured"]

SMALLEST, LARGEST, DEFAULT = 4 << 10, 256 << 10, 32 << 10
COPIED = 64 << 10
ROUNDS = 15
EXTRA_COPIES = 1.0


def measured(host: Attachment) -> int:
    """Return the threshold in bytes, a whole number of KiB; 32 KiB when DM is too full to measure."""
    try:
        life = median([_life(host) for _ in range(ROUNDS)])
    except MemoryError:
        return DEFAULT
    source, target = np.ones(COPIED, "u1"), np.ones(COPIED, "u1")
    per_byte = median([_copy(source, target) for _ in range(ROUNDS)]) / COPIED
    nbytes = life / (EXTRA_COPIES * per_byte)
    return int(min(max(nbytes, SMALLEST), LARGEST)) // 1024 * 1024


def _life(host: Attachment) -> float:
    begin = time.perf_counter()
    buffer = host.ralloc(COPIED, zero=False)
    ref = host.create_ref(buffer, move=True)
    mapped = host.view_ref(ref.to_bytes())
    mapped.numpy()
    mapped.free()
    return time.perf_counter() - begin


def _copy(source: np.ndarray, target: np.ndarray) -> float:
    begin = time.perf_counter()
    target[:] = source
    return time.perf_counter() - begin

"""Memory that is slower than this machine's: a model, off unless asked for.

``attach(fabric, latency="265ns")`` has this host's DM layer take as long as if the device answered after 265 ns. What a cache line
takes longer than in local memory, whose latency is measured, is added up and waited for by spinning; "+190ns" says that difference
itself. Charged is what the DM layer
itself reads and writes: frame words, Ref entries, frames that it copies or zeroes, and arrays that the RPC layer copies into DM.
Words wait one by one; of a copy, ``latency_overlap`` lines are under way at once.

What it cannot know: plain loads and stores of the user, which the machine does at its own speed, and what its caches would have
kept of the slower memory. ``Host.charge(nbytes)`` is for code that wants its own accesses in the model.

Paper: VI-A (a remote socket with a lowered clock, 265 ns).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import _native

__all__ = ["Latency", "extra_nanoseconds"]

_TEXT = re.compile(r"\s*(\+?)([0-9]+(?:\.[0-9]+)?)\s*(ns|us)\s*")
DEFAULT_OVERLAP = 8
MOST_NS = 100_000


def extra_nanoseconds(latency: str | float) -> float:
    """Return by how many ns a device of some latency is slower than this machine's memory; 0 if it is not.

    Args:
        latency: a number of ns, or a text with its unit, ns or us. A text that begins with + is the difference itself.

    Raises:
        ValueError: it is none.
    """
    if isinstance(latency, str):
        found = _TEXT.fullmatch(latency)
        if found is None:
            raise ValueError(f"not a latency: {latency!r} (such as '265ns', '1.5us' or '+190ns')")
        value = float(found[2]) * (1000 if found[3] == "us" else 1)
        more = bool(found[1])
    else:
        value, more = float(latency), False
    if not (0 if more else 1) <= value <= MOST_NS:
        raise ValueError(f"a latency of {value:g} ns; it may be 1 ns to {MOST_NS // 1000} us")
    return value if more else max(value - _native.latency_measured()[0], 0.0)


@dataclass(frozen=True)
class Latency:
    """The model of one host, and what it has done so far.

    Attributes:
        asked: what was asked for.
        local_ns: latency of this machine's memory, measured.
        extra_ns: what a line takes longer; 0 when this machine's memory is no faster.
        overlap: lines of a copy that are under way at once.
        lines_alone, lines_copied: charged.
        owed_ns, waited_ns, waits: what that comes to, what was spun, and how often. Charging itself takes time, which is part
            of what is owed and not spun.
        error: by which share charges take longer than what they charge, when lines are charged one by one, the worst case;
            measured.
    """

    asked: str
    local_ns: float
    extra_ns: float
    overlap: int
    lines_alone: int
    lines_copied: int
    owed_ns: int
    waited_ns: int
    waits: int
    error: float

    def __str__(self) -> str:
        return (
            f"{self.asked} emulated: {self.extra_ns:.0f} ns more for a line ({self.local_ns:.0f} ns measured here), "
            f"{self.overlap} at once in copies; error {self.error:+.1%}"
        )

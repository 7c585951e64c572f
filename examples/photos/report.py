"""The table at the end: what the same work took in each mode."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dmrpc_cxl.fabric import device

if TYPE_CHECKING:
    from dmrpc_cxl.rpc.marshal import Transfer

    from .balancer import Desk

MODES: dict[str, Transfer] = {"by value": "value", "by reference": "auto"}
COUNTERS = {
    "passed by Ref": ("bytes_referenced",),
    "copied on write": ("bytes_copied",),
    "faults": ("wp_faults", "missing_faults"),
    "frames copied": ("frames_copied",),
    "coordinator round trips": ("coordinator_round_trips",),
}
IN_BYTES = ("sent in messages", "passed by Ref", "copied on write")
WIDTH = 100


def size(nbytes: float) -> str:
    """Return a number of bytes in MiB, KiB or bytes."""
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / 1024:.1f} KiB" if nbytes >= 1024 else f"{nbytes:.0f} B"


class Report:
    """What each mode has taken, from the counters of all hosts and of the balancer."""

    def __init__(self, fabric: str, desk: Desk) -> None:
        self._fabric = fabric
        self._desk = desk
        self._taken: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}

    @contextlib.contextmanager
    def measure(self, mode: str, nr_pictures: int) -> Iterator[None]:
        """Add what happens in the block to a mode; nothing else may be under way."""
        before, began = self._now(), time.monotonic()
        yield
        seconds = time.monotonic() - began
        taken = self._now()
        taken.subtract(before)
        taken.update({"pictures": nr_pictures})
        self._taken[mode].update(taken)
        self._taken[mode]["seconds"] += seconds  # type: ignore[assignment]

    def _now(self) -> Counter[str]:
        with device.open(self._fabric, writable=False) as opened:
            hosts = [host["counters"] for host in opened.hosts()]
        now = Counter({"sent in messages": self._desk.tally().nbytes})
        for row, names in COUNTERS.items():
            now[row] = sum(host[name] for host in hosts for name in names)
        return now

    def show(self) -> None:
        """Print the table; messages are counted where the balancer passes them on."""
        table = Table("", title="The same edits by the same processes", title_justify="left")
        for mode in MODES:
            table.add_column(mode, justify="right")
        for row in ("pictures", "seconds", "sent in messages", *COUNTERS):
            table.add_row(row, *(_text(row, self._taken[mode][row]) for mode in MODES))
        Console(width=WIDTH).print(table)


def _text(row: str, number: float) -> str:
    if row in IN_BYTES:
        return size(number)
    return f"{number:.2f}" if row == "seconds" else f"{number:,}"

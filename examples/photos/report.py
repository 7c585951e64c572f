"""The table at the end: what the DM layer of each host has done, from the counters in the device."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dmrpc_cxl.fabric import device

COLUMNS = {
    "Refs made": lambda counters: counters["create_ref_calls"] + counters["move_ref_calls"],
    "mapped": lambda counters: counters["map_ref_calls"],
    "referenced": lambda counters: counters["bytes_referenced"],
    "copied": lambda counters: counters["bytes_copied"],
    "faults": lambda counters: counters["wp_faults"] + counters["missing_faults"],
    "frames copied": lambda counters: counters["frames_copied"],
    "round trips": lambda counters: counters["coordinator_round_trips"],
}
IN_BYTES = ("referenced", "copied")
WIDTH = 100


def size(nbytes: int) -> str:
    """Return a number of bytes in MiB, KiB or bytes."""
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / 1024:.1f} KiB" if nbytes >= 1024 else f"{nbytes} B"


def row(counters: dict[str, int]) -> list[int]:
    """Return the numbers of one host."""
    return [column(counters) for column in COLUMNS.values()]


def show(fabric: str) -> None:
    """Print the table; every host has to be attached still."""
    with device.open(fabric, writable=False) as opened:
        hosts: list[dict[str, Any]] = opened.hosts()
    table = Table("host", title="What the DM layer has done", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    rows = {host["name"]: row(host["counters"]) for host in hosts}
    total = [sum(numbers) for numbers in zip(*rows.values(), strict=True)]
    for name, numbers in sorted(rows.items()):
        table.add_row(name, *_texts(numbers))
    table.add_section()
    table.add_row("all", *_texts(total))
    Console(width=WIDTH).print(table)


def _texts(numbers: list[int]) -> list[str]:
    return [
        size(number) if name in IN_BYTES else f"{number:,}"
        for name, number in zip(COLUMNS, numbers, strict=True)
    ]

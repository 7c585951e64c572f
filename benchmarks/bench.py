"""The bars of the fabric, of memory servers and of the RPC layer: `make bench` prints each with what was measured, and writes JSON.

Every figure is a ratio of medians taken in one run, the two sides in alternation. A bar that is missed is printed as
missed. `python -m benchmarks.bench --only copy --json FILE`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from . import (
    crash_points,
    crash_recovery,
    crash_survivors,
    fabric_attach,
    fabric_calls,
    fabric_copies,
    machine,
    net_create_ref,
    net_redis,
    net_translation,
    rpc_chain,
    rpc_forwarder,
    rpc_large,
    rpc_latency,
    rpc_threshold,
)

EXPERIMENTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "steady": fabric_calls.steady_state,
    "create-ref": fabric_calls.create_ref,
    "circulate": fabric_calls.circulate,
    "fault": fabric_copies.single_fault,
    "overwrite": fabric_copies.overwrite,
    "read": fabric_copies.read_shared,
    "attach": fabric_attach.attach,
    "host-killed": crash_survivors.survivors,
    "coordinator-killed": crash_recovery.coordinator_killed,
    "scrubbing": crash_recovery.scrubbing,
    "crash-points": crash_points.cost,
    "net-redis": net_redis.against_redis,
    "net-create-ref": net_create_ref.create_ref,
    "net-translation": net_translation.translation,
    "rpc-latency": rpc_latency.latency,
    "rpc-hops": rpc_chain.hops,
    "rpc-value": rpc_chain.against_value,
    "rpc-large": rpc_large.large,
    "rpc-forwarder": rpc_forwarder.forwarder,
    "rpc-threshold": rpc_threshold.threshold,
}


def _show(lines: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "bar",
        "measured",
        "required",
        "",
        "beside it",
        title="Bars",
        title_justify="left",
    )
    for line in lines:
        sign = "≤" if line["at_most"] else "≥"
        known = {"what", "measured", "bar", "at_most", "unit", "met", "spread"}
        beside = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in line.items()
            if key not in known
        )
        table.add_row(
            line["what"],
            f"{line['measured']:.3g} {line['unit']}",
            f"{sign} {line['bar']:.3g} {line['unit']}",
            "[green]met[/]" if line["met"] else "[red]MISSED[/]",
            beside,
        )
    console.print(table)


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(sorted(EXPERIMENTS)),
    help="Run these experiments only.",
)
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path),
    default=Path("build/bench.json"),
    show_default=True,
)
def main(only: tuple[str, ...], path: Path) -> None:
    """Measure against the bars. Exits with 1 when one is missed."""
    console = Console()
    lines: list[dict[str, Any]] = []
    start = time.monotonic()
    before = machine.facts()  # the load average, above all
    for name in only or EXPERIMENTS:
        with console.status(f"measuring: {name}"):
            lines += EXPERIMENTS[name]()
    _show(lines, console)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": before, "bars": lines}, indent=1))
    console.print(f"{time.monotonic() - start:.0f} s; figures in {path}")
    sys.exit(not all(line["met"] for line in lines))


if __name__ == "__main__":
    main()

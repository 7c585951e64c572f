"""What a run has found: the table at the end, and a page of HTML that stands by itself."""

from __future__ import annotations

import argparse
import base64
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from . import bmp
from .bmp import Bytes
from .measure import FROM_DEVICE, THROUGH_TRANSPORTS, Cost
from .photographs import PHOTOGRAPHS, Picture, name_of
from .variants import VARIANTS
from .work import Work

WIDTH = 110
TEMPLATE = Path(__file__).with_name("report.html")
_IN_BYTES = (THROUGH_TRANSPORTS, "bytes placed in DM", "bytes copied in DM")


class Row(NamedTuple):
    """A line of the table: what it says, and how it is read off a cost."""

    name: str
    text: Callable[[Cost], str]


def size(nbytes: float) -> str:
    """Return a number of bytes in MiB, KiB or bytes."""
    if nbytes >= 1 << 20:
        return f"{nbytes / (1 << 20):.2f} MiB"
    return f"{nbytes / 1024:.1f} KiB" if nbytes >= 1024 else f"{nbytes:.0f} B"


def _count(what: str) -> Callable[[Cost], str]:
    if what in _IN_BYTES:
        return lambda cost: size(cost.per_picture(what))
    return lambda cost: f"{cost.per_picture(what):.2f}"


def _cpu(*names: str) -> Callable[[Cost], str]:
    return lambda cost: f"{cost.cpu_ms(*names):.3f} ms"


def rows(costs: Mapping[str, Cost]) -> list[Row]:
    """Return the lines of the table; what is counted is told for each picture."""
    hosts = list(next(iter(costs.values())).cpu_ns)
    found = [
        Row("pictures", lambda cost: f"{cost.pictures:,}"),
        Row("blocked by the firewall", lambda cost: f"{cost.tally.nr_blocked:,}"),
        Row("results checked, all right", lambda cost: f"{cost.tally.nr_checked:,}"),
        Row("pictures per second", lambda cost: f"{cost.per_second:,.0f}"),
        Row("payload", lambda cost: f"{cost.bits_per_second / 1e9:.2f} Gbit/s"),
        Row("latency, mean", lambda cost: f"{cost.mean_ms:.2f} ms"),
    ]
    for percent in (50, 99):
        found.append(
            Row(
                f"latency, {percent}th percentile",
                lambda cost, percent=percent: f"{cost.percentile_ms(percent):.2f} ms",  # type: ignore[misc]
            )
        )
    found += [Row(what, _count(what)) for what in (THROUGH_TRANSPORTS, *FROM_DEVICE)]
    found.append(Row("CPU time, all processes", _cpu()))
    found += [Row(f"  {name}", _cpu(name)) for name in hosts]
    found.append(Row("frames and Refs left behind", lambda cost: f"{cost.nr_left}"))
    return found


def title(options: argparse.Namespace) -> str:
    """Say what was compared."""
    emulated = os.environ.get("DMRPC_LATENCY")  # by the hosts of this run: docs/running.md
    return (
        f"{name_of(options.size)}B bitmaps, {options.mode}, work: {options.work}, {options.window} requests under way, "
        f"transport: {options.transport}; counts and times are for each picture"
        + (f"; a device of {emulated} is emulated" if emulated else "")
    )


def show(options: argparse.Namespace, costs: Mapping[str, Cost]) -> None:
    """Print the table."""
    table = Table("", title=title(options), title_justify="left")
    for name in costs:
        table.add_column(name, justify="right")
    for row in rows(costs):
        table.add_row(row.name, *(row.text(cost) for cost in costs.values()))
    console = Console(width=WIDTH)
    console.print(table)
    for name in costs:
        console.print(f"{name}: {VARIANTS[name].about}", highlight=False)


# ---------------------------------------------------------------- the page


def _picture(file: Bytes) -> str:
    """Return a bitmap as a URL that browsers show."""
    from PIL import Image

    with io.BytesIO() as written:
        Image.fromarray(np.ascontiguousarray(bmp.to_pixels(file))).save(written, "PNG")
        return _url("image/png", written.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _facts() -> dict[str, str]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    import os

    return {
        "processor": f"{cpu}, {os.cpu_count()} CPUs",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(sys.argv[1:]) or "no options",
    }


def write_page(
    options: argparse.Namespace,
    costs: Mapping[str, Cost],
    sizes: Mapping[str, Mapping[int, Cost]],
    works: Mapping[str, Mapping[Work, Cost]],
    shown: Sequence[tuple[Picture, Bytes, Bytes]],
) -> Path:
    """Write the page; return its path.

    Args:
        costs: of the comparison, by variant.
        sizes, works: by variant and point; empty: not measured.
        shown: pictures, and what became of them: transcoded, compressed.
    """
    import jinja2

    from . import plots

    made: list[dict[str, str]] = []

    def add(heading: str, text: str, drawn: bytes) -> None:
        made.append({"heading": heading, "text": text, "url": _url("image/svg+xml", drawn)})

    add("Latency", "How many of the requests ended within which time.", plots.latencies(costs))
    add("CPU time", "For each picture, by process.", plots.cpu(costs))
    if sizes:
        add("Sizes", f"Work: {options.work}. Medians are not taken: each point is all its blocks.",
            plots.throughput(sizes))  # fmt: skip
    if works:
        add("Work", f"At {name_of(options.size)}B. What is computed hides what is moved.",
            plots.works(works))  # fmt: skip
    gallery: list[dict[str, Any]] = [
        {
            "name": picture.name.replace("_", " "),
            "rights": PHOTOGRAPHS.get(picture.name, ""),
            "before": _picture(picture.file),
            "before_bytes": size(picture.file.nbytes),
            "results": [
                {"what": what, "url": _url("image/jpeg", result.tobytes()), "bytes": size(result.nbytes)}
                for what, result in (("transcoded", transcoded), ("compressed", compressed))
            ],
        }
        for picture, transcoded, compressed in shown
    ]  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title(options),
        heads=[f"{name} ({VARIANTS[name].about})" for name in costs],
        rows=[(row.name, [row.text(cost) for cost in costs.values()]) for row in rows(costs)],
        plots=made,
        gallery=gallery,
        facts=_facts(),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path

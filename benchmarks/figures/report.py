"""What the figures say, for people: a table on the terminal, and docs/results.md. Nothing here measures or is edited by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import plots, reasons
from .summary import Points, bytes_text, ratio

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "results.md"
PICTURES = ROOT / "docs" / "figures"

LEAST_ROUNDS = 5

Result = dict[str, Any]

_HEAD = """\
# Results

The experiments of the paper, run on this project by `make figures`, or `make figures-clusters`, which also measures Ray and
Spark; they write this file, and it is not edited by hand.

The paper measured on eight servers with 100 Gb/s between them and an emulated CXL device; this is one machine on which all
processes share {cpus} CPUs. So times mean little, and ratios are what to look at: everything that is compared was measured in one run, in
short blocks that took turns in random order, {rounds} rounds or more, each ratio within its round. Given are the median of the rounds and,
in brackets, the lowest and the highest. Every result was checked. To be done within 40 minutes a block lasts some {ms:.0f} ms, as many
requests as fit; those of slow variants, of latencies and of slopes last longer.

*fresh* lines write the data anew for each request, and all that its Ref, its pages and its faults cost is in the time. *shared*: the caller
writes into a DM buffer made for the request and keeps it, so the receiver's stores are copy-on-write. *pre-shared* lines are the paper's
way: the data was written once, before. `cxl` is by Ref through the pool, `net` through a memory server over loopback TCP, whose CPU time
counts; the `-copy` variants copy at once whenever a Ref is made. *one CPU*: all processes pinned to one; *free*: the kernel chooses.

Processes of ours are forks of one that has imported what they need, as multiprocessing's `forkserver` makes them, so their code lies
at the same addresses ([why that matters](decisions/0017-one-address-layout.md)). Those of Ray and Spark are as they start them.

**Machine**: {cpu}, {cpus} CPUs; Linux {kernel}; Python {python}, NumPy {numpy}; load average {load:.1f} when the first figure began{busy}.
{quick}"""

_BUSY = """ (more than these measurements make: others were at work, and the spreads show it)"""

_LOSES = """\
## Where by reference loses, and why

Points at which the line *cxl, fresh* or *net, fresh* has a lower throughput than another one of the same figure, with fresh data as well
(`net` against `cxl` is left out: a round trip costs more than a load):
"""

_QUICK = """
This is a **quick run** (`--quick`): fewer points, shorter blocks. `make figures` measures all.
"""

_FOOT = """\
- **Small data.** A Ref costs some microseconds in making, showing and freeing, more than copying 4 KiB twice. The RPC layer therefore sends
  small data by value (`transfer="auto"`); the lines here insist on a Ref, except in Fig 10.
- **One call, rings, fresh data.** By value, the data is copied into a ring that stays in the cache and out of it; by Ref it is copied once, into
  frames that are colder. The gain grows with the calls in a row, and with what a copy costs: it begins at smaller sizes over TCP.
- **Stores to shared pages.** A copy-on-write fault wakes another thread, and costs as much as copying dozens of pages. A receiver that
  overwrites most of what it gets should be given it (`move`) or ask for a copy (`transfer="copy"`).
- **A memory server.** The bytes go to the server and from there to who looks at them: twice through the kernel, however many services are in
  between. By value they go through once for each call, over rings not through the kernel at all. So fresh data is cheaper by value
  over rings, and over TCP for one or two calls; data that lies at the server already is not.
- **Against shared memory by hand** at 32 KiB: two copies of 32 KiB cost less than one call of any RPC layer in Python. The hand-written
  program has one client, one receiver, one buffer, no names, no errors, no deadlines, and loses the isolation if a second sender comes.
- **Whole lives of buffers that are kept.** Making a Ref to a new buffer that its creator keeps protects its pages, and using the memory
  again takes the protection off. Copying into warm frames is cheaper than both together, at the sizes that Fig 7 shows as *fresh*.

## Once more

```console
$ make figures            # everything but Ray and Spark, under 40 minutes; writes this file and docs/figures/
$ make figures-quick      # fewer points and rounds, under 4 minutes; writes build/figures/ only
$ make figures-clusters   # the same, and installs Ray and Spark to be compared with (Spark needs Java); 10 minutes more
$ .venv/bin/python -m benchmarks.figures --only fig07 --place "one CPU"    # a part
```

`build/figures/*.json` holds every point of every line: throughput, latency percentiles, CPU time of each process, bytes sent, frames
copied, faults, round by round. How it is measured: [benchmarks/figures](../benchmarks/figures/__init__.py).
"""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.2g}"


def show(console: Console, results: Sequence[Result]) -> None:
    """Print the bars of figures, met and missed."""
    for result in results:
        if result["bars"]:
            table = Table(
                "bar", "measured", "of rounds", "note", title=result["title"], title_justify="left"
            )
            for one in result["bars"]:
                colour = {True: "green", False: "red", None: "yellow"}[one["met"]]
                table.add_row(
                    one["what"], f"[{colour}]{plots.bar_text(one)}[/]", _spread(one), one["note"]
                )
            console.print(table)
        for extra in result.get("tables", ()):
            table = Table(*extra["head"], title=extra["title"], title_justify="left")
            for name, *values in extra["rows"]:
                table.add_row(name, *map(_number, values))
            console.print(table)
        for name, reason in result.get("skipped", {}).items():
            console.print(f"{result['figure']}: without {name}: {reason}")


def _spread(one: dict[str, Any]) -> str:
    return "" if one["spread"] is None else " to ".join(_number(value) for value in one["spread"])


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _bar_rows(bars: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for one in bars:
        sign = "at most" if one["at_most"] else "at least"
        unit = f" {one['unit']}".rstrip()
        measured, state = "not measured", ""
        if one["measured"] is not None:
            state = {True: "met", False: "**missed**", None: "not resolved"}[one["met"]]
            measured = _number(one["measured"])
            if one["met"] is False and measured == _number(one["bar"]):
                measured = f"{one['measured']:.4g}"  # or a miss would look as if it were none
            measured += unit
            if one["spread"] is not None:
                measured += f" ({_spread(one)})"
        rows.append(
            [one["what"], measured, f"{sign} {_number(one['bar'])}{unit}", state, one["note"]]
        )
    return rows


def _section(result: Result, pictures: str) -> list[str]:
    lines = [f"## {result['title']}", ""]
    if result["points"]:
        lines += [f"![{result['title']}]({pictures}{result['figure']}.png)", ""]
    lines += [f"The paper: {claim}." for claim in result["claims"]]
    if result.get("headline"):
        lines += ["", f"Here: {result['headline']}."]
    lines.append("")
    for remark in result.get("remarks", ()):
        lines += [remark, ""]
    for table in result.get("tables", ()):
        rows = [[name, *map(_number, values)] for name, *values in table["rows"]]
        head = [table["title"], *table["head"][1:]]
        lines += [*_markdown_table(head, rows), ""]
    if result["bars"]:
        lines += [
            *_markdown_table(["bar", "measured", "asked", "", "note"], _bar_rows(result["bars"])),
            "",
        ]
    if why := reasons.of(result):
        lines += ["What stands in the way of what is missed:", "", *(f"- {one}" for one in why), ""]
    for name, reason in result.get("skipped", {}).items():
        lines += [f"Without {name}: {reason}.", ""]
    return lines


def losses(result: Result) -> list[list[str]]:
    """Return rows for where `cxl` and `net` are slower than others, by other, place and size."""
    points = Points(result["points"])
    found: dict[tuple[str, ...], list[float]] = {}
    total: dict[tuple[str, ...], int] = {}
    for one in (
        *points.select(variant="cxl", mode="fresh"),
        *points.select(variant="net", mode="fresh"),
    ):
        params = one["params"]
        for other in points.select(mode="fresh", **params):
            if other["variant"] == one["variant"] or (one["variant"], other["variant"]) == (
                "net",
                "cxl",
            ):
                continue
            size = params.get("size", params.get("block", 0))
            where = ", ".join(str(params[k]) for k in ("transport", "place") if k in params)
            key = (one["variant"], other["variant"], where, bytes_text(size) if size else "")
            total[key] = total.get(key, 0) + 1
            share = ratio(one["rounds"]["per_second"], other["rounds"]["per_second"])["median"]
            if share < 1:
                found.setdefault(key, []).append(share)
    return [
        [
            result["figure"],
            *key,
            f"{len(shares)} of {total[key]}",
            f"{_number(min(shares))} to {_number(max(shares))}"
            if len(shares) > 1
            else _number(shares[0]),
        ]
        for key, shares in found.items()
    ]


def text(results: Sequence[Result], pictures: str) -> str:
    """Return the document; pictures: what stands before their names."""
    first = results[0]["machine"]
    head = _HEAD.format(
        **first,
        ms=1e3 * max(result["options"].get("seconds_per_block", 0.06) for result in results),
        rounds=min(result["options"]["rounds"] for result in results),
        load=first["load_average"],
        busy=_BUSY if first["load_average"] > 1.0 else "",
        quick=_QUICK if any(result["options"]["quick"] for result in results) else "",
    )
    bars = [one for result in results for one in result["bars"]]
    met = sum(one["met"] is True for one in bars)
    seconds = sum(result["seconds"] for result in results)
    lines = [
        head,
        f"{met} of {len(bars)} bars are met. Measuring took {seconds / 60:.0f} minutes.",
        "",
    ]
    for result in results:
        lines += _section(result, pictures)
    rows = [row for result in results if result["figure"] != "e0" for row in losses(result)]
    head_row = [
        "figure",
        "variant",
        "slower than",
        "where",
        "size",
        "points",
        "throughput, 1 = the other's",
    ]
    lines += [_LOSES, *(_markdown_table(head_row, rows) if rows else ["None."]), "", "Why:", ""]
    return "\n".join(lines) + "\n" + _FOOT


def write(results: Sequence[Result], path: Path, pictures: str) -> None:
    """Write the document."""
    path.write_text(text(results, pictures), encoding="utf-8")


def why_not_publish(results: Sequence[Result], figures: Sequence[str]) -> str:
    """Say what keeps results from being published: they must be those of all figures, measured in full; nothing if they may."""
    missing = [name for name in figures if name not in {one["figure"] for one in results}]
    if missing:
        return f"{', '.join(missing)} was not measured"
    for one in results:
        rounds = one["options"]["rounds"]
        if one["options"]["quick"] or rounds < LEAST_ROUNDS:
            return f"{one['figure']} was measured with --quick, or in {rounds} rounds; at least {LEAST_ROUNDS} are needed"
        if one["options"].get("part"):
            return f"{one['figure']} was measured in part: {one['options']['part']}"
    return ""


def publish(results: Sequence[Result], out: Path) -> None:
    """Write docs/results.md and the pictures that it shows."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for result in results:
        picture = out / f"{result['figure']}.png"
        if result["points"]:
            shutil.copyfile(picture, PICTURES / picture.name)
    write(results, DOCUMENT, "figures/")

"""Measure the figures, plot them, write the report: `python -m benchmarks.figures`."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import fig11, plots, report
from .runner import Case, Options, Ticker, facts
from .variants import REGISTRY

FIGURES = ("e0", "fig05", "fig06", "fig07", "fig08", "fig10", "fig11", "fig12")


class Bars(Ticker):
    """Progress bars: one for the figures, one for the blocks of the measurement that runs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def begin(self, what: str, blocks: int) -> None:
        self._what = what
        self._task = self._progress.add_task(what, total=blocks)

    def advance(self, case: Case) -> None:
        self._progress.update(
            self._task, advance=1, description=f"{self._what}: {case.variant}, {case.mode}"[:60]
        )

    def end(self) -> None:
        self._progress.remove_task(self._task)


def module_of(name: str) -> ModuleType:
    """Return the module of a figure."""
    return importlib.import_module(f".{name}", __package__)


def measure(name: str, options: Options, ticker: Ticker, part: str = "") -> dict[str, Any]:
    """Measure one figure, and return all that is kept of it; part: which part of it, if not the whole."""
    module = module_of(name)
    before = facts()
    begin = time.monotonic()
    found: dict[str, Any] = module.run(options, ticker)
    return {
        "figure": name,
        "title": module.TITLE,
        "claims": list(module.CLAIMS),
        "machine": before,
        "options": {
            "rounds": options.rounds,
            "seconds_per_block": options.seconds,
            "quick": options.quick,
            "part": part,
        },
        "seconds": time.monotonic() - begin,
        **found,
    }


@click.command()
@click.option(
    "--only", multiple=True, type=click.Choice(FIGURES), help="Measure these figures only."
)
@click.option("--quick", is_flag=True, help="Fewer points, shorter blocks, three rounds, one CPU.")
@click.option("--rounds", type=click.IntRange(1), help="Blocks of each point [5, quick 3].")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice([*REGISTRY, *fig11.MORE_VARIANTS]),
    help="Measure these variants only.",
)
@click.option("--place", "places", multiple=True, type=click.Choice(["one CPU", "free"]))
@click.option("--transport", "transports", multiple=True, type=click.Choice(["ring", "tcp"]))
@click.option("--seconds", type=click.FloatRange(0, 60, min_open=True), help="Of one block, about.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/figures"),
    show_default=True,
)
@click.option(
    "--publish",
    is_flag=True,
    help="Write docs/results.md and docs/figures as well, when every figure has been measured in full.",
)
@click.option("--replot", is_flag=True, help="Measure nothing: plot what was measured before.")
def main(
    only: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    variants: tuple[str, ...],
    places: tuple[str, ...],
    transports: tuple[str, ...],
    seconds: float | None,
    out: Path,
    publish: bool,
    replot: bool,
) -> None:
    """Measure the paper's experiments on this machine, plot them, and write a report."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    options = Options(rounds=rounds or (3 if quick else 5), seconds=seconds or 0.06, quick=quick)
    if quick:
        options.places, options.seconds = ("one CPU",), seconds or 0.04
    if variants:
        options.variants = frozenset(variants)
    if places:
        options.places = places
    if transports:
        options.transports = transports
    out.mkdir(parents=True, exist_ok=True)
    part = " ".join((*variants, *places, *transports))
    begin = time.monotonic()
    chosen = only or FIGURES
    if replot and not any((out / f"{name}.json").exists() for name in FIGURES):
        raise click.UsageError(f"--replot: nothing was measured into {out} before")
    if not replot:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as progress:
            total = progress.add_task("figures", total=len(chosen))
            for name in chosen:
                progress.update(total, description=f"figures: {name}")
                found = measure(name, options, Bars(progress), part)
                (out / f"{name}.json").write_text(json.dumps(found, indent=1))
                plots.render(module_of(name), found, out / f"{name}.png")
                progress.advance(total)
                console.print(f"{found['title']}: {found['seconds']:.0f} s")
    results = [
        json.loads(path.read_text()) for name in FIGURES if (path := out / f"{name}.json").exists()
    ]
    for found in results:
        found["remarks"] = list(getattr(module_of(found["figure"]), "REMARKS", ()))
    if replot:
        for found in results:
            plots.render(module_of(found["figure"]), found, out / f"{found['figure']}.png")
    report.show(console, [one for one in results if one["figure"] in chosen])
    report.write(results, out / "results.md", pictures="")
    if publish:
        if reason := report.why_not_publish(results, FIGURES):
            console.print(
                f"docs/results.md stays as it is: {reason}. What was measured: {out}/results.md"
            )
        else:
            report.publish(results, out)
    console.print(f"{time.monotonic() - begin:.0f} s; figures and JSON in {out}")
    sys.exit(0)


if __name__ == "__main__":
    main()

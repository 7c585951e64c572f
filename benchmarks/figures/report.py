"""stub"""
from __future__ import annotations
from typing import Any
from . import plots
from rich.table import Table

def show(console: Any, results: list[dict[str, Any]]) -> None:
    for one in results:
        table = Table("bar", "measured", "spread", "note", title=one["title"], title_justify="left")
        for line in one["bars"]:
            sp = line["spread"]
            table.add_row(line["what"], ("[green]" if line["met"] else "[red]") + plots.bar_text(line), f"{sp[0]:.3g}..{sp[1]:.3g}" if sp else "", line["note"])
        console.print(table)
        for k, v in one.get("skipped", {}).items():
            console.print(k, v)
def write(*a: Any, **k: Any) -> None: ...
def publish(*a: Any, **k: Any) -> None: ...

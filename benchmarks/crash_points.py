"""What crash points cost that are off: the DM layer compiled with them and without, in turns on one CPU.

Both programs (crash_points.c) stand ready and do a block of each operation when they are asked. A third, the same as the
second, says how much of a difference is none: where a process's pages happen to lie in the caches makes several percent.
So all are started anew for each round, and what counts is the median of the rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .machine import bar, median, pinned

ROOT = Path(__file__).parents[1]
ROUNDS = 25
BLOCKS = 8
CPU = 0
FLAGS = ["-std=gnu11", "-O2", "-fvisibility=hidden", "-pthread"]  # as setup.py


def _build(folder: str, name: str, *defines: str) -> str:
    program = f"{folder}/{name}"
    sources = [
        *ROOT.glob("dmrpc_cxl/csrc/*.c"),
        *(ROOT / "tests/c" / shared for shared in ("by_hand.c", "check.c")),
        ROOT / "benchmarks/crash_points.c",
    ]
    compiler = os.environ.get("CC", "gcc")
    include = [f"-I{ROOT / 'dmrpc_cxl/csrc'}", f"-I{ROOT / 'tests/c'}"]
    subprocess.run(
        [compiler, *FLAGS, *defines, *include, "-o", program, *map(str, sources)], check=True
    )
    return program


def _block(program: subprocess.Popen[str]) -> dict[str, float]:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("\n")
    program.stdin.flush()
    pairs = (pair.split("=") for pair in program.stdout.readline().split(","))
    return {name: float(ns) for name, ns in pairs}


def cost() -> list[dict[str, Any]]:
    """Crash points that are off against none."""
    with tempfile.TemporaryDirectory() as folder, pinned(CPU):
        built = [
            _build(folder, "with"),
            _build(folder, "without", "-DDM_NO_CRASH_POINTS"),
            _build(folder, "again", "-DDM_NO_CRASH_POINTS"),
        ]
        rounds = [_round(built) for _ in range(ROUNDS)]
    lines = []
    for name in rounds[0][0]:
        with_points, without, again = ([one[i][name] for one in rounds] for i in range(3))
        lines.append(
            bar(
                f"{name}: with crash points, off, against without",
                _ratio(with_points, without),
                1.03,
                at_most=True,
                none_against_none=_ratio(again, without),
                ns=median(with_points),
            )
        )
    return lines


def _round(built: list[str]) -> list[dict[str, float]]:
    """Start each program, and return what each took for each operation: the least of several blocks in turns."""
    programs = [
        subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for path in built
    ]
    try:
        for program in programs:
            _block(program)  # warm
        blocks = [[_block(program) for program in programs] for _ in range(BLOCKS)]
    finally:
        for program in programs:
            program.communicate()
    return [
        {name: min(block[i][name] for block in blocks) for name in blocks[0][i]}
        for i in range(len(programs))
    ]


def _ratio(ones: list[float], others: list[float]) -> float:
    return median([one / other for one, other in zip(ones, others, strict=True)])


if __name__ == "__main__":
    for line in cost():
        print(line, file=sys.stdout)

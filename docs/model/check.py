"""Explore the model and say what was found: ``python -m docs.model.check``.

Without options: the scenarios of `make check-model`. With --hosts, --frames and so on: one scenario
of that size, for as long as it takes. Exit status 1 when an invariant breaks, with the shortest
path that breaks it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .explore import Result, TooMany, explore
from .invariants import ALWAYS, AT_REST
from .scenarios import (
    CHECKED,
    EVERYTHING,
    MAPPED,
    MISTAKES,
    MOVED,
    ONE_REF,
    SENT,
    SUPPLY,
    TWO_SHARE,
    VIEWED,
)
from .state import Config

SETUPS = {
    "nothing": (),
    "mapped": MAPPED,
    "ref": ONE_REF,
    "shared": TWO_SHARE,
    "moved": MOVED,
    "viewed": VIEWED,
    "sent": SENT,
}
MUST_SEE = (
    "two hosts at once before cow.down",
    "two hosts at once before rfree.down",
    "two hosts at once before map.claim",
    "a host works while another is reclaimed",
    "a frame is taken back while home is reclaimed",
    "a frame is taken back while home, another process by now, takes it in",
    "recovery takes a frame back while home, another process by now, takes it in",
)


def report(result: Result) -> None:
    """Print one line of figures."""
    print(
        f"{result.config.name + ':':32} {result.states:8} states, {result.transitions:8} steps, "
        f"depth {result.depth:3}, {result.at_rest:5} at rest, killed before "
        f"{len(result.crashed_at):2} steps, {result.seconds:5.1f} s",
        flush=True,
    )


def counter_example(result: Result) -> None:
    """Print the shortest path to what is wrong."""
    print(f"\nWRONG: {result.error}\n\nHow it comes about, in the fewest steps:\n")
    before: set[str] = set()
    for number, (text, state) in enumerate(result.trace):
        print(f"{number:3}  {text}")
        lines = state.split("\n")
        for line in lines:
            if line not in before:
                print(f"         {line}")
        before = set(lines)


def check_all() -> int:
    """Explore the scenarios of `make check-model`."""
    results = []
    for config in CHECKED:
        result = explore(config)
        report(result)
        if result.error:
            counter_example(result)
            return 1
        results.append(result)
    sights = set().union(*(result.sights for result in results))
    missed = [sight for sight in MUST_SEE if sight not in sights]
    if missed:
        print(f"\nnot explored: {', '.join(missed)}")
        return 1
    killed = set().union(*(result.crashed_at for result in results))
    print(
        f"\n{sum(result.states for result in results)} states, "
        f"{sum(result.transitions for result in results)} steps, greatest depth "
        f"{max(result.depth for result in results)}, killed before {len(killed)} different steps, "
        f"{sum(result.seconds for result in results):.1f} s of processor time"
    )
    print("\nHeld in every state:")
    print("\n".join(f"  {line}" for line in ALWAYS))
    print("Held in every state with nothing under way:")
    print("\n".join(f"  {line}" for line in AT_REST))
    print(f"Gone through: {'; '.join(MUST_SEE)}")
    return 0


def check_mistakes() -> int:
    """Explore each seeded mistake; all must be found."""
    silent = 0
    for config in MISTAKES:
        result = explore(config)
        silent += not result.error
        print(f"{config.bug:32} {result.states:8} states, {len(result.trace) - 1:3} steps: "
              f"{result.error or 'NOT FOUND'}", flush=True)  # fmt: skip
    return 1 if silent else 0


def options() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="check", description="Explore the model of the protocol.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--refs", type=int, default=2)
    parser.add_argument("--pages", type=int, default=1, choices=(1, 2), help="pages of a mapping")
    parser.add_argument("--ops", type=int, default=2, help="operations of each host")
    parser.add_argument("--crashes", type=int, default=1, help="of hosts")
    parser.add_argument("--coordinator-crashes", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=0, help="new processes in freed slots")
    parser.add_argument("--setup", choices=SETUPS, default="shared", help="what there is at first")
    parser.add_argument("--menu", help="operations, with commas; 'supply' for grants and returns")
    parser.add_argument("--failures", action="store_true", help="map_ref may fail and put back")
    bugs = ["", *(config.bug for config in MISTAKES)]
    parser.add_argument("--bug", default="", choices=bugs, metavar="MISTAKE", help="seed one")
    parser.add_argument("--mistakes", action="store_true", help="explore all seeded mistakes")
    parser.add_argument("--limit", type=int, default=20_000_000, help="give up beyond these states")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        return check_all()
    ask = options().parse_args(words)
    if ask.mistakes:
        return check_mistakes()
    menu = tuple(ask.menu.split(",")) if ask.menu else EVERYTHING
    supply = "supply" in menu
    if supply:
        menu = tuple(dict.fromkeys((*(m for m in menu if m != "supply"), *SUPPLY)))
    setup = () if supply else SETUPS[ask.setup]
    # Host 1 gets what the setup uses, and the others a share of the rest.
    first = min(ask.pages, ask.frames)
    rest = [1 + (i + 1) % ask.hosts for i in range(ask.frames - first)]
    config = Config(
        "as asked", ask.hosts, ask.frames, ask.refs, ask.pages, ask.ops, ask.crashes,
        ask.coordinator_crashes, ask.restarts, ask.failures, menu, setup,
        () if supply else (*([1] * first), *rest), ask.bug,
    )  # fmt: skip
    try:
        result = explore(config, ask.limit)
    except TooMany as error:
        print(error)
        return 2
    report(result)
    if result.error:
        counter_example(result)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

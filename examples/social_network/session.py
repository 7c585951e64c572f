"""The main job: fill the network, check that it does what it is for, compare the ways in which lists of posts travel.

All variants use the same processes and the same stores, and take turns in short blocks whose order is drawn. First each makes
as many requests as it can, 8 at a time; then all make requests at one rate, on schedule: half of what the slowest could.
After every block nothing may be held in DM.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dmrpc_cxl
from dmrpc_cxl.errors import DmError

from ..serving.clocks import cpu_ns, process_ids
from ..serving.desk import Desk, wait_for
from . import graph
from .checks import Wrong, check_all, check_drained
from .fill import fill
from .hosts import add_service_options, folder_of
from .load import KINDS, Generator, Tally
from .profiles import PROFILES, Writer
from .records import Request
from .roles import MOVERS, process_names
from .storage import PostStorage
from .variants import VARIANTS

REQUESTS = 2000  # made beforehand, for each variant
WINDOW = 8
CHECKED_USERS = 5
SHARE_OF_CAPACITY = 0.5
WIDTH = 110


class Cost:
    """What one variant has taken at the common rate."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.capacities: list[float] = []
        self.cpu_ns: Counter[str] = Counter()
        self.bytes_forwarded: Counter[str] = Counter()

    def each(self, what: float) -> float:
        """Return a sum by request."""
        return what / max(self.tally.done, 1)

    def ms(self, percent: float | None = None) -> float:
        """Return a percentile of the latencies, or their mean."""
        found = self.tally.overall()
        if not found.get_total_count():
            return 0.0
        at = found.get_mean_value() if percent is None else found.get_value_at_percentile(percent)
        return float(at) / 1e6


class Session:
    """One run: a generator for each variant, and what each has taken."""

    def __init__(self, host: dmrpc_cxl.Host, options: argparse.Namespace) -> None:
        self.options = options
        self.host = host
        self._random = random.Random(options.seed)
        names = process_names(compact=options.compact)
        wait_for(host, *(f"desk-{name}" for name in names))
        self.desks: dict[str, Any] = {
            name: host.connect(f"desk-{name}", Desk, timeout=None) for name in names
        }
        self._attending = [desk.future.attend() for desk in self.desks.values()]
        self.storage: Any = host.connect("post-storage", PostStorage)
        self.pids = process_ids(host.fabric, (host.name, *names))
        self.costs = {name: Cost() for name in options.variants}
        self.generators = {
            name: Generator(host, name, transport=options.transport) for name in options.variants
        }
        self._writer: Writer | None = None
        self._requests: dict[str, list[Request]] = {}

    def close(self) -> None:
        """Let the services end."""
        for one in self.generators.values():
            one.close()
        for one in self._attending:
            one.cancel()

    def fill(self) -> str:
        """Fill the network; say what there is."""
        options = self.options
        edges = graph.default() if options.graph is None else graph.read_edges(options.graph)
        users = min(graph.nr_users(edges), options.users or sys.maxsize)
        edges = graph.part_of(edges, users)
        self._writer = Writer(PROFILES[options.profile], users, options.seed)
        nr_posts = fill(self.host, edges, users, self._writer)
        for name in self.generators:
            self._requests[name] = [self._writer.request(i, name) for i in range(REQUESTS)]
        return f"{users} users, {2 * len(edges):,} follows, {nr_posts:,} posts"

    def check(self) -> str:
        """Run the checks; say what was checked."""
        assert self._writer is not None
        users = list(range(CHECKED_USERS))
        nr_timelines, nr_posts = check_all(
            self.host, self.generators, self._writer, self.storage, users
        )
        return f"new posts on all {nr_timelines} timelines they belong on; {nr_posts} posts the same by every variant"

    def find_capacities(self) -> None:
        """Have each variant make as many requests as it can."""
        for name in self._in_turn():
            tally = self.generators[name].closed_loop(
                self._requests[name], self.options.block_seconds, window=WINDOW
            )
            self._expect_no_errors(name, tally)
            self.costs[name].capacities.append(tally.per_second)

    def measure(self, rate: float) -> None:
        """Have each variant make requests at one rate."""
        for name in self._in_turn():
            cost = self.costs[name]
            forwarded, clocks = self._forwarded(), cpu_ns(self.pids)
            tally = self.generators[name].open_loop(
                self._requests[name],
                rate,
                self.options.block_seconds,
                warm_up=0.0,
                seed=self._random.getrandbits(32),
            )
            after = cpu_ns(self.pids)
            after.subtract(clocks)
            cost.cpu_ns.update(after)
            cost.bytes_forwarded.update(
                {mover: n - forwarded[mover] for mover, n in self._forwarded().items()}
            )
            self._expect_no_errors(name, tally)
            cost.tally.add(tally)

    def _forwarded(self) -> dict[str, int]:
        return {name: self.desks[name].account().bytes_forwarded for name in MOVERS}

    def _expect_no_errors(self, name: str, tally: Tally) -> None:
        if tally.errors:
            raise Wrong(f"{name}: {dict(tally.errors)}")
        check_drained(self.host.fabric, self.storage)
        if name == "cxl-posts":  # they were there before, and have to be there again
            self.generators[name].closed_loop(self._requests[name], 0.1, window=1, warm_up=0)

    def _in_turn(self) -> list[str]:
        return self._random.sample(list(self.generators), len(self.generators))


def show(options: argparse.Namespace, costs: dict[str, Cost], rate: float) -> None:
    """Print the table."""
    title = (
        f"profile {options.profile}, {rate:.0f} requests per second offered, transport: {options.transport}, "
        f"store: {options.store}"
    )
    table = Table("", title=title, title_justify="left")
    for name in costs:
        table.add_column(name, justify="right")

    def row(name: str, text: Any) -> None:
        table.add_row(name, *(text(cost) for cost in costs.values()))

    row("capacity, 8 at a time", lambda cost: f"{statistics.median(cost.capacities):,.0f} / s")
    row("requests", lambda cost: f"{cost.tally.done:,}")
    row("posts read, each", lambda cost: f"{cost.each(cost.tally.nr_posts):.1f}")
    row("latency, mean", lambda cost: f"{cost.ms():.2f} ms")
    for percent in (50, 90, 99):
        row(
            f"latency, {percent}th percentile",
            lambda cost, percent=percent: f"{cost.ms(percent):.2f} ms",
        )
    for kind in KINDS:
        row(
            f"  {kind.name.lower().replace('_', ' ')}, mean",
            lambda cost, kind=kind: f"{cost.tally.latencies[kind].get_mean_value() / 1e6:.2f} ms",
        )
    row("sent late, 99th percentile",
        lambda cost: f"{cost.tally.lag.get_value_at_percentile(99) / 1e6:.2f} ms")  # fmt: skip
    for mover in MOVERS:
        row(f"bytes through {mover}", lambda cost, mover=mover: f"{cost.each(cost.bytes_forwarded[mover]):,.0f}")  # fmt: skip
    row("CPU time, all processes", lambda cost: f"{cost.each(sum(cost.cpu_ns.values())) / 1e6:.3f} ms")  # fmt: skip
    for name in next(iter(costs.values())).cpu_ns:
        row(f"  {name}", lambda cost, name=name: f"{cost.each(cost.cpu_ns[name]) / 1e6:.3f} ms")
    console = Console(width=WIDTH)
    console.print(table)
    for name in costs:
        console.print(f"{name}: {VARIANTS[name].about}", highlight=False)


def _variants(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: use some of {', '.join(VARIANTS)}, with commas between"
        )
    return names


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(prog="client", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variants", type=_variants, default=["value", "cxl", "cxl-ref"], metavar="NAME,...",
        help=f"some of {', '.join(VARIANTS)}  [default: value,cxl,cxl-ref]")  # fmt: skip
    add("--profile", choices=tuple(PROFILES), default="heavy", help="[default: heavy]")
    add("--graph", type=Path, metavar="FILE",
        help="who follows whom: lines of two numbers  [default: data/socfb-Reed98.edges]")  # fmt: skip
    add("--users", type=int, default=200, metavar="N",
        help="of that graph the first; 0: all  [default: 200]")  # fmt: skip
    add("--rate", type=float, default=0.0, metavar="R",
        help="requests per second; 0: half of what the slowest variant can  [default: 0]")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="blocks of each variant  [default: 3]")
    add("--block-seconds", type=float, default=1.0, metavar="S", help="[default: 1]")
    add("--seed", type=int, default=1, metavar="N", help="of all that is drawn  [default: 1]")
    add("--serve", action="store_true",
        help="fill nothing, measure nothing: serve HTTP until interrupted")  # fmt: skip
    add_service_options(parser)
    return parser


def main(host: dmrpc_cxl.Host) -> int:
    """Run the session; print the comparison."""
    options = parser().parse_args()
    if options.rounds < 1 or options.block_seconds <= 0 or options.users == 1:
        parser().error("--rounds is 1 or more, --block-seconds more than 0, --users 2 or more")
    began = time.monotonic()
    session = None
    try:
        session = Session(host, options)
        if options.serve:
            print("serving; Ctrl-C ends it", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
            return 0
        print(session.fill(), flush=True)
        print(f"checked: {session.check()}", flush=True)
        for _ in range(options.rounds):
            session.find_capacities()
        slowest = min(statistics.median(cost.capacities) for cost in session.costs.values())
        rate = options.rate or SHARE_OF_CAPACITY * slowest
        for _ in range(options.rounds):
            session.measure(rate)
    except (Wrong, DmError) as error:
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        if session is not None:
            session.close()
        if not options.folder:
            shutil.rmtree(folder_of(host.fabric, ""), ignore_errors=True)
    show(options, session.costs, rate)
    print(f"{time.monotonic() - began:.0f} s")
    return 0

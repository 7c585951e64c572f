"""What a piece of work has taken, over all processes: read off the device, the kernel's clocks, and the services' accounts.

CPU time is what the CPU clock of each process says, all threads, user and system. Bytes through transports are exact: what the
client sent to and got from the firewall, and what each service that passes requests on has passed on, headers included.
Counters of the DM layer stand in the device.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.fabric import device

from ..serving.clocks import cpu_ns, process_ids
from ..serving.desk import Desk
from .client import Client, Tally, Wrong

DRAIN_SECONDS = 10.0
SETTLE_SECONDS = 0.002  # what services do behind their replies belongs to the work as well

# What is counted, and from which counters of the DM layer.
FROM_DEVICE = {
    "bytes placed in DM": ("bytes_referenced",),
    "bytes copied in DM": ("bytes_copied",),
    "faults": ("wp_faults", "missing_faults"),
    "frames copied": ("frames_copied",),
    "coordinator round trips": ("coordinator_round_trips",),
}
THROUGH_TRANSPORTS = "bytes through transports"


class Cost:
    """What some work has taken."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.counts: Counter[str] = Counter()
        self.cpu_ns: Counter[str] = Counter()  # by host
        self.nr_left = 0
        """Frames in use and Refs alive after the work was done, as audits of the device found."""

    @property
    def pictures(self) -> int:
        """Pictures that were processed."""
        return self.tally.nr_done

    @property
    def per_second(self) -> float:
        """Pictures per second."""
        return self.tally.nr_done / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def bits_per_second(self) -> float:
        """Bits of pictures per second."""
        return 8 * self.tally.bytes_in / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def mean_ms(self) -> float:
        """Mean latency."""
        return float(self.tally.latencies_ns.mean()) / 1e6 if self.tally.nr_done else 0.0

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the latencies."""
        if not self.tally.nr_done:
            return 0.0
        return float(np.percentile(self.tally.latencies_ns, percent)) / 1e6

    def per_picture(self, what: str) -> float:
        """Return one of the counts by picture."""
        return self.counts[what] / max(self.pictures, 1)

    def cpu_ms(self, *names: str) -> float:
        """Return the CPU time for a picture in some hosts, or in all."""
        ns = sum(self.cpu_ns[name] for name in names) if names else sum(self.cpu_ns.values())
        return ns / 1e6 / max(self.pictures, 1)


class Meter:
    """Measures in one fabric, from the client's process.

    Args:
        desks: of the hosts, by name.
    """

    def __init__(self, host: dmrpc_cxl.Host, desks: Mapping[str, Desk]) -> None:
        self._host = host
        self._desks = dict(desks)
        self._pids = process_ids(host.fabric, (host.name, *self._desks))

    @property
    def hosts(self) -> list[str]:
        """Names of the processes that CPU time is told for."""
        return list(self._pids)

    @contextlib.contextmanager
    def measuring(self, cost: Cost, client: Client) -> Iterator[None]:
        """Add what happens in the block to a cost; nothing else may be under way."""
        before, cpu = self._counts(client), cpu_ns(self._pids)
        yield
        time.sleep(SETTLE_SECONDS)
        after_cpu, after = cpu_ns(self._pids), self._counts(client)
        after.subtract(before)
        after_cpu.subtract(cpu)
        cost.counts.update(after)
        cost.cpu_ns.update(after_cpu)

    def check_drained(self) -> int:
        """Check that no frame is in use and no Ref alive, now that no request is under way; return how many are.

        Raises:
            Wrong: some are, and stay so.
        """
        give_up = time.monotonic() + DRAIN_SECONDS
        while True:
            with device.open(self._host.fabric, writable=False) as opened:
                audit = opened.audit()
            held = {what: audit[what] for what in ("in_use", "live_refs", "nr_violations")}
            if "store" in self._desks:
                held["objects"] = self._desks["store"].account().counts["objects"]
            if not any(held.values()):
                return int(sum(held.values()))
            if time.monotonic() > give_up:
                raise Wrong(f"nothing is under way, and yet: {held}")
            time.sleep(SETTLE_SECONDS)

    def _counts(self, client: Client) -> Counter[str]:
        # The accounts first: asking for them is traffic of its own, on other connections.
        forwarded = sum(desk.account().bytes_forwarded for desk in self._desks.values())
        found = Counter({THROUGH_TRANSPORTS: forwarded + sum(client.traffic)})
        with device.open(self._host.fabric, writable=False) as opened:
            counters = [entry["counters"] for entry in opened.hosts()]
        for what, names in FROM_DEVICE.items():
            found[what] = sum(entry[name] for entry in counters for name in names)
        found["bytes copied in DM"] += client.variant.bytes_copied
        found["bytes placed in DM"] += client.variant.bytes_placed
        return found


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up."""
    sum_ = Cost()
    for cost in costs:
        sum_.tally.add(cost.tally)
        sum_.counts.update(cost.counts)
        sum_.cpu_ns.update(cost.cpu_ns)
    return sum_

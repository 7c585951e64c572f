"""Processes for the variants over memory servers: hosts without the pool, and the server that they use.

They are a fabric of their own, because a name means one service in a fabric: so the very services that run on hosts with the pool run
here as well, under the same names, at the same time, and blocks of both take turns. The processes stand on the runner's stage,
their names with PREFIX before them, so who pins and reads clocks finds them. The CPU time of the server counts; ``NetFabric.pids``
has it.

At the end every page must be free at the server, or the measurement fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import dmrpc_net

from ..net_stage import memory_server
from ..peers import Peer, running_fabric
from ..rpc_stage import LEAVE_SECONDS, SETTLE_SECONDS, end, forward, serve
from .runner import Runner

PREFIX = "net-"
VARIANTS = ("net", "net-copy")
DEVICE_BYTES = 16 << 20  # nobody maps it: hosts read how to reach the coordinator


class NetFabric:
    """Hosts that use a memory server.

    Attributes:
        client: of the server, in this process; it holds nothing there.
    """

    def __init__(
        self, runner: Runner, fabric: str, coordinator: int, client: dmrpc_net.Client, server: int
    ) -> None:
        self.client = client
        self._on = runner.on
        self._fabric = fabric
        self._foreign = {f"{PREFIX}server": server, f"{PREFIX}coordinator": coordinator}
        self._names: list[str] = []

    def pids(self) -> dict[str, int]:
        """Return who works for these hosts and is no peer."""
        return self._foreign

    def start(self, name: str, function: Callable[..., Any] | None = None, *args: Any) -> str:
        """Start a process, and have it run function(host, name, *args); return its name on the stage."""
        there = f"{PREFIX}{name}"
        where: dict[str, Any] = {
            "dm": "net", "servers": list(self.client.addresses), "memory_secret": self.client.secret,
        }  # fmt: skip
        peer = Peer(self._fabric, **where)
        self._on.peers[there], self._on.pids[there] = peer, peer.pid
        self._names.append(there)
        if function is not None:
            peer.call(function, name, *args)
        return there

    def chain(self, prefix: str, nr_calls: int, transport: str) -> list[str]:
        """Start a worker and forwarders in front of it; return their names on the stage, as Stage.chain does."""
        inner = f"{prefix}worker"
        names = [self.start(inner, serve)]
        for i in range(1, nr_calls):
            name = f"{prefix}forwarder-{i}"
            names.append(self.start(name, forward, inner, transport))
            inner = name
        return names

    def gauges(self) -> dict[str, float]:
        """Return what the server has counted so far, and figures tell."""
        stats = self.client.stats()
        return {
            "translation_ns": float(stats["translation_ns"]),
            "server_bytes_copied": float(stats["bytes_copied"]),
            "server_bytes_in": float(stats["bytes_in"]),
            "server_bytes_out": float(stats["bytes_out"]),
        }

    def leave(self) -> None:
        """End every process, and check that nothing is left at the server."""
        peers = [self._on.peers[name] for name in reversed(self._names)]
        for peer in peers:
            peer.call(end)
        for peer in peers:
            peer.leave()
        self._forget()
        give_up = time.monotonic() + LEAVE_SECONDS
        while True:
            audit = self.client.audit()
            held = {what: audit[what] for what in ("nr_refs", "nr_ranges", "nr_violations")}
            held["pages"] = audit["nr_pages"] - audit["nr_free"]
            if not any(held.values()):
                return
            if time.monotonic() > give_up:
                raise AssertionError(f"everybody has left the memory server, and yet: {held}")
            time.sleep(SETTLE_SECONDS)

    def kill(self) -> None:
        """End every process at once."""
        for name in self._names:
            self._on.peers[name].kill()
        self._forget()

    def _forget(self) -> None:
        for name in self._names:
            del self._on.peers[name], self._on.pids[name]
        self._names.clear()


def bare(name: str) -> str:
    """Return what a process of these is called among its own: the name of the service that it runs."""
    return name.removeprefix(PREFIX)


@contextlib.contextmanager
def net_fabric(runner: Runner, *server_options: str, suffix: str = "-net") -> Iterator[NetFabric]:
    """Run a memory server and a fabric for its hosts; fabrics at the same time have different suffixes."""
    with (
        memory_server(*server_options) as (client, server),
        running_fabric(DEVICE_BYTES, suffix=suffix) as (fabric, coordinator),
    ):
        made = NetFabric(runner, fabric, coordinator, client, server)
        runner.foreign.append(made.pids)
        try:
            yield made
            made.leave()
        except BaseException:
            made.kill()
            raise
        finally:
            runner.foreign.remove(made.pids)


def timing_server(runner: Runner) -> contextlib.AbstractContextManager[NetFabric]:
    """Run another one, whose server takes the time of its look-ups of addresses."""
    return net_fabric(runner, "--time-translation", suffix="-timing")


def if_wanted(runner: Runner) -> contextlib.AbstractContextManager[NetFabric | None]:
    """Run them if one of the variants is to be measured; else give None."""
    if any(runner.options.wants(name) for name in VARIANTS):
        return net_fabric(runner)
    return contextlib.nullcontext()


def told(net: NetFabric | None) -> NetFabric:
    """Return the fabric of a variant that is measured."""
    if net is None:
        raise LookupError("no memory server was started")
    return net

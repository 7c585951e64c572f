"""A fabric and memory servers for tests: hosts with the pool, without it, and with both.

The fabric is the one of tests/fabrics.py, the servers are those of tests/net_servers.py: real processes. When a test is over,
every page of every server is free, and every frame of the pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import dmrpc_net
from tests.fabrics import At, Fabric, HostProcess
from tests.net_servers import Servers
from tests.standing import end, forget, until


class NetFabric:
    """Both, and a client that audits the servers."""

    def __init__(self, *, count: int = 1, size: str = "32M", **geometry: Any) -> None:
        self.servers = Servers(count=count, size=size)
        try:
            self.fabric = Fabric(**geometry)
            self._auditor: dmrpc_net.Client | None = None
        except BaseException:
            self.servers.end()
            raise

    @property
    def where(self) -> dict[str, Any]:
        """What attach() has to know of the servers."""
        return {"servers": self.servers.addresses, "memory_secret": self.servers.secret}

    def net(self, **options: Any) -> HostProcess:
        """Start a host without the pool."""
        options.setdefault("deadline", 60.0)
        return self.fabric.host(dm="net", **self.where, **options)

    def mixed(self, **options: Any) -> HostProcess:
        """Start a host with the pool that uses the servers as well."""
        return self.fabric.host(**self.where, **options)

    def pool(self, **options: Any) -> HostProcess:
        """Start a host with the pool that knows no servers."""
        return self.fabric.host(**options)

    def audit(self) -> dict[str, int]:
        """Have the servers account for every page."""
        if self._auditor is None or self._auditor.is_closed:
            self._auditor = self.servers.client()
        return self._auditor.audit()

    def nothing_in_use(self) -> None:
        """Wait until no page of a server and no frame of the pool is held by anybody."""

        def is_free() -> bool:
            found = self.audit()
            assert not found["nr_violations"], found
            return found["nr_free"] == found["nr_pages"] and not found["nr_refs"]

        until(is_free)
        self.fabric.wait_until(lambda audit: audit["in_use"] == audit["live_refs"] == 0)

    def end(self) -> None:
        """End everything, after a failure."""
        end(self.fabric)
        self.servers.end()

    def close(self) -> None:
        """Let all hosts leave, audit, stop."""
        try:
            self.fabric.close()
        except BaseException:
            self.servers.end()
            raise
        self.servers.close()


@contextlib.contextmanager
def net_running(**settings: Any) -> Iterator[NetFabric]:
    """Run a fabric and servers that are audited and removed at the end; after a failure they are only removed."""
    both = NetFabric(**settings)
    try:
        yield both
    except BaseException:
        both.end()
        raise
    both.close()


class StandingNetFabric:
    """A fabric, servers, and hosts without the pool, that several tests use; thrown away after a failure."""

    def __init__(self, *hosts: dict[str, Any]) -> None:
        self._hosts = hosts
        self._both: NetFabric | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[tuple[NetFabric, list[HostProcess]]]:
        """Give them to a test that must leave nothing in use. It may add hosts, but must end them."""
        if self._both is None:
            self._both = NetFabric()
            for options in self._hosts:
                self._both.net(**options)
        both = self._both
        hosts = [host for host in both.fabric.hosts if not host.left]
        try:
            yield both, hosts
            for host in hosts:
                host.call(forget)
            both.nothing_in_use()
        except BaseException:
            self._both = None
            both.end()
            raise

    def close(self) -> None:
        """Audit and stop, if it was started."""
        if self._both is not None:
            both, self._both = self._both, None
            both.close()


__all__ = ["At", "NetFabric", "StandingNetFabric", "net_running"]

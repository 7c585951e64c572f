"""What the coordinator answers: one method for each type of request."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from dmrpc_cxl._native import LAYOUT, Device
from dmrpc_cxl.errors import DmError, RemoteProtocolError

from .connection import Connection
from .directory import Directory
from .hosts import Hosts, LiveHost
from .ledger import Ledger, Run
from .messages import Grant, Hello, HelloReply, MsgType, Register, Registered, Rejoin, Status
from .names import check_name
from .protocol import NEEDS_HOST, Request
from .refusals import Refused
from .scrubber import Scrubber
from .supply import Supply
from .waits import Changes

MAX_ENDPOINT_BYTES = 4096
MAX_WAIT_SECONDS = 3600.0
DEFAULT_WAIT_SECONDS = 30.0

_STATES = {
    LAYOUT["HOST_FREE"]: "free",
    LAYOUT["HOST_ACTIVE"]: "active",
    LAYOUT["HOST_DEAD"]: "dead",
    LAYOUT["HOST_DRAINING"]: "draining",
}


@dataclass
class Parts:
    """What the service works on."""

    device: Device
    ledger: Ledger
    directory: Directory
    hosts: Hosts
    supply: Supply
    changes: Changes
    scrubber: Scrubber


class Service:
    """The requests of one fabric."""

    def __init__(
        self, parts: Parts, stop: Callable[[], None], give_way: Callable[[], None]
    ) -> None:
        """Answer from these parts; `stop` ends the coordinator, `give_way` does if another took over."""
        self.epoch = 0
        self.recovery_s = 0.0
        """From the start of the process's work to the first request: what a restart costs."""
        self.stopping = False
        self.requests: Counter[str] = Counter()
        self._parts = parts
        self._stop = stop
        self._give_way = give_way
        superblock = parts.device.superblock
        self._fabric_id: int = superblock["fabric_id"]
        self._fabric: str = superblock["name"]
        self._secret: bytes = superblock["secret"]
        self._page_size: int = superblock["page_size"]
        self._started = asyncio.get_running_loop().time()
        self._answers: dict[MsgType, Callable[[Connection, Any], Awaitable[Any]]] = {
            MsgType.HELLO: self._hello,
            MsgType.REGISTER: self._register,
            MsgType.REJOIN: self._rejoin,
            MsgType.GUARD: self._guard,
            MsgType.GRANT: self._grant,
            MsgType.RETURN: self._return,
            MsgType.LEAVE: self._leave,
            MsgType.PUBLISH: self._publish,
            MsgType.WITHDRAW: self._withdraw,
            MsgType.LOOKUP: self._lookup,
            MsgType.LIST: self._list,
            MsgType.STATS: self._stats,
            MsgType.HOSTS: self._list_hosts,
            MsgType.SHUTDOWN: self._shutdown,
            MsgType.WAIT: self._wait,
            MsgType.CHECK: self._check,
        }

    async def answer(self, connection: Connection, request: Request) -> Any:
        """Serve one request. Returns what the answer carries.

        Raises:
            DmError: the request is refused; refusals.status_of says how.
        """
        self.requests[request.type.name] += 1
        if self._replaced() or self.stopping:
            raise self._hang_up(connection)
        try:
            if request.type in NEEDS_HOST:
                self._parts.hosts.of(connection)  # refuses
            answer = await self._answers[request.type](connection, request.body)
            if self._replaced():
                # Our successor knows nothing of it, or has done it itself. It will be asked again.
                raise self._hang_up(connection)
            return answer
        except DmError as error:
            # Meanwhile: the successor may know better. Those who WAIT are tools, and want to be told.
            if (self._replaced() or self.stopping) and request.type is not MsgType.WAIT:
                raise self._hang_up(connection) from error
            raise

    def _replaced(self) -> bool:
        """Tell whether another coordinator has taken over: what we know may be wrong by now."""
        if self._parts.device.epoch == self.epoch:
            return False
        self._give_way()
        self.stopping = True
        return True

    @staticmethod
    def _hang_up(connection: Connection) -> Refused:
        """End a connection: hosts take a refusal for the last word, but then wait for the next coordinator."""
        connection.close()
        return Refused(Status.SHUTTING_DOWN, "the coordinator is shutting down")

    async def refuse(self, connection: Connection, request: Request) -> Any:
        """Serve a connection too many: its HELLO is refused, which ends it."""
        raise Refused(Status.DENIED, "the coordinator has as many connections as it takes")

    # ---------------------------------------------------------------- hosts and frames

    async def _hello(self, connection: Connection, ask: Hello) -> HelloReply:
        # The secret first, and in constant time: whoever lacks it learns nothing else.
        if not hmac.compare_digest(ask.secret, self._secret) or ask.fabric_id != self._fabric_id:
            raise Refused(Status.DENIED, "wrong secret, or another fabric's coordinator")
        return HelloReply(self.epoch)

    async def _register(self, connection: Connection, ask: Register) -> Registered:
        return await self._parts.hosts.register(connection, ask)

    async def _rejoin(self, connection: Connection, ask: Rejoin) -> Registered:
        return self._parts.hosts.rejoin(connection, ask)

    async def _guard(self, connection: Connection, ask: Rejoin) -> None:
        self._parts.hosts.guard(connection, ask)

    async def _grant(self, connection: Connection, ask: Grant) -> list[Run]:
        return await self._parts.supply.grant(connection, self._parts.hosts.of(connection), ask)

    async def _return(self, connection: Connection, runs: list[Run]) -> None:
        self._parts.supply.take_back(self._parts.hosts.of(connection), runs)

    async def _leave(self, connection: Connection, nothing: None) -> None:
        await self._parts.hosts.leave(connection)

    # ---------------------------------------------------------------- names

    async def _publish(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        name, endpoint = check_name(ask.get("name")), ask.get("endpoint")
        if (
            endpoint is None
            or len(json.dumps(endpoint, separators=(",", ":"))) > MAX_ENDPOINT_BYTES
        ):
            raise RemoteProtocolError(
                f"an endpoint is a JSON value of at most {MAX_ENDPOINT_BYTES} bytes"
            )
        host = await self._for_names(connection)
        self._parts.directory.publish(name, endpoint, host.account.host, host.account.incarnation)
        self._parts.changes.announce()
        return {}

    async def _for_names(self, connection: Connection) -> LiveHost:
        """Return whose connection it is, once names may be changed: see Hosts.names_settled."""
        while not self._parts.hosts.names_settled.is_set():
            if self.stopping or connection.gone.is_set():
                raise self._hang_up(connection)
            await self._parts.changes.next(connection, MAX_WAIT_SECONDS)
        return self._parts.hosts.of(connection)

    async def _withdraw(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        host = await self._for_names(connection)
        self._parts.directory.withdraw(check_name(ask.get("name")), host.account.host)
        return {}

    async def _lookup(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        return self._parts.directory.lookup(check_name(ask.get("name"))).as_json()

    async def _list(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        prefix = ask.get("prefix", "")
        if not isinstance(prefix, str):
            raise RemoteProtocolError("LIST: prefix is text")
        return {
            "services": [found.as_json() for found in self._parts.directory.with_prefix(prefix)]
        }

    async def _wait(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        seconds = ask.get("timeout", DEFAULT_WAIT_SECONDS)
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
            raise RemoteProtocolError(f"WAIT: timeout is 0 to {MAX_WAIT_SECONDS:.0f} seconds")
        come_true = self._condition(ask)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not come_true():
            if self.stopping:
                raise Refused(Status.SHUTTING_DOWN, "the coordinator is shutting down")
            remaining = deadline - loop.time()
            if remaining <= 0 or connection.gone.is_set():
                raise Refused(Status.NOT_FOUND, f"still waiting for {ask} after {seconds:g} s")
            await self._parts.changes.next(connection, remaining)
        return {}

    def _condition(self, ask: dict[str, Any]) -> Callable[[], bool]:
        """Return what a WAIT waits for."""
        hosts, name = ask.get("hosts"), ask.get("name")
        if type(hosts) is int and hosts >= 0 and name is None:
            wanted = hosts
            return lambda: self._parts.hosts.nr_active >= wanted
        if hosts is None:
            service = check_name(name)
            return lambda: service in self._parts.directory
        raise RemoteProtocolError("WAIT: either a number of hosts, or the name of a service")

    # ---------------------------------------------------------------- looking in from outside

    async def _list_hosts(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        return {"hosts": self._host_rows()}

    def _host_rows(self) -> list[dict[str, Any]]:
        rows = []
        for entry in self._parts.device.hosts():
            row = {key: value for key, value in entry.items() if key not in ("intent", "counters")}
            row["state"] = _STATES.get(entry["state"], "unknown")
            row["counters"] = {name: value for name, value in entry["counters"].items() if value}
            account = self._parts.ledger.hosts.get(entry["host"])
            if account is not None:
                row["grants"], row["returns"] = account.grants, account.returns
                row["granted"], row["returned"] = account.granted, account.returned
                row["watermarks"] = asdict(account.watermarks)
            rows.append(row)
        return rows

    async def _stats(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        ledger, hosts = self._parts.ledger, self._parts.hosts
        return {
            "fabric": self._fabric,
            "epoch": self.epoch,
            "uptime_s": asyncio.get_running_loop().time() - self._started,
            "recovery_s": self.recovery_s,
            "page_size": self._page_size,
            "pool": {
                "nr_frames": ledger.nr_frames,
                "free": ledger.pool.total,
                "extents": len(ledger.pool),
                "longest": ledger.pool.longest,
            },
            "totals": {**asdict(ledger.totals), "recalls": self._parts.supply.recalls},
            "requests": dict(self.requests),
            "max_hosts": ledger.max_hosts,
            "hosts": self._host_rows(),
            "nr_reclaims": hosts.nr_reclaims,
            "reclaims": [asdict(reclaim) for reclaim in hosts.reclaims],
            "scrubber": self._parts.scrubber.as_json(),
            "names": [service.as_json() for service in self._parts.directory.with_prefix()],
        }

    async def _check(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        seconds, repair = ask.get("timeout", 1.0), ask.get("repair", False)
        if type(seconds) not in (int, float) or not 0 <= seconds <= MAX_WAIT_SECONDS:
            raise RemoteProtocolError(f"CHECK: timeout is 0 to {MAX_WAIT_SECONDS:.0f} seconds")
        if type(repair) is not bool:
            raise RemoteProtocolError("CHECK: repair is true or false")
        return await self._parts.scrubber.check(repair=repair, seconds=seconds)

    async def _shutdown(self, connection: Connection, ask: dict[str, Any]) -> dict[str, Any]:
        self._stop()
        return {}

"""Services for the tests of the RPC layer, and what runs them in host processes.

    rpc.serve(0, Desk, "desk", threads=2)       # in the first host process
    desk = rpc.connect("desk", Desk)            # from the test's own process

Tests wait for what services note (Desk.notes), never for time to pass.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

import dmrpc_cxl
from dmrpc_cxl.rpc import Forwarder, current_call
from dmrpc_cxl.rpc.client import IDLE_SECONDS
from tests.fabrics import At, Fabric, HostProcess
from tests.standing import Standing, until


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Line(msgspec.Struct):
    begin: Point
    end: Point
    tags: dict[str, list[int]] = {}


class Typed:
    """Plain annotations."""

    def add(self, a: int, b: int = 10, c: int = 100) -> int:
        return a + b + c

    def middle(self, line: Line) -> Point:
        return Point((line.begin.x + line.end.x) / 2, (line.begin.y + line.end.y) / 2)

    def sort(self, table: dict[str, list[Point]]) -> dict[str, list[Point]]:
        return {key: sorted(row, key=lambda p: p.x) for key, row in table.items()}

    async def later(self, value: int) -> int:
        await asyncio.sleep(0)
        return value + 1

    def nothing(self) -> None:
        pass

    def wrong(self) -> int:
        return "no number"  # type: ignore[return-value]

    def loose(self, value):  # type: ignore[no-untyped-def]
        return value


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()  # cannot be pickled


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Desk:
    """Calls that take as long as a test wants, and a list of what became of them."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def _event(self, key: str) -> threading.Event:
        with self._lock:
            return self._events.setdefault(key, threading.Event())

    def pid(self) -> int:
        return os.getpid()

    def echo(self, value: Any) -> Any:
        return value

    def notes(self) -> list[str]:
        return list(self._notes)

    def open(self, key: str) -> None:
        self._event(key).set()

    def block(self, key: str) -> str:
        """Wait for open(key), deaf to cancellation."""
        self._notes.append(f"began {key}")
        assert self._event(key).wait(60)
        self._notes.append(f"ended {key}")
        return key

    def patient(self, key: str) -> None:
        """Wait until the call is cancelled."""
        call = current_call()
        assert call is not None
        self._notes.append(f"began {key}")
        try:
            while True:
                time.sleep(0.001)
                call.check()
        except BaseException as error:
            self._notes.append(f"{type(error).__name__} {key}")
            raise

    def spin(self, key: str) -> None:
        """Compute in Python until the call is cancelled."""
        call = current_call()
        assert call is not None
        self._notes.append(f"began {key}")
        while not call.cancelled:
            sum(range(100))
        self._notes.append(f"cancelled {key}")
        call.check()

    async def task(self, key: str) -> None:
        self._notes.append(f"began {key}")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self._notes.append(f"cancelled {key}")
            raise

    def note(self, text: str) -> None:
        self._notes.append(text)

    def time_left(self) -> float | None:
        call = current_call()
        assert call is not None
        return call.time_left

    def metadata(self) -> dict[str, str]:
        call = current_call()
        assert call is not None
        return call.metadata

    async def metadata_later(self) -> dict[str, str]:
        await asyncio.sleep(0)
        call = current_call()
        assert call is not None
        return call.metadata

    def double(self, array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return array * 2

    def array_after(self, key: str, n: int) -> np.ndarray:  # type: ignore[type-arg]
        self._notes.append(f"began {key}")
        assert self._event(key).wait(60)
        return np.ones(n, "u1")

    def raises(self, what: str) -> None:
        if what == "odd":
            raise OddError(1, 2)
        if what == "unspeakable":
            raise UnspeakableError
        if what == "surrogate":
            raise ValueError("file \udcff")
        if what == "huge":
            raise ValueError("x" * (8 << 20))
        if what == "exit":
            raise SystemExit(3)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "stop":
            raise StopIteration(5)
        if what == "unicode":
            b"\xff".decode()
        if what == "key":
            raise KeyError("absent")
        raise ValueError(what)

    async def raises_later(self, what: str) -> None:
        await asyncio.sleep(0)
        self.raises(what)

    def unsendable(self) -> object:
        return threading.Lock()

    def numbers(self, n: int) -> list[int]:
        return [1000] * n

    def big(self, n: int) -> bytes:
        return b"b" * n


class Relay:
    """Passes calls on to another service."""

    def __init__(self, host: dmrpc_cxl.Host, to: str, transport: str) -> None:
        self._host, self._to, self._transport = host, to, transport
        self._lock = threading.Lock()
        self._client: Any = None

    def _next(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._host.connect(self._to, transport=self._transport, timeout=None)
            return self._client

    def times_left(self) -> list[float | None]:
        call = current_call()
        assert call is not None
        mine = call.time_left
        rest = self._next().using(timeout=50).times_left()
        return [mine, *rest]

    def patient(self, key: str) -> None:
        self._next().patient(key)

    def patient_future(self, key: str) -> None:
        self._next().future.patient(key).result()

    async def patient_task(self, key: str) -> None:
        await self._next().aio.patient(key)

    def blocked(self, key: str) -> str:
        return str(self._next().block(key))

    def down(self, depth: int) -> int:
        """Recurse between services."""
        return 0 if depth == 0 else 1 + int(self._next().down(depth - 1))


class Bottom:
    def times_left(self) -> list[float | None]:
        call = current_call()
        assert call is not None
        return [call.time_left]


# ---------------------------------------------------------------- in host processes


def serve(at: At, cls: type, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if not hasattr(at, "servers"):
        at.servers = {}
    service = cls(at.host, *arguments) if cls is Relay else cls(*arguments)
    server = at.host.serve(service, name=name, **options)
    at.servers[name] = server
    return server.endpoint


def forward(at: At, name: str, backends: list[str], options: dict[str, Any]) -> None:
    if not hasattr(at, "servers"):
        at.servers = {}
    at.servers[name] = Forwarder(at.host, name, backends, **options)


def stop(at: At, name: str, drain: float = 10.0) -> float:
    begin = time.monotonic()
    server = at.servers.pop(name)
    if isinstance(server, Forwarder):
        server.stop()
    else:
        server.stop(drain)
    return time.monotonic() - begin


def stop_all(at: At) -> None:
    for name in list(getattr(at, "servers", ())):
        stop(at, name, 0.5)
    at.__dict__.pop("servers", None)


def ask(at: At, name: str, attribute: str) -> Any:
    value = getattr(at.servers[name], attribute)
    return dict(value) if isinstance(value, dict) else value


def descriptors_and_threads(pid: int | None = None) -> collections.Counter[str]:
    """Return what a process has open, and its Python threads (if it is this one), to compare with new_since.

    What earlier tests left to the garbage collector is collected first: it would go at a moment of its own.
    """
    gc.collect()
    where = f"/proc/{pid or 'self'}/fd"
    found: collections.Counter[str] = collections.Counter()
    for fd in os.listdir(where):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"{where}/{fd}")
            found["descriptor " + (link.split(":")[0] if ":[" in link else link)] += 1
    found.update(f"thread {thread.name}" for thread in threading.enumerate())
    return found


def new_since(before: collections.Counter[str]) -> list[str]:
    """Return what is open or runs now and was not before; what ended meanwhile is nobody's leak."""
    return sorted((descriptors_and_threads() - before).elements())


def until_nothing_is_new(before: collections.Counter[str], seconds: float = 20) -> None:
    """Wait until a test has left nothing behind; the failure says what."""
    with contextlib.suppress(AssertionError):
        until(lambda: not new_since(before), seconds)
    assert new_since(before) == []


# ---------------------------------------------------------------- the test's side


class Rpc:
    """A fabric with two host processes, and a host in the test's own process."""

    def __init__(self, fabric: Fabric, host: dmrpc_cxl.Host, hosts: list[HostProcess]) -> None:
        self.fabric = fabric
        self.host = host
        self.hosts = hosts
        self.ends: list[Any] = []

    def serve(self, where: int, cls: type, name: str, *arguments: Any, **options: Any) -> Any:
        """Run a service in host process `where`."""
        return self.hosts[where].call(serve, cls, name, arguments, options)

    def forward(self, where: int, name: str, backends: list[str], **options: Any) -> None:
        """Run a forwarder in host process `where`."""
        self.hosts[where].call(forward, name, backends, options)

    def connect(self, name: str, cls: type[Any] | None = None, **options: Any) -> Any:
        """Return a client in the test's process, closed when the test ends."""
        client = self.host.connect(name, cls, **options)
        self.ends.append(client)
        return client

    def extra_host(self) -> HostProcess:
        """Return one more host process; the test kills it, or it leaves when the test ends."""
        host = self.fabric.host()
        self.hosts.append(host)
        return host


@contextlib.contextmanager
def using_rpc(standing: Standing) -> Iterator[Rpc]:
    """Give an Rpc to a test that must leave nothing in use."""
    with standing.use() as (fabric, hosts):
        with dmrpc_cxl.attach(fabric.name) as host:
            rpc = Rpc(fabric, host, list(hosts))
            yield rpc
            for end in reversed(rpc.ends):
                end.close()
            for process in reversed(rpc.hosts):
                if not process.left:
                    process.call(stop_all)
            for process in rpc.hosts[len(hosts) :]:
                process.leave()
            fabric.hosts[:] = [process for process in fabric.hosts if not process.left]
        until(lambda: len(fabric.host_states()) == len(hosts))


def noted(desk: Any, text: str) -> None:
    """Wait until a Desk has noted a text."""
    until(lambda: text in desk.notes(), 20)


def grow_idle(client: Any) -> None:
    """Wait until a client will look at its connection before it sends the next call."""
    used = client._link.connection.used
    until(lambda: time.monotonic() - used > 2 * IDLE_SECONDS)


def _state(pid: int, task: str) -> str:
    with open(f"/proc/{pid}/task/{task}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def pause(pid: int) -> Callable[[], None]:
    """Stop a process; return what lets it go on."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: all(_state(pid, task) == "T" for task in os.listdir(f"/proc/{pid}/task")))
    return lambda: os.kill(pid, signal.SIGCONT)

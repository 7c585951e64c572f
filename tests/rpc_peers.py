"""Services in processes of their own, and peers that are written by hand.

- `Depot` is what host processes serve: it returns, keeps, refuses, waits. `serve(at, name)` starts one, `connect(at, name)`
  makes a client that a host process keeps under its name.
- `RawClient` is a client that says what it likes: it needs no DM, and runs in the process of the test.
"""

from __future__ import annotations

import array as arrays
import contextlib
import dataclasses
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmrpc_cxl._native import Ref, Ring
from dmrpc_cxl.fabric import device
from dmrpc_cxl.rpc import AnyRef, current_call, frames, move
from dmrpc_cxl.rpc.channel import Channel, RingChannel, TcpChannel
from dmrpc_cxl.rpc.frames import Frame, Hello, Kind
from tests.fabrics import At, Fabric
from tests.standing import until

PATIENCE = 20.0  # seconds until something counts as not coming
THRESHOLD = 16 << 10  # bytes from which things go by Ref, so that tests need not guess
LARGE = 64 << 10


@dataclasses.dataclass
class Slip:
    """A dataclass with a Ref in it, of either memory."""

    ref: AnyRef
    name: str = ""


@dataclasses.dataclass
class Parcel:
    """A dataclass with an array in it."""

    item: Any


class Depot:
    """A service that does with its arguments what tests want to see done."""

    def __init__(self, at: At) -> None:
        self._at = at
        self._kept: dict[str, Any] = {}
        self._entered = threading.Semaphore(0)
        self._go = threading.Event()
        self._generator: Iterator[Any] | None = None

    # ---- plain

    def echo(self, value: Any) -> Any:
        return value

    def two(self, one: Any, other: Any) -> Any:
        return [one, other]

    def nothing(self, value: Any) -> None:
        return None

    def kind(self, value: Any) -> str:
        return type(value).__name__

    def total(self, values: np.ndarray) -> float:
        return float(values.sum())

    def first(self, values: np.ndarray, n: int) -> Any:
        return values[:n]

    def store(self, values: np.ndarray, to: int) -> dict[str, int]:
        """Store to every byte, and tell what that cost."""
        before = self._at.host.stats()
        values.reshape(-1).view("u1")[:] = to
        after = self._at.host.stats()
        return {name: after[name] - before[name] for name in after}

    def fail(self, value: Any) -> None:
        raise KeyError("no")

    def fail_late(self, values: np.ndarray) -> None:
        self._kept["failed"] = float(values.sum())
        raise KeyError("no")

    def wait(self, value: Any) -> Any:
        """Wait until the test says go, or the caller gives up."""
        self._entered.release()
        call = current_call()
        give_up = time.monotonic() + PATIENCE
        while not self._go.wait(0.005) and time.monotonic() < give_up:
            if call is not None:
                call.check()
        return value

    def wait_whatever(self, value: Any) -> Any:
        """Wait until the test says go, whatever the caller does."""
        self._entered.release()
        self._go.wait(PATIENCE)
        return value

    def take(self, ref: Ref) -> int:
        return ref.nbytes

    def signed(self, slip: Slip) -> Slip:
        return Slip(slip.ref, f"{slip.name}, signed")

    def give(self, n: int) -> Ref:
        return self._at.host.create_ref(self._at.host.ralloc(n), move=True)

    def keep(self, name: str, value: Any) -> None:
        self._kept[name] = value

    def kept(self, name: str) -> Any:
        return self._kept[name]

    def drop(self) -> None:
        self._kept.clear()
        self._generator = None

    def pass_on(self, name: str, value: Any) -> Any:
        return getattr(self._at, name).echo(value)

    def pass_on_moved(self, name: str, value: np.ndarray) -> Any:
        return getattr(self._at, name).echo(move(value))

    def unsendable(self, n: int) -> Any:
        return [self._at.host.zeros(n, "u1"), object()]

    # ---- results: an array of n bytes, all 1, that somebody else can reach or nobody

    def _fresh(self, n: int) -> np.ndarray:
        made = self._at.host.empty(n, "u1")
        made[:] = 1
        return made

    def fresh(self, n: int) -> Any:
        return self._fresh(n)

    def fresh_nested(self, n: int) -> Any:
        return {"a": [self._fresh(n), (self._fresh(n),)]}

    def fresh_with_bytes(self, n: int) -> Any:
        return [self._fresh(n), b"x" * n]

    async def fresh_async(self, n: int) -> Any:
        return self._fresh(n)

    def held(self, how: str, n: int) -> Any:  # noqa: PLR0912, PLR0915 - one branch per way to hold it
        made = self._fresh(n)
        kept = self._kept
        if how == "attribute":
            kept["a"] = made
        elif how == "closure":
            kept["a"] = lambda: made
        elif how == "slice":
            kept["a"] = made[1:]
        elif how == "reshaped":
            kept["a"] = made.reshape(2, -1)
        elif how == "memoryview":
            kept["a"] = memoryview(made)
        elif how == "weakref":
            kept["a"] = weakref.ref(made)
        elif how == "list":
            kept["a"] = result = [made]
            return result
        elif how == "dict":
            kept["a"] = {"x": made}
            return kept["a"]
        elif how == "tuple":
            kept["a"] = (made,)
            return kept["a"]
        elif how == "deep":
            kept["a"] = [made]
            del made
            return {"x": (kept["a"],)}
        elif how == "subclass":
            kept["a"] = made.view(np.recarray)
        elif how == "subclass_result":
            kept["a"] = made
            return made.view(np.recarray)
        elif how == "generator":

            def generate() -> Iterator[Any]:
                mine = self._fresh(n)
                yield mine
                yield mine

            self._generator = generate()
            return next(self._generator)
        elif how == "thread":
            ready = threading.Event()
            kept["thread"] = True

            def hold(mine: Any) -> None:
                ready.set()
                self._go.wait(PATIENCE)
                kept["b"] = mine

            threading.Thread(target=hold, args=[made]).start()
            ready.wait()
        elif how == "buffer":
            kept["a"] = self._at.host.ralloc(n)
            made = kept["a"].numpy()
            made[:] = 1
        elif how == "buffer_view":
            kept["a"] = memoryview(self._at.host.ralloc(n))
            made = np.frombuffer(kept["a"], "u1")[:]
            made[:] = 1
        elif how == "base":
            kept["a"] = made.base
        elif how == "base_view":
            kept["a"] = getattr(made.base, "base")  # noqa: B009 - for the type checker
        elif how == "dataclass":
            kept["a"] = Parcel(made)
            return kept["a"]
        elif how == "dataclass_dict":
            parcel = Parcel(made)
            kept["a"] = vars(parcel)
            return parcel
        elif how == "in_dataclass":
            kept["a"] = [made]
            del made
            return Parcel(kept["a"])
        elif how == "dataclass_field":
            kept["a"] = made
            return Parcel(made)
        else:
            raise AssertionError(how)
        return made

    def fresh_parcel(self, n: int) -> Any:
        return Parcel(self._fresh(n))


HELD = [
    "attribute",
    "closure",
    "slice",
    "reshaped",
    "memoryview",
    "weakref",
    "list",
    "dict",
    "tuple",
    "deep",
    "subclass",
    "subclass_result",
    "generator",
    "thread",
    "buffer",
    "buffer_view",
    "base",
    "base_view",
    "dataclass",
    "dataclass_dict",
    "in_dataclass",
    "dataclass_field",
]


# ---------------------------------------------------------------- in host processes


def serve(at: At, name: str = "depot", **options: Any) -> None:
    """Serve a Depot; `at.depot` is the object, `at.server` the server."""
    at.host.threshold = THRESHOLD
    at.depot = Depot(at)
    at.server = at.host.serve(at.depot, name=name, **options)


def connect(at: At, name: str = "depot", transport: str = "auto", **options: Any) -> None:
    """Keep a client of a service under its name."""
    at.host.threshold = THRESHOLD
    setattr(at, name, at.host.connect(name, transport=transport, **options))


def entered(at: At, n: int = 1) -> None:
    """Wait until n calls are inside Depot.wait or wait_whatever."""
    for _ in range(n):
        assert at.depot._entered.acquire(timeout=PATIENCE)


def go(at: At) -> None:
    """Let calls that wait return, from now on."""
    at.depot._go.set()


def idle(at: At) -> None:
    """Wait until the server runs no call."""
    until(lambda: not at.server._busy(), PATIENCE)


def counts(at: At) -> dict[str, int]:
    return dict(at.server.counts)


def count_reaches(at: At, name: str, n: int = 1) -> None:
    until(lambda: at.server.counts[name] >= n, PATIENCE)


def nr_connections(at: At) -> int:
    return len(at.server._connections) + at.server._door.nr_handshakes


def connections_reach(at: At, n: int) -> None:
    until(lambda: nr_connections(at) == n, PATIENCE)


# ---------------------------------------------------------------- by hand


class RawClient:
    """A client that says what it likes."""

    def __init__(
        self, fabric: Fabric, name: str = "depot", kind: str = "ring", *, hello: bool = True
    ) -> None:
        self.kind = kind
        with fabric.client() as coordinator:
            self.endpoint = coordinator.lookup(name)["endpoint"]
        with device.open(fabric.name) as opened:
            self.superblock = opened.superblock
        self.name = name
        self.channel: Channel
        if kind == "ring":
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(b"\0" + self.endpoint["ring"].encode())
        else:
            self.socket = socket.create_connection(tuple(self.endpoint["tcp"]), PATIENCE)
        self.fds: list[int] = []
        if hello:
            self.socket.sendall(self.hello())
            self.shake()

    def hello(self, **changes: Any) -> bytes:
        """Return a HELLO, right but for the changes."""
        body = Hello(
            frames.MAGIC,
            frames.PROTOCOL,
            self.superblock["fabric_id"],
            self.superblock["secret"],
            self.name,
            self.kind,
        )
        for name, value in changes.items():
            setattr(body, name, value)
        return frames.head(Kind.HELLO, 0, body=frames.encode(body))

    def shake(self) -> Frame:
        """Read WELCOME; afterwards there is a channel."""
        data = b""
        descriptors: list[int] = []
        while len(data) < 4 or len(data) < int.from_bytes(data[:4], "little"):
            chunk, rights, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(64))
            if not chunk:
                raise ConnectionError("the server hung up")
            data += chunk
            for _, _, raw in rights:
                descriptors += arrays.array("i", raw)
        frame = frames.parse(data)
        if frame.kind == Kind.ERROR:
            raise PermissionError(frames.read_error(frame).message)
        self.welcome = frames.read_welcome(frame)
        if self.kind == "ring":
            self.fds = descriptors
            memory, mine, theirs = descriptors
            self.ring = Ring.attach(memory, mine, theirs, self.welcome.max_frame)
            self.channel = RingChannel(self.ring, self.socket, self.welcome.max_frame)
        else:
            self.channel = TcpChannel(self.socket, self.welcome.max_frame)
        return frame

    def method(self, name: str) -> int:
        return next(i for i, method in enumerate(self.welcome.methods) if method.name == name)

    def call(self, name: str, call_id: int, **parts: Any) -> bytes:
        """Return a CALL with the parts of frames.head."""
        return frames.head(Kind.CALL, call_id, method=self.method(name), **parts)

    def send(self, *parts: bytes) -> None:
        self.channel.send([part for part in parts if part], PATIENCE)

    def recv(self, timeout: float = PATIENCE) -> Frame:
        """Return the next frame; ConnectionError once the server has hung up."""
        give_up = time.monotonic() + timeout
        while (data := self.channel.recv()) is None:
            left = give_up - time.monotonic()
            assert left > 0, "the server says nothing"
            self.channel.wait(left)
        return frames.parse(data)

    def ends(self) -> list[Frame]:
        """Return what the server still says before it hangs up."""
        said: list[Frame] = []
        with contextlib.suppress(ConnectionError):
            while True:
                said.append(self.recv())
        return said

    def close(self) -> None:
        if hasattr(self, "channel"):
            self.channel.close()
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

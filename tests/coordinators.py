"""A coordinator process for tests, and processes that are hosts as far as it can tell.

Such a host speaks the protocol and changes frame words, but maps nothing: what the coordinator does can so be tested
without the DM layer. `Coordinated` is a device and its coordinator; what happens in the coordinator is waited for by
reading its log.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmrpc_cxl._native import Device
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.coordinator.ledger import Run
from dmrpc_cxl.coordinator.messages import Registered
from dmrpc_cxl.fabric import device as devices

SECONDS = 60.0
USERFAULTFD = "anon_inode:[userfaultfd]"
POOL = 0
_spawn = multiprocessing.get_context("spawn")
_numbers = itertools.count(1)


def frames_of(runs: list[Run]) -> list[int]:
    return [pfn for run in runs for pfn in range(run.pfn, run.end)]


class Raw:
    """What a function sent to a raw host works on; it keeps what it wants here."""

    def __init__(self, fabric: str) -> None:
        self.fabric = fabric
        self.device: Device = devices.open(fabric)
        self.client: Client
        self.registered: Registered
        self.kept: list[Any] = []

    def register(self, **options: Any) -> Registered:
        self.client = Client.of(self.device)
        self.registered = self.client.register("raw", **options)
        return self.registered

    def rejoin(self) -> Registered:
        self.client = Client.of(self.device)
        return self.client.rejoin(self.registered.host, self.registered.incarnation)

    def return_words(self, runs: list[Run]) -> None:
        """Make frames of ours the pool's, as a host does before it sends RETURN."""
        for run in runs:
            moved = self.device.transfer(*run, self.registered.host, POOL)
            assert moved == run.count


def register(raw: Raw, **options: Any) -> Registered:
    return raw.register(**options)


def rejoin(raw: Raw) -> Registered:
    return raw.rejoin()


def grant(raw: Raw, want: int, min_run: int = 0) -> list[Run]:
    return raw.client.grant(want, min_run)


def give_back(raw: Raw, runs: list[Run]) -> None:
    raw.return_words(runs)
    raw.client.give_back(runs)


def publish(raw: Raw, name: str, endpoint: Any) -> None:
    raw.client.publish(name, endpoint)


def leave(raw: Raw) -> None:
    raw.client.leave()


def _serve(connection: Any, fabric: str) -> None:
    raw = Raw(fabric)
    while True:
        try:
            function, args, options = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(raw, *args, **options), ""))
        except Exception as error:
            connection.send((False, error, traceback.format_exc()))


class RawHost:
    """A process that can be a host."""

    def __init__(self, fabric: str) -> None:
        self._connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve, args=(theirs, fabric), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._connection.send((function, args, options))

    def result(self) -> Any:
        assert self._connection.poll(SECONDS), f"process {self.pid} does not answer"
        fine, value, text = self._connection.recv()
        if fine:
            return value
        raise value from AssertionError(text)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run function(raw, *args) in the process and return its result, or raise what it raised."""
        self.start(function, *args, **options)
        return self.result()

    def kill(self) -> None:
        """End it with SIGKILL; whoever watches its pidfd sees a zombie until it is joined."""
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()


class CoordinatorProcess:
    """A coordinator that runs, or has said why it does not."""

    def __init__(self, *args: str) -> None:
        ready, write = os.pipe()
        command = [sys.executable, "-m", "dmrpc_cxl.coordinator", *args, "--ready-fd", str(write)]
        self.process = subprocess.Popen(
            command, pass_fds=[write], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        os.close(write)
        self._ready = os.fdopen(ready)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def log(self) -> str:
        with self._news:
            return "".join(self._lines)

    def wait_ready(self) -> str:
        """Return the line it wrote when it began to serve; empty when it ended instead."""
        with self._ready:
            return self._ready.read()  # to the end: then the coordinator has closed its descriptor

    def logged(self, pattern: str, times: int = 1) -> None:
        """Wait until the log has so many matches."""

        def came() -> bool:
            return len(re.findall(pattern, "".join(self._lines))) >= times

        with self._news:
            assert self._news.wait_for(came, SECONDS), f"no {pattern!r} in {self._lines}"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Return its exit status when it has ended."""
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        self._ready.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def open_files(self) -> list[str]:
        """Say what its descriptors are open on."""
        found = []
        folder = Path(f"/proc/{self.process.pid}/fd")
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
        return found

    def nr_guards(self) -> int:
        return self.open_files().count(USERFAULTFD)


class Coordinated:
    """A device and its coordinator."""

    def __init__(self, folder: Path, *args: str, **geometry: Any) -> None:
        self.name = f"dmrpc-test-{os.getpid()}-c{next(_numbers)}"
        self.socket = folder / "c.sock"
        self.args = args
        self.raw_hosts: list[RawHost] = []
        self.coordinators: list[CoordinatorProcess] = []
        geometry = {"size": 4 << 20, "max_hosts": 4, "preallocate": False, **geometry}
        devices.create(self.name, **geometry)
        self.device = devices.open(self.name)
        self.nr_frames: int = self.device.superblock["nr_frames"]

    @property
    def coordinator(self) -> CoordinatorProcess:
        return self.coordinators[-1]

    def launch(self, *more: str) -> CoordinatorProcess:
        """Start a coordinator, and do not wait for it."""
        args = (self.name, "--socket", str(self.socket), *self.args, *more)
        self.coordinators.append(CoordinatorProcess(*args))
        return self.coordinator

    def start(self, *more: str) -> str:
        """Start a coordinator and wait until it serves. Returns the line it wrote then."""
        line = self.launch(*more).wait_ready()
        assert line, self.coordinator.log
        return line

    def client(self, **options: Any) -> Client:
        return Client.of(self.device, **options)

    def host(self, **options: Any) -> RawHost:
        """Start a process and register it as a host."""
        host = self.process()
        host.call(register, **options)
        return host

    def process(self) -> RawHost:
        host = RawHost(self.name)
        self.raw_hosts.append(host)
        return host

    def host_died(self, times: int = 1) -> None:
        """Wait until the coordinator has taken back what so many dead hosts held."""
        self.coordinator.logged(r"died: \d+ frames", times)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Wait for something that nobody announces."""
        give_up = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < give_up, self.coordinator.log
            time.sleep(0.002)

    def stats(self) -> Any:
        with self.client() as client:
            return client.stats()

    def owners(self, runs: list[Run]) -> set[int]:
        return {self.device.frame(pfn)[1] for pfn in frames_of(runs)}

    def finish(self) -> None:
        """Let all hosts die, and check that everything came back and nothing stays behind."""
        for host in self.raw_hosts:
            host.close()
        if self.coordinator.process.poll() is None:
            self.wait_until(lambda: not self.device.hosts())
            self.wait_until(lambda: self.coordinator.nr_guards() == 0)
            pool = self.stats()["pool"]
            assert (pool["free"], pool["extents"]) == (self.nr_frames, 1)
            assert self.coordinator.stop() == 0
            assert not self.socket.exists()
            audit = self.device.audit()
            assert audit["nr_violations"] == 0, audit["violations"]
            assert audit["pool"] == audit["nr_frames"], audit
        for coordinator in self.coordinators:
            assert "Traceback" not in coordinator.log, coordinator.log

    def remove(self) -> None:
        for host in self.raw_hosts:
            with contextlib.suppress(OSError):
                host.close()
        for coordinator in self.coordinators:
            if coordinator.process.poll() is None:
                coordinator.kill()
            else:
                coordinator.process.wait()
        self.device.close()
        devices.remove(self.name, force=True)


@contextlib.contextmanager
def coordinated(
    folder: Path, *args: str, serve: bool = True, **geometry: Any
) -> Iterator[Coordinated]:
    """Give a device with a coordinator that serves it; check them at the end, unless the test failed."""
    fabric = Coordinated(folder, *args, **geometry)
    try:
        if serve:
            fabric.start()
        yield fabric
        if fabric.coordinators:
            fabric.finish()
    finally:
        fabric.remove()

"""A host process that does what it is told: benchmarks measure between real processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.fabric import device

_spawn = multiprocessing.get_context("spawn")


def _serve(connection: Connection, fabric: str, options: dict[str, Any]) -> None:
    host = dmrpc_cxl.attach(fabric, **options)
    connection.send(None)
    while (work := connection.recv()) is not None:
        function, args = work
        connection.send(function(host, *args))
    host.detach()
    connection.send(None)


class Peer:
    """A host in a process of its own; call() runs a module-level function(host, *args) there."""

    def __init__(self, fabric: str, **options: Any) -> None:
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(theirs, fabric, options), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(host, *args) in the peer."""
        self.begin(function, *args)
        return self.result()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the peer begin with function(host, *args)."""
        self._connection.send((function, args))

    def result(self) -> Any:
        """Wait for what was begun."""
        return self._connection.recv()

    def leave(self) -> None:
        """Detach and end."""
        self._connection.send(None)
        self._connection.recv()
        self._process.join()


@contextmanager
def fabric(size: int, **geometry: Any) -> Iterator[str]:
    """Run a device and a coordinator of this run's own; remove them at the end."""
    with running_fabric(size, **geometry) as (name, _):
        yield name


@contextmanager
def running_fabric(size: int, **geometry: Any) -> Iterator[tuple[str, int]]:
    """Run a fabric; give its name and the coordinator's process id."""
    name = f"dmrpc-bench-{os.getpid()}"
    device.create(name, size=size, overwrite=True, **geometry)
    ready, write = os.pipe()
    coordinator = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dmrpc_cxl.coordinator",
            name,
            "--ready-fd",
            str(write),
            "--log-level",
            "warning",
        ],
        pass_fds=[write],
    )
    os.close(write)
    try:
        with os.fdopen(ready, "rb") as pipe:
            if not pipe.readline():
                raise RuntimeError("the coordinator did not start; its message is above")
        yield name, coordinator.pid
    finally:
        coordinator.terminate()
        coordinator.wait()
        device.remove(name, force=True)

"""A host process that does what it is told: benchmarks measure between real processes."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.fabric import device

# Forks of one clean process, which has imported what all of them need. So their code lies at the same addresses: a CPU
# that they share predicts the branches of one by what another has taken. docs/decisions/0015.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["numpy", "dmrpc_cxl.rpc", "dmrpc_net.memory", "benchmarks.rpc_stage"]
)


def _serve(connection: Connection, fabric: str | None, options: dict[str, Any]) -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        host = dmrpc_cxl.attach(fabric, **options) if fabric is not None else None
    except Exception:
        connection.send((False, traceback.format_exc()))
        return
    connection.send((True, None))
    while True:
        try:
            work = connection.recv()
        except EOFError:  # whoever told us what to do is gone
            break
        if work is None:
            break
        function, args = work
        try:
            answer: tuple[bool, Any] = (True, function(host, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)
        del (
            function,
            args,
            work,
            answer,
        )  # or what they hold would live until the next piece of work
    if host is not None:
        host.detach()
    with contextlib.suppress(BrokenPipeError):
        connection.send((True, None))


class PeerFailed(Exception):
    """What a peer was told to do failed there; the text is its traceback."""


class Peer:
    """A process; call() runs a module-level function(host, *args) there.

    Args:
        fabric: what its host is attached to; None: it has none, and functions are given None.
        options: of attach().
    """

    def __init__(self, fabric: str | None, **options: Any) -> None:
        self._connection, theirs = _forks.Pipe()
        self._process = _forks.Process(target=_serve, args=(theirs, fabric, options), daemon=True)
        self._process.start()
        theirs.close()
        self.result()

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

    def result(self, timeout: float | None = None) -> Any:
        """Wait for what was begun; raise PeerFailed if it failed, or when nothing has come in time."""
        if timeout is not None and not self._connection.poll(timeout):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR2)  # it prints the stack of every thread
            raise PeerFailed(f"process {self.pid} did not answer in {timeout} s")
        try:
            fine, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise PeerFailed(f"process {self.pid} ended with {self._process.exitcode}") from None
        if not fine:
            raise PeerFailed(value)
        return value

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()

    def leave(self) -> None:
        """Detach and end."""
        self._connection.send(None)
        self.result(60)
        self._process.join()


@contextmanager
def fabric(size: int, **geometry: Any) -> Iterator[str]:
    """Run a device and a coordinator of this run's own; remove them at the end."""
    with running_fabric(size, **geometry) as (name, _):
        yield name


@contextmanager
def running_fabric(size: int, suffix: str = "", **geometry: Any) -> Iterator[tuple[str, int]]:
    """Run a fabric; give its name, which ends in a suffix if there is another one, and the coordinator's process id."""
    name = f"dmrpc-bench-{os.getpid()}{suffix}"
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

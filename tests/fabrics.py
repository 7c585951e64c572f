"""A fabric for tests: a real device, a real coordinator process, real host processes.

Hosts live in processes of their own, so that a store that hangs hangs only its host, whose watchdog (which needs
no GIL) then ends it with every thread's stack. A test sends functions to hosts::

    def fill(at: At, value: int) -> bytes:      # a module-level function; `at` is the host process's side
        at.buffer = at.host.ralloc(4096)
        at.buffer.numpy()[:] = value
        return at.host.create_ref(at.buffer).to_bytes()

    def test_something(fabric: Fabric) -> None:
        creator, mapper = fabric.host(), fabric.host()
        wire = creator.call(fill, 7)

When the test ends every host leaves, and the device is audited: every frame in the pool, no Ref alive, no violation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.fabric import device

WATCHDOG_SECONDS = 120
# Forks of one process that has imported what all of them need: a host is there in 20 ms, not in 300.
_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload(["tests.crash.everything"])
_numbers = itertools.count(1)


class At:
    """What a function sent to a host process works on: `host`, and whatever it wants to keep."""

    host: dmrpc_cxl.Host

    def __getattr__(self, name: str) -> Any:  # kept attributes, for type checkers
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class RemoteFailure(AssertionError):
    """A function failed in a host process; the text is its traceback there."""


class SameStderr:
    """Says nothing; a process that is started with it writes to the stderr that its starter has by then, not the nursery's."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_stderr, (reduction.DupFd(2),)


def _take_stderr(theirs: Any) -> None:
    fd = theirs.detach()
    os.dup2(fd, 2)
    os.close(fd)


def _begin(connection: Any, fabric: str, options: dict[str, Any], stderr: None) -> None:
    _serve(connection, fabric, options)


def _serve(connection: Any, fabric: str, options: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at = At()
    try:
        at.host = dmrpc_cxl.attach(fabric, **options)
    except BaseException as error:
        connection.send((False, error, traceback.format_exc()))
        return
    connection.send((True, at.host.id, None))
    while True:
        # Each piece of work has its own time: a host may stand idle between tests for longer.
        faulthandler.cancel_dump_traceback_later()
        try:
            work = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
        if work is None:
            break
        function, args, kwargs = work
        try:
            answer: tuple[bool, Any, Any] = (True, function(at, *args, **kwargs), None)
        except BaseException as error:
            answer = (False, error, traceback.format_exc())
            del error
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send((False, RemoteFailure(repr(error)), traceback.format_exc()))
        del answer, function, args, kwargs, work
    try:
        host = at.host
        at.__dict__.clear()
        host.detach()
        connection.send((True, None, None))
    except BaseException as error:
        connection.send((False, error, traceback.format_exc()))


class HostProcess:
    """A host in a process of its own."""

    def __init__(self, fabric: str, options: dict[str, Any], *, executed: bool = False) -> None:
        how: Any = multiprocessing.get_context("spawn") if executed else _nursery
        self.connection, theirs = how.Pipe()
        self.process = how.Process(
            target=_begin, args=(theirs, fabric, options, SameStderr()), daemon=True
        )
        self.process.start()
        theirs.close()
        self.left = False
        try:
            self.id: int = self.result()
        except BaseException:
            self.process.join(10)
            self.connection.close()
            raise

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Begin a call; result() waits for it."""
        self.connection.send((function, args, kwargs))

    def result(self, timeout: float = WATCHDOG_SECONDS + 10) -> Any:
        """Return what the call returned; raise what it raised."""
        if not self.connection.poll(timeout):
            raise RemoteFailure(f"host process {self.pid} did not answer in {timeout} s")
        try:
            fine, value, text = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise RemoteFailure(
                f"host process {self.pid} ended with {self.process.exitcode}"
            ) from None
        if fine:
            return value
        value.__cause__ = RemoteFailure(text)
        raise value

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run function(at, *args, **kwargs) in the host process and return its result."""
        self.start(function, *args, **kwargs)
        return self.result()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.left = True

    def expect_death(self, timeout: float = 60) -> int:
        """Wait until the process ends by itself; return its exit code (negative: signal)."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"host process {self.pid} is still alive after {timeout} s"
        self.connection.close()
        self.left = True
        return code

    def leave(self) -> None:
        """Detach in order and end the process."""
        if self.left:
            return
        self.left = True
        try:
            self.connection.send(None)
            self.result(60)
        finally:
            self.process.join(10)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.connection.close()


class Fabric:
    """A device and its coordinator, for one test."""

    def __init__(self, *, coordinator: tuple[str, ...] = (), **geometry: Any) -> None:
        geometry.setdefault("size", 32 << 20)
        self.name = f"dmrpc-test-{os.getpid()}-{next(_numbers)}"
        self.hosts: list[HostProcess] = []
        self.coordinator_args = coordinator
        self.log = ""
        device.create(self.name, **geometry)
        try:
            self.start_coordinator()
        except BaseException:
            device.remove(self.name, force=True)
            raise

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it serves."""
        ready, write = os.pipe()
        self.coordinator = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dmrpc_cxl.coordinator",
                self.name,
                "--ready-fd",
                str(write),
                *self.coordinator_args,
            ],
            pass_fds=[write],
        )
        os.close(write)
        with os.fdopen(ready, "rb") as pipe:
            line = pipe.readline()
        if not line:
            raise RuntimeError(f"the coordinator ended with {self.coordinator.wait(30)}")

    def host(self, *, executed: bool = False, **options: Any) -> HostProcess:
        """Start a host process; options are attach()'s. executed: with this process's environment, and memory of its own alone."""
        host = HostProcess(self.name, options, executed=executed)
        self.hosts.append(host)
        return host

    def client(self, **options: Any) -> Client:
        """Return a connection to the coordinator."""
        return Client.to(self.name, **options)

    def audit(self) -> dict[str, Any]:
        """Return the exact accounting of every frame now."""
        with device.open(self.name) as opened:
            return dict(opened.audit())

    def wait_until(
        self, what: Callable[[dict[str, Any]], bool], seconds: float = 30
    ) -> dict[str, Any]:
        """Return the first audit that satisfies `what`; for what the coordinator does by itself."""
        give_up = time.monotonic() + seconds
        while True:
            audit = self.audit()
            if what(audit):
                return audit
            assert time.monotonic() < give_up, f"did not come true in {seconds} s: {audit}"
            time.sleep(0.005)

    def assert_sound(self) -> dict[str, Any]:
        """Assert conservation and exact counts, while no operation is in flight."""
        audit = self.audit()
        assert audit["nr_violations"] == 0, audit["violations"]
        return audit

    def assert_all_free(self) -> None:
        """Assert that every frame is back in the pool and no Ref is alive."""
        self.wait_until(lambda _: not any(h["state"] for h in self.host_states()))
        audit = self.assert_sound()  # a new one: the one above was made before the states were read
        assert audit["live_refs"] == 0, audit
        assert audit["pool"] == audit["nr_frames"], audit

    def host_states(self) -> list[dict[str, Any]]:
        """Return the device's host table."""
        with device.open(self.name) as opened:
            return list(opened.hosts())

    def stop_coordinator(self) -> int:
        """SIGTERM, and wait."""
        self.coordinator.terminate()
        return self.coordinator.wait(30)

    def close(self, *, check: bool = True) -> None:
        """Let every host leave, check that nothing was lost, stop the coordinator, remove the device."""
        try:
            failures = []
            for host in self.hosts:
                try:
                    host.leave()
                except BaseException as error:
                    failures.append(error)
            if check and failures:
                raise failures[0]
            if check:
                self.assert_all_free()
                assert self.stop_coordinator() == 0
        finally:
            for host in self.hosts:
                if host.process.is_alive():
                    host.process.kill()
                    host.process.join()
            if self.coordinator.poll() is None:
                self.coordinator.kill()
                self.coordinator.wait()
            with contextlib.suppress(FileNotFoundError):
                device.remove(self.name, force=True)


@contextlib.contextmanager
def running(**geometry: Any) -> Iterator[Fabric]:
    """Run a fabric that is audited and removed at the end; after a failure it is only removed."""
    fabric = Fabric(**geometry)
    try:
        yield fabric
    except BaseException:
        fabric.close(check=False)
        raise
    fabric.close()

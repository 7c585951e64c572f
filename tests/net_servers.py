"""Memory servers for tests: real processes, real sockets, and processes that are clients.

`Servers` starts one or more servers with one secret. When a test is over, every client that the test made in its own process is
closed, and each server is audited by a client of its own: every page free, no Ref, no range, no violation, nobody
else connected. `ClientProcess` is a client in a process of its own, that does what it is told and can be killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dmrpc_net
from tests.standing import until

WATCHDOG_SECONDS = 120
_spawn = multiprocessing.get_context("spawn")
_numbers = itertools.count(1)


class ServerProcess:
    """One memory server."""

    def __init__(self, secret: Path, number: int, where: str, options: tuple[str, ...]) -> None:
        self.secret, self.number, self.where, self.options = secret, number, where, options
        self.log = ""
        self.start()

    def start(self) -> None:
        """Start it, where it was before if it has run before; wait until it serves."""
        ready, write = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "dmrpc_net.server",
                "--secret", str(self.secret), "--number", str(self.number),
                "--listen", self.where, "--ready-fd", str(write), *self.options,
            ],
            pass_fds=[write],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        os.close(write)
        with os.fdopen(ready) as pipe:
            line = pipe.readline().split()
        if not line:
            self.process.wait()
            raise AssertionError(f"the server did not start: {self.stderr()}")
        self.where = line[2]

    def stderr(self) -> str:
        """Return what it has said, once it has ended."""
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self.log += self.process.stderr.read()
            self.process.stderr.close()
        return self.log

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Have every thread of it stand still during a block."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        until(lambda: all(b") T " in (one / "stat").read_bytes() for one in tasks.iterdir()))
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.stderr()

    def stop(self) -> None:
        """Stop it in order."""
        self.process.terminate()
        assert self.process.wait(60) == 0, self.stderr()
        self.stderr()


class Servers:
    """Memory servers of one secret, and the clients of this process."""

    def __init__(self, *options: str, count: int = 1, size: str = "32M", shards: int = 2) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dmrpc-net-test-")
        self.secret = Path(self._folder.name) / "secret"
        self.clients: list[dmrpc_net.Client] = []
        self.processes: list[ClientProcess] = []
        self.servers: list[ServerProcess] = []
        with self._cleaned_up_on_failure():
            for number in range(count):
                self.servers.append(
                    ServerProcess(
                        self.secret,
                        number,
                        "127.0.0.1:0",
                        ("--size", size, "--shards", str(shards), *options),
                    )
                )

    @contextlib.contextmanager
    def _cleaned_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.end()
            raise

    @property
    def addresses(self) -> list[str]:
        return [server.where for server in self.servers]

    def client(self, **options: Any) -> dmrpc_net.Client:
        """Attach; closed when the test is over."""
        options.setdefault("deadline", 60.0)
        client = dmrpc_net.attach(self.addresses, secret=self.secret, **options)
        self.clients.append(client)
        return client

    def process(self, **options: Any) -> ClientProcess:
        """Start a client in a process of its own."""
        options.setdefault("deadline", 60.0)
        process = ClientProcess(self.addresses, str(self.secret), options)
        self.processes.append(process)
        return process

    def assert_all_free(self) -> None:
        """Wait until everybody's departure is done, then account for every page."""
        for process in self.processes:
            process.leave()
        for client in self.clients:
            client.close()
        self.clients.clear()
        with dmrpc_net.attach(self.addresses, secret=self.secret, deadline=60) as auditor:
            until(
                lambda: (
                    auditor.audit()["nr_processes"]
                    == sum(map(auditor.nr_shards, range(len(self.servers))))
                )
            )
            found = auditor.audit()
            assert not found["nr_violations"], found
            assert found["nr_free"] == found["nr_pages"], found
            assert found["nr_refs"] == found["nr_ranges"] == 0, found

    def end(self) -> None:
        """End everything, whatever it is doing."""
        for process in self.processes:
            process.kill()
        for client in self.clients:
            with contextlib.suppress(Exception):
                client.close()
        for server in self.servers:
            if server.process.poll() is None:
                server.kill()
        self._folder.cleanup()

    def close(self) -> None:
        """Audit, and stop in order."""
        with self._cleaned_up_on_failure():
            self.assert_all_free()
            for server in self.servers:
                server.stop()
        self._folder.cleanup()


@contextlib.contextmanager
def serving(*options: str, **settings: Any) -> Iterator[Servers]:
    """Give servers to a test; audited at its end."""
    servers = Servers(*options, **settings)
    try:
        yield servers
    except BaseException:
        servers.end()
        raise
    servers.close()


class StandingServers:
    """Servers that several tests use, one after the other; thrown away after a failure."""

    def __init__(self, *options: str, **settings: Any) -> None:
        self._options, self._settings = options, settings
        self._servers: Servers | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[Servers]:
        """Give the servers to a test that must leave nothing in use."""
        if self._servers is None:
            self._servers = Servers(*self._options, **self._settings)
        servers = self._servers
        try:
            yield servers
            servers.assert_all_free()
        except BaseException:
            self._servers = None
            servers.end()
            raise

    def close(self) -> None:
        """Audit and stop them, if they were started."""
        if self._servers is not None:
            servers, self._servers = self._servers, None
            servers.close()


# ---------------------------------------------------------------- clients in processes of their own


class There:
    """What a function sent to a client process works on: `client`, and whatever it keeps."""

    client: dmrpc_net.Client

    def __getattr__(self, name: str) -> Any:  # kept attributes, for type checkers
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _serve(connection: Any, addresses: list[str], secret: str, options: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    there = There()
    there.client = dmrpc_net.attach(addresses, secret=secret, **options)
    connection.send((True, there.client.pid, None))
    while True:
        faulthandler.cancel_dump_traceback_later()
        try:
            work = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
        if work is None:
            break
        function, args = work
        try:
            answer: tuple[bool, Any, Any] = (True, function(there, *args), None)
        except BaseException as error:
            answer = (False, error, traceback.format_exc())
            del error
        try:
            connection.send(answer)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send((False, AssertionError(repr(error)), traceback.format_exc()))
        del answer, function, args, work
    there.client.close()
    connection.send((True, None, None))


class ClientProcess:
    """A client in a process of its own."""

    def __init__(self, addresses: list[str], secret: str, options: dict[str, Any]) -> None:
        self.connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(
            target=_serve, args=(theirs, addresses, secret, options), daemon=True
        )
        self.process.start()
        theirs.close()
        self.gone = False
        self.pid: int = self.result()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call; result() waits for it."""
        self.connection.send((function, args))

    def result(self) -> Any:
        """Return what the call returned; raise what it raised."""
        assert self.connection.poll(WATCHDOG_SECONDS + 10), "the client process does not answer"
        fine, value, text = self.connection.recv()
        if fine:
            return value
        value.__cause__ = AssertionError(text)
        raise value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run function(there, *args) in the process and return its result."""
        self.start(function, *args)
        return self.result()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if not self.gone:
            self.gone = True
            self.process.kill()
            self.process.join()
            self.connection.close()

    def leave(self) -> None:
        """Close the client in order and end the process."""
        if self.gone:
            return
        self.gone = True
        self.connection.send(None)
        self.result()
        self.process.join(60)
        self.connection.close()

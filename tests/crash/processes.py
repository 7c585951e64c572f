"""Hosts, coordinators and tools that start quickly and die where they are told to.

All are forked by one process, the nursery (multiprocessing's fork server), that has imported what they need and has attached
to nothing: a host is there in 20 ms, a coordinator in 30. What they say goes to a file, printed when a test fails.

A process is told its crash point by the environment, as any program can be (DM_CRASH_POINT), or later: `arm` and
`disarm` are sent to hosts, a coordinator has a thread here that hears of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

from dmrpc_cxl._native import CRASH_RECORD_BYTES, crash_at, crash_record, crash_stop_at
from dmrpc_cxl.coordinator.__main__ import main as serve_fabric
from dmrpc_cxl.fabric import fsck
from tests.fabrics import At, Fabric, HostProcess, _serve
from tests.standing import until

SECONDS = 60.0
_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload(["tests.crash.everything"])


class Record:
    """A file that counts which labels a process has passed, and where it died."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "record")
        self.clear()

    def clear(self) -> None:
        """Count from 0: a new file, whatever processes of before still do."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        Path(self.path).write_bytes(bytes(CRASH_RECORD_BYTES))

    def passes(self) -> dict[str, int]:
        return crash_record(Path(self.path).read_bytes())[0]

    def deaths(self) -> dict[str, int]:
        return crash_record(Path(self.path).read_bytes())[1]

    def environment(self, label: str, n: int) -> dict[str, str]:
        """Return what makes a process die at a label from its start on; label "none": what makes it count."""
        return {"DM_CRASH_POINT": f"{label}:{n}", "DM_CRASH_RECORD": self.path}


def arm(at: At, label: str, n: int, record: str | None = None) -> None:
    """Make this process die at the n-th pass from now on; "none": count."""
    crash_at(label, n, record)


def stop_at(at: At, label: str, n: int = 1) -> None:
    """Make this process, which is armed, stop itself at the n-th pass from now on."""
    crash_stop_at(label, n)


def wait_until_stopped(pid: int) -> None:
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def disarm(at: At) -> None:
    """Neither die nor count."""
    crash_at("none")


def _speak_into(log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


# ---------------------------------------------------------------- hosts


def _be_host(
    connection: Any, fabric: str, options: dict[str, Any], log: str, environment: dict[str, str]
) -> None:
    _speak_into(log)
    os.environ.update(environment)
    _serve(connection, fabric, options)


class Host(HostProcess):
    """A host that was forked by the nursery."""

    def __init__(
        self,
        fabric: str,
        options: dict[str, Any],
        log: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.connection, theirs = _nursery.Pipe()
        self.process = _nursery.Process(  # type: ignore[assignment]
            target=_be_host, args=(theirs, fabric, options, log, environment or {}), daemon=True
        )
        self.process.start()
        theirs.close()
        self.left = False

    def attached(self) -> Host:
        """Wait until it has attached."""
        try:
            self.id: int = self.result(SECONDS)
        except BaseException:
            self.process.join(10)
            self.connection.close()
            self.left = True
            raise
        return self


# ---------------------------------------------------------------- coordinators


def _be_coordinator(
    ready: Any, orders: Any, args: list[str], log: str, environment: dict[str, str]
) -> None:
    _speak_into(log)
    os.environ.update(environment)
    threading.Thread(target=_obey, args=(orders,), daemon=True).start()
    fd = os.dup(ready.fileno())
    ready.close()
    serve_fabric(args=[*args, "--ready-fd", str(fd)], prog_name="dmrpc coordinator")


def _obey(orders: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            order, *where = orders.recv()
            order(*where)
            orders.send(None)


class Coordinator:
    """A coordinator; what `Fabric` wants of a subprocess.Popen."""

    def __init__(self, args: list[str], log: str, environment: dict[str, str]) -> None:
        self._ready, theirs = _nursery.Pipe(duplex=False)
        self._orders, orders = _nursery.Pipe()
        self.process = _nursery.Process(
            target=_be_coordinator, args=(theirs, orders, args, log, environment), daemon=True
        )
        self.process.start()
        theirs.close()
        orders.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def serves(self) -> bool:
        """Wait until it serves; False: it ended before."""
        text = b""
        while not text.endswith(b"\n"):
            assert self._ready.poll(SECONDS), "the coordinator neither serves nor ends"
            chunk = os.read(self._ready.fileno(), 4096)
            if not chunk:
                return False
            text += chunk
        return True

    def arm(self, label: str, n: int = 1, record: str | None = None) -> None:
        """Make it die at the n-th pass from now on; "none": count."""
        self._order(crash_at, label, n, record)

    def stop_at(self, label: str, n: int = 1) -> None:
        """Make it, which is armed, stop itself at the n-th pass from now on."""
        self._order(crash_stop_at, label, n)

    def _order(self, *order: Any) -> None:
        self._orders.send(order)
        assert self._orders.poll(SECONDS)
        self._orders.recv()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(SECONDS if timeout is None else timeout)
        code = self.process.exitcode
        assert code is not None, f"coordinator {self.pid} does not end"
        return code

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


# ---------------------------------------------------------------- a tool


def _repair(log: str, fabric: str, environment: dict[str, str]) -> None:
    _speak_into(log)
    os.environ.update(environment)
    found = fsck.check(fabric, repair=True)
    assert found.status in (fsck.CLEAN, fsck.REPAIRED), found


def repair(fabric: str, log: str, environment: dict[str, str] | None = None) -> int:
    """Run `dmrpc fsck --repair`; return how it ended."""
    process = _nursery.Process(target=_repair, args=(log, fabric, environment or {}), daemon=True)
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, "fsck does not end"
    return process.exitcode


# ---------------------------------------------------------------- a fabric of these


class NurseryFabric(Fabric):
    """A fabric whose processes come from the nursery."""

    coordinator: Coordinator  # type: ignore[assignment]

    def __init__(self, folder: Path, **options: Any) -> None:
        self.record = Record(folder)
        self.log_path = str(folder / "log")
        super().__init__(**options)

    def launch(self, *more: str, environment: dict[str, str] | None = None) -> Coordinator:
        """Start a coordinator, and do not wait for it."""
        self.coordinator = Coordinator(
            [self.name, *self.coordinator_args, *more], self.log_path, environment or {}
        )
        return self.coordinator

    def start_coordinator(self) -> None:
        assert self.launch().serves(), self.said()

    def host(self, **options: Any) -> Host:
        host = self.coming_host(**options)
        return host.attached()

    def coming_host(self, environment: dict[str, str] | None = None, **options: Any) -> Host:
        """Start a host, and do not wait until it has attached."""
        host = Host(self.name, options, self.log_path, environment)
        self.hosts.append(host)
        return host

    def said(self) -> str:
        """Return what all processes have said."""
        with contextlib.suppress(FileNotFoundError):
            return Path(self.log_path).read_text(errors="replace")
        return ""

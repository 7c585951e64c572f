"""A second process for the tests of pyuserfaultfd, and the watch over what they leave behind.

A fault must be served by another process than the one that takes it: a Python thread that faults
keeps the GIL. So the memory belongs to a child, which sends its userfaultfd over a socket; the test
holds the other end and serves. A test that only touches memory of its own runs as a whole in a
child (``isolated``).

Nothing here waits without end: a child is under a watchdog that needs no GIL, and the test waits
for events and messages with a timeout that is there to fail, not to pass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import mmap
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyuserfaultfd import (
    Event,
    Feature,
    PageFault,
    PermissionDenied,
    UserFaultFD,
    address_of,
    supported_features,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
LIMIT = 60.0
"""Seconds after which a test has failed; none comes near it. A child's watchdog is quicker."""

BOOT = """\
import faulthandler, sys
faulthandler.enable()
faulthandler.dump_traceback_later({limit}, exit=True)
from {this} import run_child
run_child({fd})
"""


class Link:
    """One end of a socket for messages of JSON, with descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(LIMIT)

    def send(self, value: Any = None, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.sock, [json.dumps(value).encode()], fds)

    def receive(self) -> tuple[Any, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 4)
        if not data:
            raise EOFError("the other process has ended")
        return json.loads(data), fds

    def share(self, uffd: UserFaultFD, memory: mmap.mmap) -> None:
        """In the child: give the test its userfaultfd, and wait until the test says go."""
        self.send(list(address_of(memory)), (uffd.fileno(),))
        uffd.close()
        self.receive()


class Child:
    """A process that runs ``function(link, *arguments)``, a function at the top of a test module.

    On a clean end of the ``with`` block the function must have returned, or be about to.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, status: int = 0) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link = Link(mine)
        self.status = status
        self.errors = tempfile.TemporaryFile()
        code = BOOT.format(limit=0.75 * LIMIT, this=__name__, fd=its.fileno())
        with its:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error::ResourceWarning", "-c", code],
                pass_fds=[its.fileno()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
            )
        self.link.send([function.__module__, function.__qualname__, arguments])

    def take_uffd(self) -> tuple[UserFaultFD, int]:
        """Receive what the child shares: its userfaultfd and the address of its memory."""
        (address, _), (fd,) = self.receive()
        return UserFaultFD.from_fd(fd), address

    def receive(self) -> tuple[Any, list[int]]:
        try:
            return self.link.receive()
        except (EOFError, OSError) as error:
            self.process.wait(LIMIT)
            pytest.fail(f"{error!r}; the child wrote:\n{self.output()}")

    def output(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.link.sock.shutdown(socket.SHUT_WR)
                status = self.process.wait(LIMIT)
                assert status == self.status, f"child ended with {status}:\n{self.output()}"
        finally:
            self.process.kill()
            self.process.wait()
            self.link.sock.close()
            self.errors.close()


def run_child(fd: int) -> None:
    """In the child: do what the test asks for."""
    with socket.socket(fileno=fd) as sock:
        link = Link(sock)
        (module, name, arguments), _ = link.receive()
        function = getattr(importlib.import_module(module), name)
        if hasattr(function, "__wrapped__"):
            try:
                function.__wrapped__(*arguments)
            except pytest.skip.Exception as skipped:
                link.send(str(skipped.msg))
        else:
            function(link, *arguments)


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own, under the watchdog; its arguments must fit into JSON."""

    @functools.wraps(test)
    def wrapper(**arguments: Any) -> None:
        with Child(test, *arguments.values()) as child:
            try:
                reason, _ = child.link.receive()
            except EOFError:
                return  # its end is judged by __exit__
        pytest.skip(reason)

    return wrapper


# ---------------------------------------------------------------- what tests need


def private(pages: int) -> mmap.mmap:
    """Map private anonymous memory, which has no pages yet."""
    return mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def require(features: Feature) -> Feature:
    """Skip the test where the kernel lacks a feature."""
    missing = Feature(int(features) & ~int(supported_features()))
    if missing:
        pytest.skip(f"Linux {platform.release()} lacks {missing!r}")
    return features


def require_capability() -> None:
    """Skip the test without CAP_SYS_PTRACE."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [effective] = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    if not int(effective, 16) >> 19 & 1:
        pytest.skip("the process does not have CAP_SYS_PTRACE")


def one_event(uffd: UserFaultFD) -> Event:
    """Wait for the next event."""
    found = uffd.read(timeout=LIMIT, max_events=1)
    assert found, "no event came"
    return found[0]


def one_fault(uffd: UserFaultFD) -> PageFault:
    """Wait for the next event, which is a page fault."""
    event = one_event(uffd)
    assert isinstance(event, PageFault)
    return event


def descriptors_and_children() -> tuple[list[str], list[str]]:
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        # A thread may end meanwhile; its children then belong to another one.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += (task / "children").read_text(encoding="utf-8").split()
    return sorted(os.listdir("/proc/self/fd")), sorted(children)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Skip without permission; afterwards there are no more descriptors or children than before."""
    try:
        UserFaultFD().close()
    except PermissionDenied as error:
        pytest.skip(str(error))
    before = descriptors_and_children()
    yield
    assert descriptors_and_children() == before

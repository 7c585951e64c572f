"""What tests of whole fabrics share: a fabric that stands for several tests, a place where
processes meet, a look at threads.

A host process takes half a second to start. Tests that leave nothing behind can use the same ones, one after the other:
`Standing.use` gives them out and, when the test ends, audits that every frame and Ref is free
again. After a failure the
fabric is thrown away, and the next test gets a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fabrics import WATCHDOG_SECONDS, At, Fabric, HostProcess

SECONDS = 60.0  # longest wait for something that is bound to happen
SPINS = 200  # looks at a counter before the CPU is offered to others


def forget(at: At) -> None:
    """Let go of everything that was kept in a host process, and wind its watchdog up again."""
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    host = at.host
    at.__dict__.clear()
    at.host = host
    gc.collect()


def end(fabric: Fabric) -> None:
    """Remove a fabric after a failure, whatever its hosts are doing."""
    for host in fabric.hosts:
        if host.process.is_alive():
            host.kill()
        host.left = True
    fabric.close(check=False)


class Standing:
    """A fabric with as many hosts as there are dicts of attach() options."""

    def __init__(self, *hosts: dict[str, Any], **geometry: Any) -> None:
        self._hosts = hosts
        self._geometry = geometry
        self._fabric: Fabric | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[tuple[Fabric, list[HostProcess]]]:
        """Give the fabric and its hosts to a test that must leave nothing in use.

        It may add hosts, but must end them.
        """
        if self._fabric is None:
            self._fabric = Fabric(**self._geometry)
            for options in self._hosts:
                self._fabric.host(**options)
        fabric = self._fabric
        hosts = [host for host in fabric.hosts if not host.left]
        try:
            yield fabric, hosts
            for host in hosts:
                host.call(forget)
            audit = fabric.assert_sound()
            left = {
                what: audit[what] for what in ("in_use", "hole_pages", "live_refs") if audit[what]
            }
            assert not left, f"left behind: {left}"
        except BaseException:
            self._fabric = None
            end(fabric)
            raise

    def close(self) -> None:
        """Audit and remove the fabric, if there is one."""
        if self._fabric is not None:
            fabric, self._fabric = self._fabric, None
            fabric.close()


class Meeting:
    """A barrier for processes that meet thousands of times a second: a counter for each in shared memory, spun on.

    Counters are aligned words with one writer each; nobody passes before all have counted as far.
    """

    def __init__(self, path: str | Path, me: int, parties: int) -> None:
        size = 64 * parties
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, size)
            self._words = memoryview(mmap.mmap(fd, size)).cast("Q")
        finally:
            os.close(fd)
        self._mine = 8 * me
        self._others = [8 * other for other in range(parties) if other != me]
        self._count = 0

    def meet(self) -> None:
        """Return when all parties have called this as often as we have."""
        self._count += 1
        count, words = self._count, self._words
        words[self._mine] = count
        for other in self._others:
            spins, since = 0, time.monotonic()
            while words[other] < count:
                spins += 1
                if spins % SPINS == 0:
                    os.sched_yield()
                    assert time.monotonic() < since + SECONDS / 3, "somebody does not come"


def until(what: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return the first true value of what(); for conditions that nobody announces."""
    give_up = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < give_up, f"{what} did not come true in {seconds} s"
        os.sched_yield()


def sleeps_in_fault(tid: int, pid: int | str = "self") -> bool:
    """Tell whether a thread sleeps in a page fault that it took in user mode.

    The kernel says which system call a sleeping thread is in; -1 is none, and "running" is not asleep.
    """
    return Path(f"/proc/{pid}/task/{tid}/syscall").read_text().startswith("-1 ")


def wait_for_fault(tid: int, pid: int | str = "self") -> None:
    """Wait until a thread sleeps in a page fault."""
    until(lambda: sleeps_in_fault(tid, pid))


def take_all_frames(at: At, leave: int = 0) -> int:
    """Allocate every frame that can be had, but `leave` of them; return how many are held in `at.rest`.

    Page by page, so that they can be freed one by one.
    """
    at.rest = []
    with contextlib.suppress(MemoryError):
        while True:
            at.rest.append(at.host.ralloc(at.host.page_size, zero=False))
    for _ in range(leave):
        at.rest.pop().free()
    return len(at.rest)

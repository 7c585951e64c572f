"""Rings for tests: pairs, frames known by their number, and programs that may hang.

A wait that is never woken hangs its process, and pytest could only be killed. So whatever waits runs
in a program of its own, under a watchdog that prints the stacks of all threads and ends it.
"""

import faulthandler
import multiprocessing
import os
import random
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

from dmrpc_cxl._native import Ring

WATCHDOG_S = 60


def attach(server: Ring | tuple[int, int, int], **how: int) -> Ring:
    """Attach the client of a pair; a forked child may not ask the ring, so it brings its fds."""
    memory, my_bell, peer_bell = server.fds if isinstance(server, Ring) else server
    return Ring.attach(memory, peer_bell, my_bell, **how)


def pair(**how: int) -> tuple[Ring, Ring]:
    """Make both ends in this process: (server, client)."""
    server = Ring.create(**how)
    return server, attach(server)


def frame(size: int, number: int = 0) -> bytes | bytearray:
    """Make a frame whose bytes depend on its number."""
    block = random.Random(number).randbytes(min(size, 65537))
    return struct.pack("<I", size) + (block * (size // len(block) + 1))[: size - 4]


def receive(ring: Ring) -> bytearray:
    """Wait for the next frame, however long it takes."""
    while (got := ring.recv()) is None:
        ring.wait()
    return got


def _watchdog() -> None:
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)


def _main(act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _watchdog()
    try:
        act(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def in_program(act: Callable[..., Any], *arguments: Any) -> None:
    """Run a function of a test's module in a process of its own, which must come to its end."""
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(act, arguments))
    process.start()
    process.join(WATCHDOG_S + 20)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{act.__name__} ended with {process.exitcode}; see its stderr"


def forked(act: Callable[[], Any]) -> int:
    """Run act in a forked child, and return its number; only in programs without other threads."""
    # A child would wait for its parent's watchdog, which is a thread and not there.
    faulthandler.cancel_dump_traceback_later()
    pid = os.fork()
    if pid == 0:
        _main(act, ())
    _watchdog()
    return pid


def ended(pid: int) -> None:
    """Wait for a forked child that must end well."""
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"

"""A fabric whose coordinator may be killed and started again, and what is waited for in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.fabric import device

GIB = 1 << 30
PAGE = 4096


class Served:
    """A device and its coordinator, which may be killed and started again."""

    def __init__(self, size: int) -> None:
        self.name = f"dmrpc-bench-{os.getpid()}"
        device.create(self.name, size=size, overwrite=True)
        self.device = device.open(self.name)
        self.start()

    def start(self) -> float:
        """Start a coordinator; return the seconds until it serves."""
        began = time.perf_counter()
        ready, write = os.pipe()
        self.coordinator = subprocess.Popen(
            [
                *(sys.executable, "-m", "dmrpc_cxl.coordinator", self.name),
                *("--ready-fd", str(write), "--log-level", "error"),
            ],
            pass_fds=[write],
        )
        os.close(write)
        with os.fdopen(ready, "rb") as pipe:
            if not pipe.readline():
                raise RuntimeError("the coordinator did not start; its message is above")
        return time.perf_counter() - began

    def stats(self) -> dict[str, Any]:
        with Client.of(self.device) as client:
            return client.stats()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.coordinator.terminate()
        self.coordinator.wait()
        self.device.close()
        device.remove(self.name, force=True)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


def until(true: Callable[[], bool]) -> float:
    """Wait for something that nobody announces; return when it was."""
    give_up = time.perf_counter() + 60
    while not true():
        if time.perf_counter() > give_up:
            raise RuntimeError("did not come true within 60 s")
        time.sleep(0.0005)
    return time.perf_counter()

"""Memory servers for the benchmarks: a server process, and blocks of calls of a client in this process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dmrpc_net

from .rpc_stage import Block

POOL = "512M"


@contextmanager
def memory_server(*options: str, shards: int = 1) -> Iterator[tuple[dmrpc_net.Client, int]]:
    """Run a memory server on loopback TCP; give a client of it, and the server's process id."""
    with tempfile.TemporaryDirectory(prefix="dmrpc-bench-") as folder:
        secret = Path(folder) / "secret"
        ready, write = os.pipe()
        server = subprocess.Popen(
            [
                sys.executable, "-m", "dmrpc_net.server", "--secret", str(secret), "--size", POOL,
                "--shards", str(shards), "--log-level", "error", "--ready-fd", str(write), *options,
            ],
            pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        try:
            with os.fdopen(ready) as pipe:
                words = pipe.readline().split()
            if not words:
                raise RuntimeError("the memory server did not start; its message is above")
            with dmrpc_net.attach(words[2], secret=secret) as client:
                yield client, server.pid
        finally:
            server.terminate()
            server.wait()


@contextmanager
def redis_server() -> Iterator[tuple[int, int]]:
    """Run redis-server without persistence on loopback TCP; give its port and process id."""
    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError(
            "redis-server is not installed (Debian: apt-get install redis-server)"
        )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > give_up:
                    raise
                time.sleep(0.01)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait()


def pin(pids: dict[str, int], cpu: int | None) -> None:
    """Put every thread of some processes on one CPU; None: on any."""
    cpus = range(os.cpu_count() or 1) if cpu is None else {cpu}
    for pid in pids.values():
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


def one_by_one(call: Callable[[int], object], calls: int) -> Block:
    """Make a block of calls, each timed; call(i) makes the i-th."""
    now = time.perf_counter_ns

    def run() -> tuple[list[int], list[object]]:
        latencies = [0] * calls
        for i in range(calls):
            begin = now()
            call(i)
            latencies[i] = now() - begin
        return latencies, []

    return Block(run, calls)


def batches(batch: Callable[[range], object], calls: int, window: int) -> Block:
    """Make a block of calls that are made `window` at a time; batch(numbers) makes one lot."""

    def run() -> tuple[list[int], list[object]]:
        for begin in range(0, calls, window):
            batch(range(begin, begin + window))
        return [], []

    return Block(run, calls)

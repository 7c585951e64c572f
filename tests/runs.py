"""Runs of scripts/run_fabric.sh, or of another program that does the same, for tests.

Every process of a run inherits a mark in its environment, by which it is found afterwards, whoever its
parent is by then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.topology import remove_runtime_dirs, runtime_dir

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "scripts" / "run_fabric.sh"
SECONDS = 60
SMALL = ("--size", "16M")


class Run:
    """One run of the script."""

    def __init__(self, cwd: Path, *args: str) -> None:
        self.mark = f"DMRPC_TEST_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [SCRIPT, *args],
            cwd=cwd,
            env={**os.environ, name: value, "PYTHON": sys.executable},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.fabric = ""

    def wait_for(self, text: str, times: int = 1) -> str:
        """Read the output until that text was in so many lines; return the last of them."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r"on (run-\S+)", line)
            if found:
                self.fabric = found[1]
            times -= text in line
            if not times:
                return line
        raise AssertionError(f"{text!r} did not come:\n{self.output}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Read the rest of the output and return the exit status, as a shell counts it."""
        rest, _ = self.process.communicate(timeout=SECONDS)
        self.lines += rest.splitlines()
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def lines_of(self, name: str) -> list[str]:
        found = (re.fullmatch(rf"{name} *\| (.*)", line) for line in self.lines)
        return [match[1] for match in found if match]

    def pids(self) -> list[int]:
        """Return the processes of this run that are alive, the launcher among them."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                environ = Path(f"/proc/{int(entry)}/environ").read_bytes()
            except (ValueError, OSError):
                continue
            if self.mark.encode() in environ.split(b"\0"):
                found.append(int(entry))
        return found

    def kill(self) -> None:
        """End what a failed test has left."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Run]


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Start]:
    """Give what starts runs, in that folder; afterwards nothing of them may be left."""
    before = set(device.names())
    runs: list[Run] = []

    def begin(*args: str, cwd: Path = folder) -> Run:
        runs.append(Run(cwd, *args))
        return runs[-1]

    try:
        yield begin
        for run in runs:
            assert run.process.poll() is not None, "the test did not wait for its run"
            assert run.pids() == []
            assert run.fabric not in device.names()
            assert not run.fabric or not runtime_dir(run.fabric).exists()
    finally:
        for run in runs:
            run.kill()
        for name in set(device.names()) - before:
            if any(name == run.fabric for run in runs):
                device.remove(name, force=True)
                remove_runtime_dirs(name)


def writing(folder: Path) -> Callable[..., str]:
    """Give what writes Python programs into the folder that runs are started in; it returns the file's name."""
    names = (f"program_{number}.py" for number in itertools.count(1))

    def write(text: str, name: str = "") -> str:
        name = name or next(names)
        (folder / name).write_text(textwrap.dedent(text))
        return name

    return write

"""Processes that the launcher starts, and that never outlive it.

Facts about Linux, then what they force on us:

- Ctrl-C goes to the foreground process group of a terminal. Each program gets a session of its own, so
  that it hears of a Ctrl-C once, from the launcher, and so that everything it starts can be signalled
  with it, as its process group.
- A pid, and a process group's number, may be used again once its process was waited for. So a program
  that has ended is not waited for until its group was killed: until then nobody else has the number.
- PR_SET_PDEATHSIG ends a child with its parent however that dies, but only the child itself, and when
  the *thread* that made it ends. So programs are started by the main thread. It is set between fork
  and exec, where a process with threads is in danger: so all programs are started before the first
  thread is.
- Address space layout randomisation is switched off by a flag of the process that calls exec (personality(2)), which
  all its children inherit. Some containers forbid it: so it is tried before anything is started.
- What a program starts in a session of its own is out of reach of both. The launcher makes itself the
  parent of such orphans (PR_SET_CHILD_SUBREAPER) and tells them from other children, which it may have
  from before it was executed, by their environment: it names the fabric.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import psutil

from dmrpc_cxl.errors import EnvironmentFault

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
# Programs that are started later set it by themselves, in an interpreter that then becomes the program.
_START_LATE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_libc = ctypes.CDLL(None, use_errno=True)
_prctl, _personality = _libc.prctl, _libc.personality


@contextlib.contextmanager
def same_layout() -> Iterator[None]:
    """Have programs that are started meanwhile load everything at the addresses that all of them use: without ASLR.

    Raises:
        EnvironmentFault: the kernel does not let us.
    """
    before = _personality(_ASK)
    if before == -1 or _personality(before | _ADDR_NO_RANDOMIZE) == -1:
        raise EnvironmentFault(
            "the kernel does not let this process switch address randomisation off: leave --same-layout away, or, in a "
            "container, allow personality(2), as `docker run --security-opt seccomp=unconfined` does"
        )
    try:
        yield
    finally:
        _personality(before)


class Child:
    """A program in a session of its own; its output comes out of `pipe`."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        *,
        late: bool = False,
    ) -> None:
        """Start it; main thread only, and before other threads are started, unless `late`."""
        self.name = name
        self.status: int | None = None
        """Exit status as shells count it, 128 + n for signal n; None until collect()."""
        self.pipe, write = os.pipe()
        launcher = os.getpid()

        def die_with_launcher() -> None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != launcher:  # it was too late
                os._exit(1)

        try:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", "-c", _START_LATE, str(launcher), *argv] if late else argv,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                env=env,
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=None if late else die_with_launcher,  # noqa: PLW1509 - there are no threads yet
            )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(write)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        """Readable when the program has ended."""

    def signal(self, number: int) -> None:
        """Send a signal to the program and to what it has started in its group."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def collect(self) -> int:
        """Wait for the program's end, kill what it leaves in its group, and return `status`."""
        if self.status is None:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
            self.signal(signal.SIGKILL)
            code = self._process.wait()
            self.status = code if code >= 0 else 128 - code
            os.close(self.pidfd)
        return self.status


def describe(status: int) -> str:
    """Say how a program ended, from its exit status as shells count it."""
    if status > 128:
        try:
            return f"was killed by {signal.Signals(status - 128).name}"
        except ValueError:
            pass
    return f"ended with status {status}"


# ---------------------------------------------------------------- orphans


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the parent of processes whose parents below us have ended, for a while."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def kill_strays(variable: str, value: str, seconds: float) -> int:
    """Kill and wait for every process below us whose environment has that variable with that value.

    Returns the number of processes that were still running.
    """
    killed: set[psutil.Process] = set()
    while found := [p for p in _below() if p not in killed and _has(p, variable, value)]:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        killed.update(found)
    psutil.wait_procs(list(killed), timeout=seconds)
    return len(killed)


def bury_orphans() -> None:
    """Wait for adopted processes that have ended by themselves; all Children must have been collected before."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _below() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _has(process: psutil.Process, variable: str, value: str) -> bool:
    try:
        return bool(process.environ().get(variable) == value)
    except psutil.Error:  # gone, a zombie, or not ours to look at
        return False

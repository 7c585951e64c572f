"""Running a fabric: a device, its coordinator and its hosts, from the first file to the last.

    device ──▶ coordinator, memory servers ──▶ hosts ──▶ ... ──▶ hosts end ──▶ frames are counted ──▶ coordinator stops ──▶ device goes

Rules. Only one thread decides; it waits for the ends of processes, for signals and for the next
step of its plan, in one place (`_wait`). Whatever goes wrong first makes the exit status. Every way
out of `run`, also an exception, stops every process and removes every file that was made on the way
in; how a host ended matters to nothing but the status, since the coordinator reclaims from hosts that
crash as from hosts that leave.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.errors import DeviceNotFound, DmError

from . import device
from .children import (
    Child,
    adopting_orphans,
    bury_orphans,
    describe,
    kill_strays,
    same_layout,
)
from .interrupts import Interrupts
from .leftovers import remove_dead_runs
from .memory import MemoryServers
from .output import Lines
from .place import Place
from .topology import Program, Topology, make_runtime_dir, remove_runtime_dirs, runtime_dir

TIMED_OUT = 124  # as timeout(1)
FAILED = 1
START_SECONDS = 30.0  # for the coordinator to serve, and for hosts to be attached without a remark
END_SECONDS = 10.0  # for the coordinator to reclaim, and for the kernel to end what was killed
QUICK_SECONDS = 5.0  # a coordinator that dies sooner after its start has died quickly
QUICK_DEATHS = 5  # in a row, then it is not started again
FIRST_PAUSE = 0.05  # before it is started again, seconds; doubled with each quick death
STEP_SECONDS = 0.01  # between looks at a device from which hosts are being reclaimed


@dataclass(frozen=True)
class Rules:
    """How a run is ended; times are in seconds."""

    timeout: float | None = None
    """For the whole run."""
    grace: float = 5.0
    """For hosts, to end by themselves after another one has failed, and again after a signal."""
    keep_going: bool = False
    """Hosts may go on after another one has failed."""
    restart: bool = True
    """A coordinator that dies is started again."""
    keep: bool = False
    """The device is not removed."""


class Launcher:
    """One run of a topology."""

    def __init__(self, topology: Topology, rules: Rules, lines: Lines | None = None) -> None:
        """Plan a run; `lines` is where output goes, by default stdout and stderr."""
        self._topology = topology
        self._rules = rules
        self._memory = MemoryServers(
            runtime_dir(topology.fabric),
            topology.memory_servers,
            topology.memory_size,
            topology.log_level,
        )
        names = ["coordinator", *self._memory.names, *(host.name for host in topology.hosts)]
        self._lines = lines or Lines(1, 2, max(map(len, names)))
        self._interrupts = Interrupts()
        self._selector = selectors.DefaultSelector()
        self._coordinator: Child | None = None
        self._servers: list[Child] = []  # memory servers
        self._running: list[Child] = []  # hosts
        self._unread: list[Child] = []  # children whose output nobody prints yet
        self._readers: list[threading.Thread] = []
        self._plan: list[tuple[float, Callable[[], None]]] = []  # what to do when, in order
        self._restart_at: float | None = None  # when to start the coordinator again
        self._coordinator_began = 0.0
        self._quick_deaths = 0
        self._signalled = False
        self._status = 0

    def run(self) -> int:
        """Run it; main thread only.

        Returns:
            The exit status: 0; that of the host or coordinator that failed first, 128 + n for signal n; 128 + n
            when this process got signal n; 124 after the timeout; 1 when frames were lost.

        Raises:
            DmError: the device cannot be made or removed.
        """
        fabric = self._topology.fabric
        layout = same_layout() if self._topology.same_layout else contextlib.nullcontext()
        with self._selector, self._interrupts, adopting_orphans(), layout:
            self._selector.register(self._interrupts, selectors.EVENT_READ)
            self._lines.when_broken = lambda: self._interrupts.post(signal.SIGPIPE)
            self._remove_leftovers()
            device.create(
                fabric,
                size=self._topology.size,
                page_size=self._topology.page_size,
                max_hosts=self._topology.max_hosts,
                max_refs=self._topology.max_refs,
                numa_node=self._topology.numa_node,
            )
            try:
                try:
                    self._start()
                    self._await_hosts()
                    self._stop_coordinator()
                    self._stop_memory_servers()
                finally:
                    self._end_everything()
                self._count_frames()
            finally:
                self._remove_device()
        return self._status

    def _say(self, text: str) -> None:
        self._lines.say(text)

    def _fail(self, status: int, text: str) -> None:
        self._status = self._status or status
        self._say(text)

    # ---------------------------------------------------------------- waiting

    def _wait(self, until: float | None) -> list[Child]:
        """Wait for children to end, and for until at most. Returns those that have ended, in order.

        Signals to this process and steps of the plan are dealt with inside.
        """
        times = [
            when
            for when in (until, self._restart_at, *(when for when, _ in self._plan[:1]))
            if when is not None
        ]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        ended = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._interrupts:
                for number in self._interrupts.take():
                    self._interrupted(number)
            elif isinstance(key.data, Child):
                self._selector.unregister(key.fileobj)
                key.data.collect()
                ended.append(key.data)
        while self._plan and self._plan[0][0] <= time.monotonic():
            self._plan.pop(0)[1]()
        if self._restart_at is not None and self._restart_at <= time.monotonic():
            self._start_coordinator_again()
        return ended

    def _interrupted(self, number: signal.Signals) -> None:
        if number == signal.SIGPIPE:
            self._fail(128 + number, "nobody reads the output any more: stopping")
        elif self._signalled:
            self._say(f"{number.name} again: killing all hosts")
            self._plan = []
            self._signal_hosts(signal.SIGKILL)
            return
        else:
            self._fail(128 + number, f"{number.name}: forwarded to all hosts")
        self._stop_hosts(signal.SIGTERM if number == signal.SIGPIPE else number)

    def _signal_hosts(self, number: int) -> None:
        self._signalled = True
        for host in self._running:
            host.signal(number)

    def _stop_hosts(self, first: int = signal.SIGTERM, delay: float = 0.0) -> None:
        """Plan the end of all hosts: a signal after `delay`, SIGKILL a grace period later."""
        now, grace = time.monotonic(), self._rules.grace
        self._plan = [(now + delay + grace, self._kill_hosts)]
        if delay:
            self._plan.insert(0, (now + delay, lambda: self._signal_hosts(first)))
        else:
            self._signal_hosts(first)

    def _kill_hosts(self) -> None:
        if self._running:
            names = ", ".join(host.name for host in self._running)
            self._say(f"still there after {self._rules.grace:g} s, killed: {names}")
            self._signal_hosts(signal.SIGKILL)

    def _time_is_up(self) -> None:
        self._fail(TIMED_OUT, f"not over after {self._rules.timeout:g} s: stopping")
        self._stop_hosts()

    # ---------------------------------------------------------------- starting

    def _remove_leftovers(self) -> None:
        removed, inhabited = remove_dead_runs()
        for name in removed:
            self._say(f"removed device {name}: its launcher was killed")
        for name in inhabited:
            self._say(
                f"device {name} is left over, and somebody lives in it: dmrpc fabric inspect {name}"
            )

    def _start(self) -> None:
        if self._rules.timeout is not None:
            self._plan = [(time.monotonic() + self._rules.timeout, self._time_is_up)]
        try:
            if self._start_coordinator() and self._start_memory_servers():
                self._start_hosts()
        finally:
            for child in self._unread:
                self._readers.append(self._lines.follow(child.name, child.pipe))
            self._unread = []
        if self._running:
            threading.Thread(target=self._announce_hosts, daemon=True).start()

    def _start_child(
        self, name: str, program: Program, pass_fds: tuple[int, ...] = (), *, late: bool = False
    ) -> Child:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(program.env)}
        child = Child(name, program.argv, env, pass_fds, late=late)
        if late:
            self._readers.append(self._lines.follow(name, child.pipe))
        else:
            self._unread.append(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        return child

    def _start_coordinator(self) -> bool:
        """Start the coordinator and wait until it serves; False if that is not going to happen."""
        ready, write = os.pipe()
        program = self._coordinator_program("--ready-fd", str(write))
        self._coordinator_began = time.monotonic()
        try:
            child = self._start_child("coordinator", program, (write,))
        finally:
            os.close(write)
        self._coordinator = child
        return bool(self._await_line(ready, child))

    def _start_memory_servers(self) -> bool:
        """Start the memory servers, one after the other; False if one is not going to serve."""
        if self._memory.names:
            make_runtime_dir(self._topology.fabric)
        for number, name in enumerate(self._memory.names):
            ready, write = os.pipe()
            try:
                child = self._start_child(name, self._memory.program(number, write), (write,))
            finally:
                os.close(write)
            self._servers.append(child)
            line = self._await_line(ready, child)
            if not line:
                return False
            self._memory.serves(line)
        return True

    def _coordinator_program(self, *more: str) -> Program:
        topology = self._topology
        argv = [sys.executable, "-m", "dmrpc_cxl.coordinator", topology.fabric, *more]
        argv += ["--log-level", topology.log_level]
        if topology.transport == "tcp":
            argv += ["--tcp", "127.0.0.1:0"]
        return Program(tuple(argv))

    def _start_coordinator_again(self) -> None:
        self._restart_at = None
        self._coordinator_began = time.monotonic()
        program = self._coordinator_program()
        self._coordinator = self._start_child("coordinator", program, late=True)

    def _await_line(self, ready: int, child: Child) -> str:
        """Return the line that a child writes to a pipe when it serves, and close the pipe; empty if it will not."""
        give_up = time.monotonic() + START_SECONDS
        self._selector.register(ready, selectors.EVENT_READ)
        try:
            while not self._signalled and time.monotonic() < give_up:
                ended = self._wait(give_up)
                for one in ended:
                    self._service_failed(one)
                if ended:
                    return ""
                if select.select([ready], [], [], 0)[0] and (line := os.read(ready, 4096)):
                    return line.decode()
            if not self._signalled:
                self._fail(
                    FAILED, f"{self._called(child)} does not serve after {START_SECONDS:g} s"
                )
            return ""
        finally:
            self._selector.unregister(ready)
            os.close(ready)

    def _start_hosts(self) -> None:
        topology = self._topology
        self._say(
            f"{topology.fabric}: {topology.size >> 20} MiB in pages of {topology.page_size} bytes, "
            f"{len(topology.hosts)} hosts, coordinator over {topology.transport}"
        )
        folder = str(make_runtime_dir(topology.fabric))
        for index, host in enumerate(topology.hosts):
            place = Place(
                topology.fabric,
                host.name,
                index,
                len(topology.hosts),
                topology.transport,
                folder,
                topology.log_level,
                ",".join(self._memory.addresses),
                str(self._memory.secret) if self._memory.addresses else "",
                topology.latency,
                ",".join(map(str, self._memory.pids)),
            )
            for program in host.programs:
                env = (*program.env, *place.as_environment().items())
                self._running.append(self._start_child(host.name, Program(program.argv, env)))

    def _announce_hosts(self) -> None:
        """Say when all hosts are attached. In a thread of its own; ends at the latest with the coordinator."""
        number = sum(len(host.programs) for host in self._topology.hosts)
        began = time.monotonic()
        try:
            with Client.to(self._topology.fabric) as client:
                client.wait_for_hosts(number, START_SECONDS)
        except TimeoutError:
            self._say(f"not all hosts are attached after {START_SECONDS:g} s")
        except DmError:
            pass  # the run is over, or is about to be
        else:
            self._say(f"all hosts are attached after {time.monotonic() - began:.1f} s")

    # ---------------------------------------------------------------- ending

    def _await_hosts(self) -> None:
        """Wait until every host has ended."""
        while self._running:
            for child in self._wait(None):
                if child is self._coordinator:
                    if not self._coordinator_ended(child):
                        self._stop_hosts()
                elif child in self._servers:
                    self._service_failed(child)
                    self._stop_hosts()
                else:
                    self._running.remove(child)
                    self._host_ended(child)
        self._plan = []

    def _host_ended(self, host: Child) -> None:
        status = host.collect()
        if status == 0 or self._signalled:
            return
        first = self._status == 0
        self._fail(status, f"{host.name} {describe(status)}")
        if first and self._running and not self._rules.keep_going:
            if self._rules.grace:
                self._say(f"the other hosts have {self._rules.grace:g} s to end")
            self._stop_hosts(delay=self._rules.grace)

    def _coordinator_ended(self, coordinator: Child) -> bool:
        """Plan to start a coordinator again that was killed. False: it will not be."""
        status, lived = coordinator.collect(), time.monotonic() - self._coordinator_began
        self._quick_deaths = self._quick_deaths + 1 if lived < QUICK_SECONDS else 0
        if status == 0 or not self._rules.restart:
            self._service_failed(coordinator)
            return False
        if self._quick_deaths >= QUICK_DEATHS:
            self._service_failed(coordinator)
            self._say(
                f"it died {QUICK_DEATHS} times in a row within {QUICK_SECONDS:g} s of its start: "
                "not started again"
            )
            return False
        pause = FIRST_PAUSE * 2**self._quick_deaths
        self._say(f"the coordinator {describe(status)}: started again in {pause:.2f} s")
        self._coordinator = None
        self._restart_at = time.monotonic() + pause
        return True

    def _called(self, child: Child) -> str:
        return "the coordinator" if child is self._coordinator else child.name

    def _service_failed(self, child: Child) -> None:
        """Take note that the coordinator or a memory server has ended, which it should not have."""
        status = child.collect()
        self._fail(status or FAILED, f"{self._called(child)} {describe(status)}")
        if child is self._coordinator:
            self._coordinator = None
        else:
            self._servers.remove(child)

    def _stop_coordinator(self) -> None:
        """Let the coordinator finish with the hosts that are gone, then stop it."""
        if self._restart_at is not None:
            self._start_coordinator_again()
        child = self._coordinator
        if child is None:
            return
        kill_strays("DMRPC_FABRIC", self._topology.fabric, END_SECONDS)
        give_up = time.monotonic() + END_SECONDS
        with device.open(self._topology.fabric, writable=False) as opened:
            while opened.hosts() and time.monotonic() < give_up:
                if child in self._wait(time.monotonic() + STEP_SECONDS):
                    self._service_failed(child)
                    return
        self._stop_service(child)

    def _stop_service(self, child: Child) -> None:
        child.signal(signal.SIGTERM)
        give_up = time.monotonic() + END_SECONDS
        while child.status is None and time.monotonic() < give_up:
            self._wait(give_up)
        if child.status is None:
            self._fail(FAILED, f"{self._called(child)} does not stop: killed")
        elif child.status not in (0, 128 + signal.SIGTERM):  # the latter before it served
            self._service_failed(child)

    def _stop_memory_servers(self) -> None:
        """Count the pages of the memory servers, and stop them."""
        if not self._servers or len(self._servers) < len(self._memory.names):
            return  # what one held that is gone is nobody's
        fine, text = self._memory.count()
        if fine:
            self._say(text)
        else:
            self._fail(FAILED, text)
        for child in list(self._servers):
            self._stop_service(child)

    def _end_everything(self) -> None:
        """Kill what is still running, and print what was still to be printed."""
        left = [
            *self._running,
            *self._servers,
            *([self._coordinator] if self._coordinator else []),
        ]
        for child in left:
            child.signal(signal.SIGKILL)
        for child in left:
            child.collect()
        kill_strays("DMRPC_FABRIC", self._topology.fabric, END_SECONDS)
        bury_orphans()
        for reader in self._readers:
            reader.join(END_SECONDS)

    def _count_frames(self) -> None:
        """Check that every frame is back in the pool and no Ref is alive, now that nobody runs."""
        if self._coordinator is None:
            return  # nobody took back what the hosts held
        frames = device.verify(self._topology.fabric)
        total, back = frames["nr_frames"], frames["pool"]
        if back == total and not frames["live_refs"] and not frames["nr_violations"]:
            self._say(f"all {total} frames are back in the pool, and no Ref is alive")
            return
        self._fail(
            FAILED,
            f"{back} of {total} frames are back in the pool, {frames['live_refs']} Refs are alive, "
            f"{frames['nr_violations']} violations",
        )
        for _, text in frames["violations"]:
            self._say(text)

    def _remove_device(self) -> None:
        name = self._topology.fabric
        if self._rules.keep:
            remove_runtime_dirs(name)
            self._say(f"kept {device.path_of(name)}; when done: dmrpc fabric remove {name}")
            return
        try:
            device.remove(name)
        except DeviceNotFound:  # somebody was faster
            remove_runtime_dirs(name)


def checkout() -> Path:
    """Return the folder that this package, and in a checkout the examples, are in."""
    return Path(__file__).resolve().parent.parent

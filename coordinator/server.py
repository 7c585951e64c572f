"""The coordinator as a server: taking over a device, accepting connections, stopping.

One coordinator serves a device. It holds the flock of the device file, which ends with it however
it ends; the superblock says who and where it is. Whoever gets the lock and finds a coordinator in
the superblock is the successor of one that was killed: there is nothing to repair but what is on
    the device, and the ledger is built from there in any case.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dmrpc_cxl._native import Device, crash_point
from dmrpc_cxl.errors import DeviceNotFound, EnvironmentFault, SystemCallFailed
from dmrpc_cxl.fabric.device import path_of
from dmrpc_cxl.fabric.liveness import is_alive, start_time
from dmrpc_cxl.fabric.topology import make_runtime_dir, socket_path

from .connection import Connection, TimeLimits
from .directory import Directory
from .frames import POOL, Frames
from .hosts import Hosts
from .ledger import Ledger, Policy
from .listening import UnixListener, listen_tcp
from .names import Names
from .scrubber import Pace, Scrubber
from .service import Parts, Service
from .supply import Supply
from .waits import Changes

log = logging.getLogger(__name__)

THREADS = 4  # for looks at the whole device and reclaims, of which one runs at a time
NICENESS = 10  # of the threads that reclaim: a busy CPU gives them a tenth of its time
RECLAIM_SECONDS = 30.0  # a reclaim under way gets to end when the coordinator is stopped
EPOCH_SECONDS = 0.25  # between looks whether another coordinator has taken over
MOST_REFUSED = 64  # connections beyond the limit that are told so at a time
ACCEPT_PAUSE = 0.1  # seconds, when descriptors have run out


class CoordinatorRunning(EnvironmentFault):
    """Another coordinator serves the device."""


@dataclass(frozen=True)
class Settings:
    """How to serve a fabric."""

    fabric: str
    socket: str | None = None
    """Path of the Unix socket; None: in the fabric's runtime directory."""
    tcp: tuple[str, int] | None = None
    tcp_anywhere: bool = False
    policy: Policy = field(default_factory=Policy)
    limits: TimeLimits = field(default_factory=TimeLimits)
    recall_seconds: float = 1.0
    max_connections: int = 4096
    take_over: bool = False
    """Replace a coordinator that holds the device, whatever it is doing."""
    pace: Pace = field(default_factory=Pace)
    """Of the scrubber."""


class LockedDevice:
    """The device, held against every other coordinator until `close`."""

    def __init__(self, fabric: str, *, take_over: bool = False) -> None:
        """Open and lock the device of a fabric; with `take_over` do without the lock if need be.

        Raises:
            DeviceNotFound: there is none.
            CoordinatorRunning: it has a coordinator.
            NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: it is damaged.
            SystemCallFailed: it belongs to another user.
        """
        self.path = str(path_of(fabric))
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise DeviceNotFound(
                errno.ENOENT, f"no device {self.path}: make it with `dmrpc fabric create {fabric}`"
            ) from None
        except OSError as error:
            raise SystemCallFailed(
                error.errno, f"cannot open device {self.path}: {error.strerror}"
            ) from error
        try:
            self.device = Device(self._fd)
            try:
                self._lock(fabric, take_over)
            except BaseException:
                self.device.close()
                raise
        except BaseException:
            os.close(self._fd)
            raise

    def lock(self) -> bool:
        """Take the lock; False while somebody else holds it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock(self, fabric: str, take_over: bool) -> None:
        if not self.lock() and not take_over:
            pid = self.device.superblock["coordinator_pid"]
            who = (
                f"coordinator {pid} serves"
                if pid
                else "somebody else is starting to serve or removing"
            )
            raise CoordinatorRunning(
                f"{who} fabric {fabric}: stop that one first (dmrpc fabric inspect {fabric}), "
                "or replace it with --take-over"
            )
        try:
            same = os.path.samestat(os.lstat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            raise DeviceNotFound(errno.ENOENT, f"device {self.path} was removed just now")
        found = self.device.superblock
        pid, started = found["coordinator_pid"], found["coordinator_start_time"]
        if pid and pid != os.getpid():
            if is_alive(pid, started) and not take_over:
                raise CoordinatorRunning(
                    f"coordinator {pid} serves fabric {fabric}, but has lost its lock: stop it first"
                )
            log.info("coordinator %d did not stop in order; taking over", pid)

    def close(self) -> None:
        """Let go of the device."""
        self.device.close()
        os.close(self._fd)


class Server:
    """One running coordinator."""

    def __init__(self, settings: Settings) -> None:
        """Take the device and the sockets; must be called in the event loop.

        Raises:
            As LockedDevice, UnixListener and listen_tcp do.
        """
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._connections: set[Connection] = set()
        self._listeners: list[socket.socket] = []
        began = time.monotonic()
        self.replaced = False
        """Another coordinator has taken over from this one."""
        self._locked = LockedDevice(settings.fabric, take_over=settings.take_over)
        try:
            if settings.socket is None:
                make_runtime_dir(settings.fabric)
            path = settings.socket or socket_path(settings.fabric)
            self._unix = UnixListener(path, replace=settings.take_over)
            self._listeners.append(self._unix.socket)
            try:
                if settings.tcp is not None:
                    self._listeners.append(
                        listen_tcp(*settings.tcp, anywhere=settings.tcp_anywhere)
                    )
            except BaseException:
                self._unix.close()
                raise
        except BaseException:
            self._locked.close()
            raise
        device = self._locked.device
        # From here on an earlier coordinator that goes on after a pause changes nothing any more, and what
        # is read of the device is ours to keep. Nobody is accepted before all is restored.
        before = device.superblock
        self._epoch = device.start_coordinator(
            os.getpid(), start_time(os.getpid()) or 0, self._unix.path, *self._tcp_address()
        )
        device.fence_epoch = self._epoch
        superblock = device.superblock
        nr_frames: int = superblock["nr_frames"]
        self._began = began
        self._threads = ThreadPoolExecutor(THREADS, "coordinator")
        # Reclaiming and scrubbing leave the CPUs to hosts that are at work.
        self._behind = ThreadPoolExecutor(THREADS, "behind", initializer=_step_back)
        changes = Changes()
        directory = Directory(device, Names())
        ledger = Ledger.from_device(
            nr_frames, superblock["max_hosts"], device.free_runs(POOL), settings.policy
        )
        frames = Frames(device, ledger, self._threads)
        self._hosts = Hosts(device, ledger, frames, directory, changes, self._threads, self._behind)
        supply = Supply(device, ledger, frames, self._hosts, changes, settings.recall_seconds)
        self._scrubber = Scrubber(device, self._hosts, self._behind, settings.pace)
        self._hosts.when_reclaimed = self._scrubber.hurry
        parts = Parts(device, ledger, directory, self._hosts, supply, changes, self._scrubber)
        self._changes = changes
        self._service = Service(parts, self.stop, self.give_way)
        self._hosts.when_replaced = self.give_way
        predecessor = before["coordinator_pid"], before["coordinator_start_time"]
        if settings.take_over and predecessor[0] and is_alive(*predecessor):
            self._hosts.predecessor = predecessor
            self._hosts.left_changing = device.changing()

    @property
    def where(self) -> str:
        """Say where the coordinator listens, for people and scripts."""
        tcp = "".join(f" tcp={host}:{port}" for host, port in [self._tcp_address()] if port)
        return f"unix={self._unix.path}{tcp}"

    def stop(self) -> None:
        """Ask the server to stop: `serve` returns."""
        self._stop.set()

    async def serve(self, ready: Callable[[Server], None]) -> None:
        """Restore, tell `ready`, serve until `stop`, and leave nothing behind."""
        accepting: list[asyncio.Task[None]] = []
        try:
            self._service.epoch = self._hosts.epoch = self._epoch
            await self._hosts.restore()
            crash_point("restored")
            self._service.recovery_s = time.monotonic() - self._began
            for listener in self._listeners:
                listener.setblocking(False)
                accepting.append(self._loop.create_task(self._accept(listener)))
            accepting.append(self._loop.create_task(self._scrubber.run()))
            accepting.append(self._loop.create_task(self._watch_epoch()))
            log.info(
                "serving fabric %s, epoch %d, %s", self._settings.fabric, self._epoch, self.where
            )
            ready(self)
            await self._stop.wait()
            log.info("stopping")
        finally:
            self._service.stopping = True
            for listener in self._listeners:
                # A connection may have arrived in this very turn of the loop: its callback must not find a cancelled accept.
                self._loop.remove_reader(listener)
            for task in accepting:
                task.cancel()
            await asyncio.gather(*accepting, return_exceptions=True)
            await self._close()

    def _tcp_address(self) -> tuple[str, int]:
        if len(self._listeners) < 2:
            return "", 0
        host, port = self._listeners[1].getsockname()[:2]
        return host, port

    async def _watch_epoch(self) -> None:
        """Notice when another coordinator has taken over; and get the lock when it is to be had."""
        locked = not self._settings.take_over
        while True:
            await asyncio.sleep(EPOCH_SECONDS)
            if self._locked.device.epoch != self._epoch:
                self.give_way()
            locked = locked or self._locked.lock()

    def give_way(self) -> None:
        """Stop: another coordinator has taken over."""
        if not self.replaced:
            self.replaced = True
            log.error(
                "coordinator %d has taken over, epoch %d is over: this one stops and changes nothing",
                self._locked.device.superblock["coordinator_pid"], self._epoch,
            )  # fmt: skip
            self.stop()

    async def _close(self) -> None:
        self._unix.close()
        for listener in self._listeners:
            listener.close()
        self._locked.device.stop_coordinator(self._epoch)
        self._changes.end()  # whoever waits is told that it is of no use
        connections = list(self._connections)
        if connections:
            await asyncio.wait(
                {asyncio.ensure_future(connection.finish()) for connection in connections},
                timeout=self._settings.limits.send,
            )
        for connection in connections:
            connection.close()
        if not await self._hosts.close(RECLAIM_SECONDS):
            # Crash-only: the next coordinator finishes it, from what the device says.
            log.error("a reclaim does not end; it is left to the next coordinator")
            logging.shutdown()
            os._exit(1)
        await self._loop.run_in_executor(None, self._threads.shutdown)
        await self._loop.run_in_executor(None, self._behind.shutdown)
        self._locked.close()

    # ---------------------------------------------------------------- connections

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    log.error("cannot accept connections: %s", error.strerror)
                    await asyncio.sleep(ACCEPT_PAUSE)
                continue
            surplus = len(self._connections) - self._settings.max_connections
            if surplus >= 0:
                log.warning("%d connections are open; refused one more", len(self._connections))
            if surplus >= MOST_REFUSED:
                sock.close()
                continue
            try:
                if sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                serve = self._service.answer if surplus < 0 else self._service.refuse
                self._connections.add(Connection(sock, self._settings.limits, serve, self._forget))
            except OSError as error:  # the peer is gone already
                log.debug("lost a connection at once: %s", error.strerror)
                sock.close()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._hosts.forget(connection)


def _step_back() -> None:
    """Lower the priority of the calling thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: a host takes about six."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""The hosts that are attached: how they come, how they are watched, how they go.

Rules of this file:
  - Whether a process lives is decided by its pidfd and by nothing else. A connection that closes is
    no death.
  - Leaving and dying are one path, `_retire`: the host entry becomes DEAD, names go, the device is
    reclaimed by native code in a thread, frames are counted, the slot becomes free.
  - The duplicate of a host's userfaultfd is what keeps its windows protected when the host loses
    its own. So it is closed last: when the process is gone, or has left and closed the guard
    connection.
  - An incarnation is the random token that the host registered with. So a repeated REGISTER is
    known even by a coordinator that was started after the first one: the token is in the device.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import Any

from dmrpc_cxl._native import LAYOUT, Device, crash_point
from dmrpc_cxl.errors import CoordinatorReplaced, DmError, HostFenced, RemoteProtocolError
from dmrpc_cxl.fabric.liveness import is_alive

from .connection import Connection
from .directory import Directory
from .frames import Frames
from .ledger import HostAccount, Ledger
from .messages import MsgType, Register, Registered, Rejoin, Status
from .processes import Process
from .refusals import Refused
from .waits import Changes

log = logging.getLogger(__name__)

FREE: int = LAYOUT["HOST_FREE"]
ACTIVE: int = LAYOUT["HOST_ACTIVE"]
DEAD: int = LAYOUT["HOST_DEAD"]
DRAINING: int = LAYOUT["HOST_DRAINING"]

PREDECESSOR_SECONDS = 0.1  # between looks whether a coordinator that was replaced is gone
USERFAULTFD = "anon_inode:[userfaultfd]"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a host was asked for last, by a recall."""

    everything: bool
    free: int
    """Frames it had then."""


class LiveHost:
    """A host as long as this coordinator has to do with it."""

    def __init__(self, account: HostAccount, process: Process | None) -> None:
        """Begin with the process that is the host, None when it is gone."""
        self.account = account
        self.process = process
        self.guard: Connection | None = None
        self.guard_fd = -1
        self.retirement: asyncio.Task[None] | None = None
        self.owes_answer_until = 0.0
        self.asked = Asked(everything=False, free=0)
        self.withheld = {False: 0, True: 0}
        """Free frames it had when it was asked last and gave none: for those above its low watermark, for all."""

    def __str__(self) -> str:
        pid = f", pid {self.process.pid}" if self.process else ""
        return f"host {self.account.host} ({self.account.name or 'no name'}{pid})"

    def notify(self, kind: MsgType, body: Any = None) -> bool:
        """Say something on the guard connection. False when there is none that can take it."""
        return self.guard is not None and self.guard.notify(kind, body)

    def drop_guard(self) -> None:
        """Close the duplicate of the userfaultfd."""
        if self.guard_fd >= 0:
            os.close(self.guard_fd)
            self.guard_fd = -1


@dataclasses.dataclass
class Reclaim:
    """What became of one host that went."""

    host: int
    name: str
    why: str
    seconds: float
    frames: int
    report: dict[str, int]


class Hosts:
    """All attached hosts."""

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        frames: Frames,
        directory: Directory,
        changes: Changes,
        threads: Executor,
        behind: Executor,
    ) -> None:
        """Begin empty, in the event loop; `changes` is announced when hosts come and go.

        Reclaims run in `behind`, whose threads have a low priority.
        """
        self.epoch = 0
        self.reclaims: deque[Reclaim] = deque(maxlen=32)
        self.nr_reclaims = 0
        self.predecessor: tuple[int, int] | None = None
        """Pid and start time of a coordinator that was replaced, and may go on after a pause."""
        self.left_changing: tuple[int, bool] = 0, False
        """What that one was in the midst of: the entry that it may still bring to life, whether it may change names."""
        self.names_settled = asyncio.Event()
        """Nobody else changes the service table."""
        self._clearing: asyncio.Task[None] | None = None
        self._left_dead: set[int] = set()
        self.when_replaced: Callable[[], None] = lambda: None
        self.when_reclaimed: Callable[[], None] = lambda: None
        self._device = device
        self._ledger = ledger
        self._frames = frames
        self._directory = directory
        self._changes = changes
        self._threads = threads
        self._behind = behind
        self._loop = asyncio.get_running_loop()
        self._hosts: dict[int, LiveHost] = {}
        self._lingering: set[LiveHost] = set()  # retired, their guard is still needed
        self._gone_tokens: deque[int] = deque(maxlen=4096)
        self._admission = asyncio.Lock()
        self._reclaim = asyncio.Lock()

    def __iter__(self) -> Iterator[LiveHost]:
        return iter(list(self._hosts.values()))

    @property
    def reclaiming(self) -> bool:
        """Tell whether frames of some host are on their way back to the pool."""
        return any(host.retirement is not None for host in self._hosts.values())

    async def find_lost_frames(self) -> int:
        """Look for frames that the ledger missed, but not while a host is being reclaimed.

        What an unfinished reclaim has freed must not be handed out: a coordinator that repeats the
        reclaim, since this one was killed in the middle, would take it from its new owner.
        Returns how many were found.
        """
        if self.reclaiming:
            return 0
        async with self._reclaim:
            return await self._frames.look_for_lost()

    @asynccontextmanager
    async def unchanging(self) -> AsyncIterator[None]:
        """Admit and reclaim nobody for a while."""
        async with self._admission, self._reclaim:
            yield

    @property
    def nr_active(self) -> int:
        """Number of live hosts."""
        return sum(host.account.alive for host in self._hosts.values())

    def of(self, connection: Connection) -> LiveHost:
        """Return the live host that a connection belongs to.

        Raises:
            Refused: it belongs to none.
            HostFenced: that host has left or is dead.
        """
        if connection.host is None:
            raise Refused(Status.NOT_REGISTERED, "this connection has not registered a host")
        return self._known(connection.host, connection.incarnation)

    # ---------------------------------------------------------------- coming

    async def restore(self) -> None:
        """Take over an earlier coordinator's hosts, and reclaim those whose process is gone."""
        dead: list[LiveHost] = []
        owned = self._device.owned()
        for entry in self._device.hosts():
            slot: int = entry["host"]
            process = None
            if entry["state"] == ACTIVE:
                process = Process.find(entry["pid"], entry["start_time"])
            limit: int = entry["frame_limit"]
            account = self._ledger.readmit(
                slot, entry["incarnation"], entry["name"], process is not None, owned.get(slot, 0)
            )
            account.watermarks = dataclasses.replace(account.watermarks, frame_limit=limit)
            host = self._hosts[slot] = LiveHost(account, process)
            if process is None:
                dead.append(host)
                if entry["state"] == DEAD:
                    self._left_dead.add(slot)
            else:
                self._watch(host)
                log.info("%s is alive and may rejoin", host)
        self._directory.restore(
            {host.account.host: host.account.incarnation for host in self if host.process}
        )
        retirements = [self._retire(host, "was gone when the coordinator started") for host in dead]
        if self.predecessor is None:
            self.names_settled.set()
            await asyncio.gather(*retirements)
        else:
            self._stay_out_of_its_way()

    def _stay_out_of_its_way(self) -> None:
        """Leave alone what a predecessor may still be writing, until it is gone."""
        slot, names = self.left_changing
        if slot in self._hosts:  # it has written the last of it, or died of that before
            slot = 0
        if slot:
            self._ledger.reserve(slot)
        if not names:
            self.names_settled.set()
        if slot or names:
            self._clearing = self._loop.create_task(self._clear_up(slot, names))

    async def _clear_up(self, slot: int, names: bool) -> None:
        """Undo what a predecessor has done since it was replaced: nobody was told of it."""
        await self._predecessor_ended()
        try:
            if names:
                self._directory.forget_strays()
            if slot:
                self._device.set_host_state(slot, ACTIVE, DEAD)
                await self._loop.run_in_executor(self._behind, self._device.reclaim_host, slot)
                self._device.set_host_state(slot, DEAD, FREE)
                self._ledger.release(slot)
        except CoordinatorReplaced:
            self.when_replaced()
        finally:
            self.names_settled.set()
            self._changes.announce()

    async def register(self, connection: Connection, ask: Register) -> Registered:
        """Give a host a slot; the same token gets the same answer again.

        Raises:
            NoHostSlot: there is none.
            Refused: the process cannot be seen from here.
            HostFenced: the token is that of a host that has left or is dead.
        """
        if ask.token == 0:
            raise RemoteProtocolError("REGISTER with token 0")
        async with self._admission:
            host = self._with_token(ask.token)
            if host is None:
                # The end of the connection must not tear this apart.
                host = await asyncio.shield(self._admit(connection, ask))
            else:
                self._check_process(connection, host)
            return self._bind(connection, host)

    def rejoin(self, connection: Connection, ask: Rejoin) -> Registered:
        """Let a registered host speak on another connection.

        Raises:
            HostFenced: it has left or was declared dead.
            Refused: the connection is another process's.
        """
        host = self._known(ask.host, ask.incarnation)
        self._check_process(connection, host)
        return self._bind(connection, host)

    def guard(self, connection: Connection, ask: Rejoin) -> None:
        """Keep the userfaultfd that came with the request; the connection is the host's guard.

        Raises:
            RemoteProtocolError: not exactly one descriptor, or not a userfaultfd.
            HostFenced, Refused: as `rejoin`.
        """
        if not connection.is_unix:
            raise RemoteProtocolError("GUARD needs a Unix connection: TCP carries no descriptor")
        host = self._known(ask.host, ask.incarnation)
        self._check_process(connection, host)
        descriptors = connection.take_descriptors()
        try:
            if len(descriptors) != 1:
                raise RemoteProtocolError(f"GUARD came with {len(descriptors)} descriptors, not 1")
            if os.readlink(f"/proc/self/fd/{descriptors[0]}") != USERFAULTFD:
                raise RemoteProtocolError("the descriptor that came with GUARD is no userfaultfd")
            host.drop_guard()  # the host holds the one that just came, and so do we
            host.guard_fd = descriptors.pop()
            host.guard = connection
            crash_point("guard_kept")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _admit(self, connection: Connection, ask: Register) -> LiveHost:
        process = self._process_of(connection, ask)
        try:
            name = ask.name.partition(b"\0")[0].decode(errors="replace")
            marks = self._ledger.negotiate(ask.low, ask.high, ask.batch)
            account = self._ledger.open(ask.token, name, marks)
        except BaseException:
            process.close()
            raise
        try:
            await self._loop.run_in_executor(
                self._threads, self._device.activate_host,
                account.host, process.pid, process.start_time, ask.token, name, marks.frame_limit,
            )  # fmt: skip
        except BaseException:
            process.close()
            self._ledger.release(account.host)
            raise
        host = self._hosts[account.host] = LiveHost(account, process)
        self._watch(host)
        log.info("%s registered", host)
        self._changes.announce()
        crash_point("register_unanswered")
        return host

    def _process_of(self, connection: Connection, ask: Register) -> Process:
        """Find the process that registers; what the kernel says of it counts more than its word."""
        pid, started = ask.pid, ask.start_time or None
        if connection.peer_pid is not None:
            pid = connection.peer_pid
            if pid != ask.pid:  # another pid namespace
                started = None
        elif started is None:
            raise RemoteProtocolError("REGISTER over TCP without the start time of the process")
        process = Process.find(pid, started)
        if process is None:
            raise Refused(
                Status.DENIED,
                f"the coordinator sees no live process {pid} with start time {started}; a host "
                "has to run on the coordinator's machine, in its pid namespace or below it",
            )
        return process

    def _with_token(self, token: int) -> LiveHost | None:
        for host in self._hosts.values():
            if host.account.incarnation == token:
                return self._known(host.account.host, token)
        if token in self._gone_tokens:
            raise HostFenced(
                "the host with that token has left or is dead; register with a new one"
            )
        return None

    def _known(self, slot: int, incarnation: int) -> LiveHost:
        account = self._ledger.account(slot, incarnation)
        host = self._hosts.get(slot)
        if host is None or host.account is not account:
            raise HostFenced(f"host {slot} is still being registered")
        return host

    def _check_process(self, connection: Connection, host: LiveHost) -> None:
        """Refuse a connection of another process than the host's, such as a forked child's."""
        pid = host.process.pid if host.process else 0
        if connection.peer_pid is not None and connection.peer_pid != pid:
            raise Refused(
                Status.DENIED,
                f"host {host.account.host} is process {pid}, not {connection.peer_pid}",
            )

    def _bind(self, connection: Connection, host: LiveHost) -> Registered:
        account, marks = host.account, host.account.watermarks
        connection.host, connection.incarnation = account.host, account.incarnation
        return Registered(
            account.incarnation, self.epoch, account.host,
            marks.low, marks.high, marks.batch, marks.batch_max, marks.frame_limit,
        )  # fmt: skip

    # ---------------------------------------------------------------- going

    async def leave(self, connection: Connection) -> None:
        """Retire a host that says it has released everything; returns when its slot is free."""
        host = self.of(connection)
        await asyncio.shield(self._retire(host, "left"))

    def forget(self, connection: Connection) -> None:
        """Take note that a connection is closed."""
        for host in [*self._hosts.values(), *self._lingering]:
            if host.guard is connection:
                host.guard = None
                self._let_go(host)

    def _watch(self, host: LiveHost) -> None:
        if host.process is not None:
            self._loop.add_reader(host.process.pidfd, self._process_ended, host)

    def _process_ended(self, host: LiveHost) -> None:
        log.info("%s: its process has ended", host)
        self._forget_process(host)
        if self._device.epoch != self.epoch:
            self.when_replaced()  # its end is the successor's business
        elif host.account.alive:
            host.notify(MsgType.NOTIFY_FENCED)  # for whoever else holds the connection
            try:
                self._retire(host, "died")
            except CoordinatorReplaced:  # at this moment
                self.when_replaced()
        self._let_go(host)

    def _retire(self, host: LiveHost, why: str) -> asyncio.Task[None]:
        """Declare a host dead, and begin to take back everything that it held."""
        account = host.account
        for state in (ACTIVE, DRAINING):
            self._device.set_host_state(account.host, state, DEAD)
        crash_point("host_declared_dead")
        self._ledger.bury(account.host)
        self._directory.forget_host(account.host)
        self._gone_tokens.append(account.incarnation)
        host.retirement = self._loop.create_task(self._take_everything(host, why))
        self._changes.announce()
        return host.retirement

    async def _take_everything(self, host: LiveHost, why: str) -> None:
        """Reclaim a dead host, and free its slot."""
        account = host.account
        began = self._loop.time()
        try:
            async with self._reclaim:
                report = await self._loop.run_in_executor(
                    self._behind, self._device.reclaim_host, account.host
                )
                found = await self._frames.look_for_lost()
            if account.host in self._left_dead:
                await self._predecessor_ended()
            crash_point("host_reclaimed")
            self._device.set_host_state(account.host, DEAD, FREE)
            crash_point("host_forgotten")
        except CoordinatorReplaced:
            self.when_replaced()
        except DmError:
            # The slot stays DEAD, nothing of it is given away. The next coordinator tries again.
            log.exception("%s could not be reclaimed; its slot and frames stay as they are", host)
        else:
            self._ledger.release(account.host)
            del self._hosts[account.host]
            seconds = self._loop.time() - began
            self.nr_reclaims += 1
            self.reclaims.append(
                Reclaim(account.host, account.name, why, seconds, found, dict(report))
            )
            log.info("%s %s: %d frames came back to the pool in %.1f ms",
                     host, why, found, seconds * 1e3)  # fmt: skip
        finally:
            host.retirement = None
            self.when_reclaimed()
            self._lingering.add(host)
            self._let_go(host)
            self._changes.announce()

    async def _predecessor_ended(self) -> None:
        """Wait until a coordinator that was replaced is gone, or this one is replaced itself.

        It may have been stopped in the midst of reclaiming a host. Its next store, before it notices, is to that
        host's tables; so nobody gets these before.
        """
        while (
            self.predecessor is not None
            and self._device.epoch == self.epoch
            and is_alive(*self.predecessor)
        ):
            await asyncio.sleep(PREDECESSOR_SECONDS)

    def _let_go(self, host: LiveHost) -> None:
        """Close a retired host's guard if its process is gone or has let go of it."""
        if host not in self._lingering or (host.process is not None and host.guard is not None):
            return
        self._lingering.discard(host)
        self._forget_process(host)
        host.drop_guard()

    def _forget_process(self, host: LiveHost) -> None:
        if host.process is not None:
            self._loop.remove_reader(host.process.pidfd)
            host.process.close()
            host.process = None

    async def close(self, seconds: float) -> bool:
        """Stop watching, and finish the reclaims under way. False: they do not end in that time."""
        if self._clearing is not None:
            self._clearing.cancel()
        for host in [*self, *self._lingering]:
            if host.process is not None:  # who dies from now on is the next coordinator's
                self._loop.remove_reader(host.process.pidfd)
        retirements = {host.retirement for host in self if host.retirement is not None}
        if retirements:
            _, unfinished = await asyncio.wait(retirements, timeout=seconds)
            if unfinished:
                return False
        for host in [*self, *self._lingering]:
            self._forget_process(host)
            host.drop_guard()
        return True

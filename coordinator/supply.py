"""Grants, and what is done about them when the pool is short.

A host that asks is answered at once if the pool has anything for it. If not: frames may have been
missed, so the device is looked at; other hosts may sit on many free frames, so they are asked for
some; a dead host's frames may be on their way. Then the request waits for a bounded time, and so do
others, each of which looks again whenever frames come.
"""

from __future__ import annotations

import asyncio
import logging

from dmrpc_cxl._native import Device, crash_point
from dmrpc_cxl.errors import OutOfFrames, PeerError, RemoteProtocolError

from .connection import Connection
from .frames import Frames
from .hosts import Asked, Hosts, LiveHost
from .ledger import Ledger, OverQuota, Run
from .messages import Grant, MsgType, Recall
from .waits import Changes

log = logging.getLogger(__name__)


class Supply:
    """The pool, as requests see it."""

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        frames: Frames,
        hosts: Hosts,
        changes: Changes,
        recall_seconds: float,
    ) -> None:
        """Serve these hosts; `changes` is announced whenever frames come back."""
        self.recalls = 0
        self._device = device
        self._ledger = ledger
        self._frames = frames
        self._hosts = hosts
        self._changes = changes
        self._recall_seconds = recall_seconds

    async def grant(self, connection: Connection, host: LiveHost, ask: Grant) -> list[Run]:
        """Give a host up to the frames it wants.

        Raises:
            OutOfFrames: there is nothing to be had.
            OverQuota: the host holds as many frames as it may.
            HostFenced: the host left or died meanwhile.
            PeerError: the connection ended meanwhile; nothing was granted.

        A coordinator that stops waits for nothing: what is raised then is not the last word.
        """
        want, min_run = max(ask.want, ask.min_run), max(ask.min_run, 1)
        if want < 1:
            raise RemoteProtocolError("GRANT asks for no frame")
        try:
            runs = await self._grant(connection, host, want, min_run)
            crash_point("grant_unanswered")
        except OutOfFrames:
            self._ledger.totals.grants_refused += 1
            raise
        missing = want - sum(run.count for run in runs)
        if missing > 0 and not self._ledger.pool.total:
            self._recall(host, missing, 1)  # for the next time
        return runs

    async def _grant(
        self, connection: Connection, host: LiveHost, want: int, min_run: int
    ) -> list[Run]:
        loop = asyncio.get_running_loop()
        deadline = 0.0
        while True:
            if connection.peer_closed():
                # It may have connected anew already and looked for frames of its own: what it were
                # given after that look would be lost to it.
                raise PeerError("the connection ended before the grant")
            account = self._ledger.account(host.account.host, host.account.incarnation)
            try:
                return self._frames.give(account, want, min_run)
            except OverQuota:
                # Frames that others have freed since are not its own any more: ask the words.
                charged = host.account.charged
                host.account.charged = self._device.owned().get(host.account.host, 0)
                if host.account.charged >= charged:
                    raise
                continue
            except OutOfFrames:
                if not deadline:
                    deadline = loop.time() + self._recall_seconds
                    await self._hosts.find_lost_frames()
                    continue  # whether it found some or not: others may have returned some meanwhile
                awaited = (
                    self._recall(host, want, min_run)
                    or self._recall(host, want, min_run, everything=True)
                    or self._hosts.reclaiming
                )
                if not awaited or loop.time() >= deadline or self._changes.over:
                    raise
            await self._changes.next(connection, deadline - loop.time())

    def take_back(self, host: LiveHost, runs: list[Run]) -> None:
        """Take the frames that a RETURN names.

        Raises:
            RemoteProtocolError: they cannot be frames of the device.
        """
        host.owes_answer_until = 0.0
        if runs:
            host.withheld = {False: 0, True: 0}
        else:  # it may be asked again once it has more
            host.withheld[host.asked.everything] = host.asked.free
        self._frames.take_back(host.account, runs)
        crash_point("return_counted")
        self._changes.announce()

    def _recall(
        self, short: LiveHost, want: int, min_run: int, *, everything: bool = False
    ) -> bool:
        """Ask hosts that sit on free frames for `want`; for a long run, for all they have.

        What a host wants to keep ready, its low watermark, is left to it, unless `everything` is asked for. A host that
        does not answer is asked once in `recall_seconds`, one that gave nothing when it has more. Returns whether some
        host has been asked and not answered.
        """
        now = asyncio.get_running_loop().time()
        idle: list[tuple[int, int, LiveHost]] = []
        for host in self._hosts:
            if host is not short and host.account.alive and now >= host.owes_answer_until:
                entry = self._device.host(host.account.host)
                keep = 0 if everything else host.account.watermarks.low
                free = entry["nr_free"] + entry["nr_coming_home"]
                spare = free - max(entry["nr_reserved"], keep)
                if spare > 0 and free > host.withheld[everything]:
                    idle.append((spare, free, host))
        for spare, free, host in sorted(idle, key=lambda found: -found[0]):
            if want <= 0:
                break
            ask = spare if min_run > 1 else min(spare, want)
            keep = 0 if everything else host.account.watermarks.low
            if host.notify(MsgType.NOTIFY_RECALL, Recall(ask, keep)):
                self.recalls += 1
                host.owes_answer_until = now + self._recall_seconds
                host.asked = Asked(everything, free)
                want -= 0 if min_run > 1 else ask
                log.info("asked host %d for %d free frames", host.account.host, ask)
        return any(now < host.owes_answer_until for host in self._hosts if host is not short)

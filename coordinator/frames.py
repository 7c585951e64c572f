"""The ledger's decisions about frames, carried out on the device's frame words.

A frame belongs to whom its word says. A grant changes the words first and is answered afterwards; a
RETURN names frames whose words its host has changed, and they are counted when the words agree. So
an answer or a RETURN that is lost loses no frame: hosts look for words that name them when they
    have lost a connection, and the coordinator looks for
words that name the pool before it says that there is nothing left.

Ledger and words are changed together, in the event loop, without waiting in between: nobody else
    takes frames from
the pool, so a word that names the pool stays as it is until the ledger gives the frame away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

from dmrpc_cxl._native import LAYOUT, Device
from dmrpc_cxl.errors import RemoteProtocolError

from .extents import FrameConflict
from .ledger import HostAccount, Ledger, Run

log = logging.getLogger(__name__)

POOL: int = LAYOUT["OWNER_POOL"]


class Frames:
    """Ledger and device, kept in step."""

    def __init__(self, device: Device, ledger: Ledger, threads: Executor) -> None:
        """Work on a device whose ledger is `ledger`; long looks at it are taken in `threads`."""
        self._device = device
        self._ledger = ledger
        self._threads = threads

    def give(self, account: HostAccount, want: int, min_run: int) -> list[Run]:
        """Make up to `want` frames of the pool a host's.

        Raises:
            OutOfFrames: the pool has no frame, or no run of `min_run`.
            OverQuota: the host holds as many as it may.
        """
        given: list[Run] = []
        while not given:
            for run in self._ledger.grant(account, want, min_run):
                moved = list(self._transfer(run, account.host))
                missed = run.count - sum(part.count for part in moved)
                if missed:
                    self._ledger.lost(account, missed)
                    log.error(
                        "%d of frames %d..%d were not the pool's", missed, run.pfn, run.end - 1
                    )
                given += moved
        return given

    def take_back(self, account: HostAccount, runs: list[Run]) -> None:
        """Count frames into the pool that a RETURN names, if their words say so too.

        A RETURN that is repeated, since its answer was lost, counts nothing the second time.

        Raises:
            RemoteProtocolError: the runs name more frames than the device has, or other ones;
                nothing was counted.
        """
        claimed = sum(run.count for run in runs)
        if claimed > self._ledger.nr_frames:
            raise RemoteProtocolError(f"RETURN names {claimed} frames; the device has fewer")
        try:
            for run in runs:
                self._ledger.pool.missing(*run)
        except FrameConflict as error:
            raise RemoteProtocolError(f"RETURN: {error}") from None
        counted = self._ledger.give_back(account, self._confirmed(runs), claimed)
        if counted < claimed:
            log.info(
                "host %d returned %d frames, %d of which are not the pool's or were counted before",
                account.host, claimed, claimed - counted,
            )  # fmt: skip

    async def look_for_lost(self) -> int:
        """Count frames whose words name the pool and that the ledger lacks. Returns how many.

        Such are the frames of reclaimed hosts, and those of a RETURN that did not arrive.
        """
        loop = asyncio.get_running_loop()
        # The list may be out of date by now: the ledger and the words are asked again.
        candidates = await loop.run_in_executor(self._threads, self._device.free_runs, POOL)
        return self._ledger.found(self._confirmed(Run(*run) for run in candidates))

    def _confirmed(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield the parts of `runs` that are the pool's and that the ledger lacks.

        Each must have been counted before the next is asked for.
        """
        for run in runs:
            for part in self._ledger.pool.missing(*run):
                # From the pool to the pool: changes nothing, but looks at every word.
                yield from self._transfer(part, POOL)

    def _transfer(self, run: Run, owner: int) -> Iterator[Run]:
        """Make the frames of `run` that are the pool's `owner`'s. Yields them."""
        at = run.pfn
        while at < run.end:
            moved = self._device.transfer(at, run.end - at, POOL, owner)
            if moved:
                yield Run(at, moved)
            at += moved + 1  # the frame at which it stopped is somebody else's

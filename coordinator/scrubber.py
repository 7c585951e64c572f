"""The scrubber: accounts for every frame while the fabric works, a slice at a time, and repairs.

Facts, and what they force on us:
  - A look at a fabric at work proves nothing. What native code concludes from several looks, and when
    it is certain, stands in csrc/scrub.h; what it repairs nothing holds.
  - Hosts never wait for a look: it reads. Nor does anybody else: a slice runs in a thread, without
    the GIL, and after each the scrubber sleeps for so long that its share of a CPU stays what was asked for.
  - A crash may leave one frame with a count too many. So the end of a host makes the next look come soon.
  - While frames are taken back no host is admitted and none is reclaimed: who owns a free frame must not
    change at that moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

from dmrpc_cxl._native import Device, Scrub

from .hosts import Hosts

log = logging.getLogger(__name__)

LOOKS = 2  # in a row, before a suspect is looked into
SETTLE_PAUSE = 0.002  # seconds between attempts to find all hosts idle, growing
MAX_SETTLE_PAUSE = 0.05


@dataclass(frozen=True)
class Pace:
    """How eager the scrubber is."""

    interval: float = 10.0
    """Seconds between looks when nothing is suspect; 0: no scrubbing by itself."""
    share: float = 0.01
    """Of one CPU, at most."""
    slice: float = 0.0005
    """Seconds of work at a time."""


@dataclass
class Done:
    """What the scrubber has done since the coordinator started."""

    looks: int = 0
    slices: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    """Of looks, pauses between slices included."""
    undecided: int = 0
    """Times that hosts were at work, and suspects were left for later."""
    repaired: int = 0
    """Frames and Refs."""
    damaged: int = 0
    """Frames that are wrong for certain and cannot be repaired, at the last look."""


class Scrubber:
    """Looks at one device again and again."""

    def __init__(self, device: Device, hosts: Hosts, threads: Executor, pace: Pace) -> None:
        """Begin to look when `run` is called, in the event loop."""
        self.done = Done()
        self.last: dict[str, Any] = {}
        """What the last look counted."""
        self._scrub = Scrub(device)
        self._hosts = hosts
        self._threads = threads
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._looking = asyncio.Lock()
        self._soon = asyncio.Event()
        self._told: set[tuple[int, str]] = set()

    def hurry(self) -> None:
        """Look soon: a host has gone."""
        self._soon.set()

    def as_json(self) -> dict[str, Any]:
        """Return the statistics."""
        return {**asdict(self.done), "interval": self._pace.interval, "last": self.last}

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        if not self._pace.interval:
            return
        while True:
            self._soon.clear()  # who goes from now on may have been looked at already
            wait = self._pace.interval
            async with self._looking:
                await self._look(self._pace.share)
                if self._suspects():
                    await self._look(self._pace.share)
                    if self._suspects(LOOKS) and not await self._settle(repair=True, seconds=0.2):
                        wait = min(wait, 1.0)
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with what it waits for.
            timer = self._loop.call_later(wait, self._soon.set)
            try:
                await self._soon.wait()
            finally:
                timer.cancel()

    async def check(self, *, repair: bool, seconds: float) -> dict[str, Any]:
        """Look now, at full speed, and try for so long to be certain. Returns what `dmrpc fsck` shows."""
        give_up = self._loop.time() + seconds
        async with self._looking:
            await self._look(1.0)
            await self._look(1.0)
            certain = not self._suspects(LOOKS)
            while not certain:
                left = give_up - self._loop.time()
                certain = await self._settle(repair=repair, seconds=max(0.0, min(left, 0.2)))
                if certain or left <= 0:
                    break
                await self._look(1.0)
                certain = not self._suspects(LOOKS)
            return {
                "accounting": self._scrub.accounting,
                "certain": certain,
                "overlooked": self._scrub.nr_overlooked,
                "suspects": self._suspects(LOOKS),
            }

    def _suspects(self, looks: int = 1) -> list[dict[str, Any]]:
        return [found for found in self._scrub.suspects if found["looks"] >= looks]

    async def _in_thread(self, work: Callable[[], bool]) -> bool:
        def timed() -> tuple[bool, float]:
            began = time.thread_time()
            result = work()
            return result, time.thread_time() - began

        result, spent = await self._loop.run_in_executor(self._threads, timed)
        self.done.slices += 1
        self.done.cpu_s += spent
        return result

    async def _look(self, share: float) -> None:
        began = self._loop.time()
        finished = False
        while not finished:
            slice_began = self._loop.time()
            finished = await self._in_thread(lambda: self._scrub.step(self._pace.slice))
            if share < 1:
                # What the slice took, and what asyncio and the threads took around it.
                took = self._loop.time() - slice_began
                await asyncio.sleep(took / share - took)
        self.done.looks += 1
        self.done.wall_s += self._loop.time() - began
        self.last = self._scrub.accounting

    async def _settle(self, *, repair: bool, seconds: float) -> bool:
        """Try for so long to be certain of the suspects. False: hosts were at work all the time."""
        give_up = self._loop.time() + seconds
        pause = SETTLE_PAUSE
        while True:
            async with self._hosts.unchanging():
                quiet = await self._in_thread(lambda: self._scrub.settle(LOOKS, repair))
            if quiet:
                break
            if self._loop.time() >= give_up:
                self.done.undecided += 1
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_SETTLE_PAUSE)
        certain = [found for found in self._suspects(LOOKS) if found["certain"]]
        repaired = sum(found["repaired"] for found in certain)
        self.done.repaired += repaired
        self.done.damaged = len(certain) - repaired
        for found in certain:
            self._tell(found)
        if repaired:
            await self._hosts.find_lost_frames()
        return True

    def _tell(self, found: dict[str, Any]) -> None:
        if found["kind"] == "orphan Ref":
            log.warning(
                "Ref entry %d is held by host %d, which is not attached%s",
                found["ref"], found["owner"], "; freed" if found["repaired"] else "",
            )  # fmt: skip
            return
        about = (found["pfn"], found["kind"])
        if found["repaired"]:
            self._told.discard(about)
        elif about in self._told:
            return
        else:
            self._told.add(about)
        log.warning(
            "frame %d is %s: refcount %d, held %d times, owner %d%s",
            found["pfn"], found["kind"], found["refcount"], found["expected"], found["owner"],
            "; repaired" if found["repaired"] else "",
        )  # fmt: skip

"""Rounds: hosts at work while processes are killed and stopped, then rest, comparison and account."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dmrpc_cxl.fabric import device as devices

from . import verdict
from .coordinators import Coordinators
from .holdings import Violation
from .loop import SECONDS, Loop
from .plan import SLOTS, chance
from .slots import Slots

GEOMETRY = {"size": 32 << 20, "max_hosts": 24, "max_refs": 4096}
KILL_SECONDS = 0.6  # between kills by the driver, on average; hosts kill themselves as well
STOP_SECONDS = 0.5
COORDINATOR_SECONDS = 0.8
SCRUB = (("--scrub-interval", "0"), ("--scrub-interval", "0.02", "--scrub-share", "0.2"))


class Campaign:
    """One fabric, and round after round on it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dmrpc-soak-"))
        self.name = f"dmrpc-soak-{os.getpid()}"
        devices.create(self.name, **GEOMETRY)
        self.device = devices.open(self.name)
        self.loop = Loop()
        self.coordinators = Coordinators(self.loop, self.name, self.folder)
        self.slots = Slots(self.loop, self.device, self.name, self.folder)
        self.acts: Counter[str] = Counter()
        self.left_behind = 0
        self._logs = {"coordinator.log": 0, "hosts.log": 0}

    # ---------------------------------------------------------------- a round

    def round(self, seed: int, kills: int) -> None:
        """Work until so many hosts more have been killed, then compare everything.

        Raises:
            Violation: what must never happen has happened.
        """
        rng = chance(seed, "driver")
        slots, loop = self.slots, self.loop
        scrubbed = rng.randrange(2)
        self._restart_coordinator(SCRUB[scrubbed])
        before = slots.kills
        slots.begin(seed)
        under_way = True

        def again_and_again(
            seconds: float, what: Callable[[random.Random], None], own: random.Random
        ) -> None:
            if under_way:
                what(own)
                loop.after(
                    own.expovariate(1 / seconds), lambda: again_and_again(seconds, what, own)
                )

        for seconds, what in (
            (KILL_SECONDS, slots.kill),
            (STOP_SECONDS, slots.stop),
            (COORDINATOR_SECONDS, self.coordinators.disturb),
        ):
            own = random.Random(rng.random())
            loop.after(
                own.expovariate(1 / seconds),
                lambda s=seconds, w=what, o=own: again_and_again(s, w, o),  # type: ignore[misc]
            )
        give_up = time.monotonic() + SECONDS + 2 * kills
        while slots.kills < before + kills:
            loop.turn()
            if time.monotonic() > give_up:
                raise Violation(f"{slots.kills - before} kills in {SECONDS + 2 * kills:.0f} s")
        under_way = False
        self._compare(slots.kills - before, let_go=rng.random() < 0.5)

    def _restart_coordinator(self, options: tuple[str, ...]) -> None:
        coordinators = self.coordinators
        coordinators.options = ("--log-level", "info", "--tcp", "127.0.0.1:0", *options)
        if coordinators.current is not None:
            coordinators.stop(coordinators.start)
        else:
            coordinators.start()
        self.loop.until(lambda: coordinators.ready, "the coordinator serves")

    def _compare(self, crashes: int, *, let_go: bool) -> None:
        slots, loop, device = self.slots, self.loop, self.device
        crashes += 1  # the coordinators'
        loop.until(
            lambda: self.coordinators.ready and not self.coordinators.busy, "the coordinator serves"
        )
        slots.rest()
        loop.until(
            lambda: verdict.nr_active(device) == SLOTS, "nothing is left of dead hosts", 0.005
        )
        slots.ask("settle", False)
        slots.ask("settle", True)
        self._read_reports()
        self.left_behind += verdict.account(device, crashes)
        self._check_coordinator()
        if let_go:
            slots.ask("let go")
            loop.until(lambda: not device.audit()["live_refs"], "every Ref is dropped", 0.005)
            verdict.assert_all_free(device)
        for name, bad in (("coordinator.log", "ERROR|Traceback"), ("hosts.log", ".")):
            self._logs[name] = verdict.read_log(self.folder / name, self._logs[name], bad)

    def _read_reports(self) -> None:
        """Compare what hosts say they hold with what the device says; replies under way may have to settle."""
        give_up = time.monotonic() + SECONDS / 4
        while True:
            wrong = []
            for place, report in zip(self.slots.places, self.slots.ask("report"), strict=True):
                self.acts += report["tally"]
                for slot, life in report["senders lost"]:
                    if self.slots.places[slot].life == life:
                        raise Violation(
                            f"slot {place.slot}: a Ref of slot {slot}, life {life}, was gone, but its sender lives"
                        )
                for slot, disturbed in report["servers lost"]:
                    if self.slots.board.disturbed(slot) == disturbed:
                        raise Violation(
                            f"slot {place.slot} lost its connection to slot {slot}, to which nothing was done"
                        )
                found = verdict.held_by(self.device, place.host)
                if found != (report["entries"], report["pages"]):
                    wrong.append(
                        (place.slot, place.host, found, report["entries"], report["pages"])
                    )
            if not wrong:
                return
            if time.monotonic() > give_up:
                raise Violation(f"slot, host, found (entries, pages), should be: {wrong}")
            self.loop.turn(0.01)

    def _check_coordinator(self) -> None:
        """Its descriptors are those of its hosts, and no more for each that has died."""
        assert self.coordinators.current is not None
        pid = self.coordinators.current.pid
        self.loop.until(
            lambda: sum(verdict.descriptors(pid).values()) < 40 + 8 * SLOTS,
            f"the coordinator closes what belongs to the dead: {verdict.descriptors(pid)}",
        )

    # ---------------------------------------------------------------- the end

    def finish(self) -> None:
        """Have everybody leave; every frame must be in the pool."""
        self.slots.leave()
        self.loop.until(lambda: not self.device.hosts(), "every host entry is free", 0.005)
        audit = self.device.audit()
        if audit["pool"] != audit["nr_frames"]:
            raise Violation(f"all hosts have left, but {audit}")
        done: list[bool] = []
        self.coordinators.stop(lambda: done.append(True))
        self.loop.until(lambda: done, "the coordinator stops")

    def show_logs(self) -> None:
        """Print the ends of the logs."""
        for name in self._logs:
            path = self.folder / name
            if path.exists():
                print(f"---- the end of {name}")
                print(path.read_text(errors="replace")[-6000:])

    def remove(self, *, keep: bool) -> None:
        """End whatever is left, and remove device and folder."""
        for child in (
            *(place.child for place in self.slots.places if place.life >= 0),
            *self.coordinators.all_children(),
        ):
            with contextlib.suppress(ProcessLookupError, OSError):
                child.send(signal.SIGKILL)
                child.wait()
        self.device.close()
        if keep:
            print(f"kept: {devices.path_of(self.name)} and {self.folder}", file=sys.stderr)
            return
        with contextlib.suppress(FileNotFoundError):
            devices.remove(self.name, force=True)
        shutil.rmtree(self.folder, ignore_errors=True)

"""A fabric on which one process after the other dies, and what must hold after each death.

`Stage` is a small device with a coordinator that does not scrub by itself, and the keeper (keeper.py). Whoever kills says
so with `deaths`; at the end of that block
  - everything dead has been reclaimed;
  - of every frame the count is what mappings and Refs add up to, but for one count too many for each death;
  - when the scrubber has run, there is none of these left;
  - every frame is in the pool, free at a host that knows of it, or in use; the coordinator's books say the same;
  - what the keeper holds has not changed, and nothing else is left.
A stage stands until a test fails on it.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.fabric import device as devices
from tests.crash import keeper
from tests.crash.processes import Host, NurseryFabric
from tests.standing import end, until

FRAMES = 512
COORDINATOR = ("--scrub-interval", "0", "--batch", "16", "--batch-max", "64", "--low", "0", "--high", "64",
               "--recall-timeout", "0.2", "--tcp", "127.0.0.1:0")  # fmt: skip
SMALL = {"size": FRAMES * keeper.PAGE, "max_hosts": 8, "max_refs": 64, "coordinator": COORDINATOR}
COUNT = re.compile(r"refcount of frame \d+ is (\d+), but mappings and Refs hold (\d+)")


class Stage:
    """See the head of this file."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dmrpc-crash-")
        self.folder = Path(self._folder.name)
        self.fabric = NurseryFabric(self.folder, **SMALL)
        self.record = self.fabric.record
        self.leaked = 0
        """Counts too many that the last death left."""
        try:
            self.keeper = self.fabric.host(name="keeper", deadline=30.0)
            self.keeper.call(keeper.settle_in)
            self._baseline = self._holdings(self.fabric.assert_sound())
        except BaseException:
            self.discard()
            raise

    @property
    def name(self) -> str:
        return self.fabric.name

    @staticmethod
    def _holdings(audit: dict[str, Any]) -> dict[str, int]:
        what = ("in_use", "live_refs", "mapped_pages", "ref_pages", "hole_pages", "overflow_frames")
        return {name: audit[name] for name in what}

    @contextlib.contextmanager
    def deaths(self, number: int = 1) -> Iterator[None]:
        """Let so many processes die in the block, and check that nothing was lost."""
        yield
        self.wait_until_reclaimed()
        self._expect_leaks_at_most(number)
        self._scrub()
        self._settle()

    def wait_until_reclaimed(self) -> None:
        """Wait until no host is left but those that live."""
        living = {host.id for host in self.fabric.hosts if not host.left}
        until(lambda: {entry["host"] for entry in self.fabric.host_states()} == living)

    def wait_until_gone(self, host: Host) -> None:
        """Wait until nothing is left of a host that has left or died."""
        until(lambda: all(entry["host"] != host.id for entry in self.fabric.host_states()))

    def _audit_at_rest(self) -> dict[str, Any]:
        """Return what is there when nobody changes anything: those who survive may be letting go of something."""
        seen: list[dict[str, Any]] = [self.fabric.audit()]

        def the_same_again() -> bool:
            seen.append(self.fabric.audit())
            return seen[-1]["in_flight"] == 0 and seen[-1] == seen[-2]

        until(the_same_again)
        return seen[-1]

    def _expect_leaks_at_most(self, number: int) -> None:
        audit = self._audit_at_rest()
        leaked = 0
        for _, said in audit["violations"]:
            counts = COUNT.match(said)
            assert counts, f"only counts may be wrong: {said}"
            too_many = int(counts[1]) - int(counts[2])
            assert too_many > 0, f"a count too few: {said}"
            leaked += too_many
        assert leaked <= number, audit["violations"]
        assert audit["nr_violations"] <= number
        assert audit["in_flight"] == 0, audit
        self.leaked = leaked

    def _scrub(self) -> None:
        with self.client() as client:
            found = client.check(repair=True, timeout=30.0)
        assert found["certain"], found
        self.fabric.assert_sound()

    def _settle(self) -> None:
        complaints = self.keeper.call(keeper.unharmed)
        assert not complaints, f"changed: {', '.join(complaints)}"
        self.keeper.call(keeper.works)
        audit = self.fabric.assert_sound()
        assert self._holdings(audit) == self._baseline
        if not self._books_agree():
            # What was handed over without a hint is found when nothing else is to be had.
            self.keeper.call(keeper.hold_all_but_fragments, 0)
            self.keeper.call(keeper.let_go)
            until(self._books_agree)

    def _books_agree(self) -> bool:
        """Does every host know its free frames, and the coordinator the pool? They may just be told."""
        audit = self.fabric.assert_sound()
        for entry in self.fabric.host_states():
            host = entry["host"]
            taken_in = audit["free"].get(host, 0) - audit["coming_home"].get(host, 0)
            if entry["nr_free"] != taken_in:
                return False
        with self.client() as client:
            return bool(client.stats()["pool"]["free"] == audit["pool"])

    def client(self) -> Client:
        return self.fabric.client(timeout=30.0)

    def guarded(self) -> None:
        """Wait until the coordinator keeps the userfaultfd of every host: what is under way is over then."""
        with devices.open(self.name) as device:
            pid = device.superblock["coordinator_pid"]
        living = sum(not host.left for host in self.fabric.hosts)

        def kept() -> int:
            folder = Path(f"/proc/{pid}/fd")
            return sum(
                "userfaultfd" in str(link.readlink())
                for link in folder.iterdir()
                if link.is_symlink()
            )

        until(lambda: kept() >= living)

    def restart_coordinator(self) -> None:
        """Start the next coordinator; the one before is dead."""
        self.fabric.start_coordinator()

    def discard(self) -> None:
        """Remove everything, whatever it does."""
        end(self.fabric)
        self._folder.cleanup()

    def close(self) -> None:
        """Let the keeper leave, and check that all is free."""
        try:
            self.fabric.close()
        finally:
            self._folder.cleanup()


class Stages:
    """One stage for many tests; a new one after a failure."""

    def __init__(self) -> None:
        self._stage: Stage | None = None

    @contextlib.contextmanager
    def use(self, failed: Callable[[], bool] = lambda: False) -> Iterator[Stage]:
        """Give the stage; `failed` tells of failures that are not raised here, such as a fixture's test's."""
        if self._stage is None:
            self._stage = Stage()
        stage = self._stage
        stage.record.clear()
        stage.keeper.call(keeper.forget_given)
        broken = True
        try:
            yield stage
            broken = failed()
            stage.fabric.hosts[:] = [host for host in stage.fabric.hosts if not host.left]
        finally:
            if broken:
                self._stage = None
                print(stage.fabric.said())
                stage.discard()

    def close(self) -> None:
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.close()

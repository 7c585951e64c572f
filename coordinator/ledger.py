"""The coordinator's books: which frames are in the pool, which hosts there are, what each was
granted.

Pure: no device, no sockets, no clock. The frame words of the device are the truth about ownership;
    the ledger holds
what it takes to choose frames and slots quickly, and all of it can be built again from the device.

Life of a host slot::

    free --open--> live --bury--> dead --release--> free
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dmrpc_cxl._native import WIRE
from dmrpc_cxl.errors import HostFenced, NoHostSlot, OutOfFrames, OverQuota

from .extents import Extents, FrameConflict, Run

__all__ = [
    "Extents",
    "FrameConflict",
    "HostAccount",
    "Ledger",
    "NoHostSlot",
    "OverQuota",
    "Policy",
    "Run",
    "Watermarks",
]

MAX_GRANT_RUNS: int = WIRE["max_runs"]
"""Most runs in one grant."""


@dataclass(frozen=True)
class Policy:
    """What hosts get that do not ask for anything else, in frames."""

    batch: int = 256
    low: int = 64
    high: int = 1024
    batch_max: int = 8192
    frame_limit: int = 0
    """Most frames that one host may hold; 0: no limit."""


@dataclass(frozen=True)
class Watermarks:
    """What one host is told when it registers, in frames."""

    low: int
    """With fewer free frames, ask for a batch."""
    high: int
    """With more free frames, give some back."""
    batch: int
    batch_max: int
    frame_limit: int


@dataclass
class HostAccount:
    """One host slot that is not free."""

    host: int
    incarnation: int
    name: str
    watermarks: Watermarks
    alive: bool = True
    granted: int = 0
    """Since this coordinator has known the host; the next three as well."""
    returned: int = 0
    grants: int = 0
    returns: int = 0
    charged: int = 0
    """Frames that count against the host's limit: granted to it, less what it returned. Frames that
    travel to other hosts inside Refs stay on the account of the host that asked for them."""


@dataclass
class Totals:
    """What has happened since the coordinator started."""

    grants: int = 0
    frames_granted: int = 0
    grants_refused: int = 0
    returns: int = 0
    frames_returned: int = 0
    frames_not_counted: int = 0
    """Frames of RETURN messages that were not the pool's, or were counted before."""
    frames_found: int = 0
    """Frames that came without a RETURN: of dead hosts, or of a RETURN that was lost."""
    frames_lost: int = 0
    """Frames of the pool whose word turned out to say otherwise."""


@dataclass
class Ledger:
    """Pool, hosts and statistics of one fabric."""

    nr_frames: int
    max_hosts: int
    pool: Extents
    policy: Policy = field(default_factory=Policy)
    totals: Totals = field(default_factory=Totals)
    hosts: dict[int, HostAccount] = field(default_factory=dict)

    @classmethod
    def from_device(
        cls,
        nr_frames: int,
        max_hosts: int,
        pool: Iterable[tuple[int, int]],
        policy: Policy | None = None,
    ) -> Ledger:
        """Build the books of a device with this pool; hosts are readmitted afterwards."""
        return cls(nr_frames, max_hosts, Extents(nr_frames, pool), policy or Policy())

    # ---------------------------------------------------------------- hosts

    def negotiate(self, low: int = 0, high: int = 0, batch: int = 0) -> Watermarks:
        """Turn a host's wishes (0: none) into watermarks that leave something for the others.

        A host's fair share of idle frames is an eighth of the device, less when many hosts are
        live: all of them together sit on about half of the device at most.
        """
        live = 1 + sum(account.alive for account in self.hosts.values())
        share = max(1, self.nr_frames // max(8, 2 * live))
        high = min(high or self.policy.high, share)
        batch = min(batch or self.policy.batch, high)
        low = min(low or self.policy.low, high // 2)
        batch_max = max(batch, min(self.policy.batch_max, share))
        return Watermarks(low, high, batch, batch_max, self.policy.frame_limit)

    def open(self, incarnation: int, name: str, marks: Watermarks) -> HostAccount:
        """Take the lowest free slot for a new host.

        Raises:
            NoHostSlot: all are taken.
        """
        for slot in range(1, self.max_hosts + 1):
            if slot not in self.hosts:
                account = self.hosts[slot] = HostAccount(slot, incarnation, name, marks)
                return account
        raise NoHostSlot(f"all {self.max_hosts} host slots of the device are taken")

    def readmit(
        self, host: int, incarnation: int, name: str, alive: bool, owned: int
    ) -> HostAccount:
        """Enter a host that an earlier coordinator left in the device, and whose `owned` frames are."""
        account = HostAccount(host, incarnation, name, self.negotiate(), alive, charged=owned)
        self.hosts[host] = account
        return account

    def reserve(self, host: int) -> None:
        """Give a free slot to nobody until `release`."""
        self.hosts[host] = HostAccount(host, 0, "", self.negotiate(), alive=False)

    def account(self, host: int, incarnation: int) -> HostAccount:
        """Return the account of a live host.

        Raises:
            HostFenced: the slot is free, dead, or another incarnation's.
        """
        account = self.hosts.get(host)
        if account is None or not account.alive or account.incarnation != incarnation:
            raise HostFenced(f"host {host} of that incarnation has left or was declared dead")
        return account

    def bury(self, host: int) -> None:
        """Mark a host dead: it gets nothing any more, its slot stays taken until `release`."""
        self.hosts[host].alive = False

    def release(self, host: int) -> None:
        """Free the slot of a dead host."""
        del self.hosts[host]

    # ---------------------------------------------------------------- frames

    def grant(self, account: HostAccount, want: int, min_run: int = 1) -> list[Run]:
        """Take up to `want` frames out of the pool for a host.

        Raises:
            OutOfFrames: the pool has no frame, or no run of `min_run` frames.
            OverQuota: the host holds as many as it may.
        """
        limit = account.watermarks.frame_limit
        if limit:
            want = min(want, limit - account.charged)
            if want < max(min_run, 1):
                raise OverQuota(f"host {account.host} may hold {limit} frames at most")
        runs = self.pool.take(want, min_run, MAX_GRANT_RUNS)
        if not runs:
            raise OutOfFrames(
                f"the pool has {self.pool.total} of {self.nr_frames} frames, "
                f"the longest run {self.pool.longest}; {max(min_run, 1)} in a row were asked for"
            )
        frames = sum(run.count for run in runs)
        account.grants += 1
        account.granted += frames
        account.charged += frames
        self.totals.grants += 1
        self.totals.frames_granted += frames
        return runs

    def give_back(self, account: HostAccount, runs: Iterable[Run], claimed: int) -> int:
        """Put the confirmed runs of a RETURN of `claimed` frames into the pool; return how many.

        Raises:
            FrameConflict: one of the frames is in the pool already; the runs before it were put in.
        """
        account.returns += 1
        self.totals.returns += 1
        counted = 0
        for run in runs:
            self.pool.add(*run)
            counted += run.count
            account.returned += run.count
            account.charged = max(0, account.charged - run.count)
            self.totals.frames_returned += run.count
        self.totals.frames_not_counted += claimed - counted
        return counted

    def found(self, runs: Iterable[Run]) -> int:
        """Put runs into the pool that came without a RETURN; return how many frames."""
        frames = 0
        for run in runs:
            self.pool.add(*run)
            frames += run.count
        self.totals.frames_found += frames
        return frames

    def lost(self, account: HostAccount, frames: int) -> None:
        """Take note that so many frames of a grant turned out not to be the pool's."""
        account.granted -= frames
        account.charged -= frames
        self.totals.frames_granted -= frames
        self.totals.frames_lost += frames

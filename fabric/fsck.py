"""Accounting for every frame of a device, live or dead, and repairing what can be repaired.

Who looks depends on who is there:

==========================  =============================================================================
a coordinator serves        without repair we look ourselves, as anybody may; a repair is the coordinator's
nobody serves               we hold its lock meanwhile, so that none starts, and do what it would do
nobody lives at all         then what is left of hosts and Refs is unreachable, and all of it goes
==========================  =============================================================================

What is in flight while we look is not damage. csrc/scrub.h says how it is told: a suspect has to be found in two looks
in a row with the same word, and then counted once more while no host is inside an operation. What cannot be
made certain in the time given is reported as undecided.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dmrpc_cxl._native import LAYOUT, Device, Scrub
from dmrpc_cxl.coordinator.client import Client

from . import device as devices
from .liveness import is_alive

CLEAN, REPAIRED, DAMAGED, UNDECIDED, FAILED = 0, 1, 2, 3, 8

INTENTS = {
    LAYOUT[f"INTENT_{name}"]: text
    for name, text in (
        ("ALLOC", "allocating"),
        ("FREE_X", "freeing"),
        ("SHARE", "making a Ref"),
        ("MOVE", "moving a buffer into a Ref"),
        ("MAP", "mapping a Ref"),
        ("CLONE", "cloning a Ref"),
        ("DROP", "dropping a Ref"),
        ("COW", "copying on write"),
        ("FILL", "filling holes"),
        ("RETURN", "returning frames"),
    )
}
_FREE, _ACTIVE, _DEAD = LAYOUT["HOST_FREE"], LAYOUT["HOST_ACTIVE"], LAYOUT["HOST_DEAD"]
_LOOKS = 2
_SLICE = 1.0
_PAUSE = 0.005


@dataclass
class Findings:
    """What `check` has found; plain values, fit for JSON."""

    name: str
    nr_frames: int
    coordinator: int = 0
    """Its pid; 0: nobody serves."""
    hosts: list[dict[str, Any]] = field(default_factory=list)
    """host, name, pid, alive, free, mapped (pages), refs (held), doing."""
    accounting: dict[str, Any] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status that says the worst of it."""
        if self.damage:
            return DAMAGED
        if self.undecided:
            return UNDECIDED
        return REPAIRED if self.repaired else CLEAN


def _serving(device: Device) -> int:
    """Return the pid of the coordinator; 0 when none runs."""
    pid: int = device.superblock["coordinator_pid"]
    return pid if is_alive(pid, device.superblock["coordinator_start_time"]) else 0


@contextmanager
def _sole_manager(device: Device) -> Iterator[bool]:
    """Hold the lock of the coordinator for a while; False when somebody else does."""
    try:
        fcntl.flock(device.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield not _serving(device)
    finally:
        fcntl.flock(device.fileno(), fcntl.LOCK_UN)


def check(name: str, *, repair: bool = False, seconds: float = 2.0) -> Findings:
    """Account for every frame, and with `repair` take back what nothing holds.

    Args:
        name: of the fabric.
        repair: reclaim leaks; never what something still holds.
        seconds: to try to be certain of what is suspect while hosts are at work.

    Raises:
        DeviceNotFound, NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: there is nothing to check.
        CoordinatorLost, DeadlineExceeded: the coordinator that would have to repair does not answer.
    """
    # Only a device that was opened to be written can be locked and repaired.
    with devices.open(name, writable=repair) as device:
        found = Findings(name, device.superblock["nr_frames"])
        if not repair:
            found.coordinator = _serving(device)
            _look(device, found, repair=False, seconds=seconds)
        else:
            with _sole_manager(device) as alone:
                if alone:
                    _clear_the_dead(device, found)
                    _look(device, found, repair=True, seconds=seconds)
                else:
                    found.coordinator = _serving(device)
                    with Client.of(device) as client:
                        _take_in(device, found, client.check(repair=True, timeout=seconds))
        _describe_hosts(device, found)
        _check_services(device, found, repair=repair and not found.coordinator)
    return found


def _clear_the_dead(device: Device, found: Findings) -> None:
    """Reclaim what dead hosts held; when nobody is left, what no host holds as well."""
    for host in device.hosts():
        if host["state"] == _ACTIVE and is_alive(host["pid"], host["start_time"]):
            continue
        slot = host["host"]
        device.set_host_state(slot, _ACTIVE, _DEAD)
        done = device.reclaim_host(slot)
        device.set_host_state(slot, _DEAD, _FREE)
        was = INTENTS.get(done["intent"], "")
        found.repaired.append(
            f"host {slot} {host['name']!r} (pid {host['pid']}) was dead"
            + (f", killed while {was}" if was else "")
            + f": {done['frames_reclaimed']} frames taken back"
        )
    if not device.hosts():
        forgotten = device.forget_refs()
        if forgotten:
            found.repaired.append(f"{forgotten} Refs that nobody can use any more were freed")


def _look(device: Device, found: Findings, *, repair: bool, seconds: float) -> None:
    scrub = Scrub(device)
    give_up = time.monotonic() + seconds
    certain = False
    while not certain:
        while not scrub.step(_SLICE):
            pass
        if scrub.looks < _LOOKS:
            continue
        suspects = [one for one in scrub.suspects if one["looks"] >= _LOOKS]
        certain = not suspects or scrub.settle(_LOOKS, repair)
        if time.monotonic() >= give_up:
            break
        if not certain:
            time.sleep(_PAUSE)
    _take_in(
        device,
        found,
        {
            "accounting": scrub.accounting,
            "certain": certain,
            "overlooked": scrub.nr_overlooked,
            "suspects": [one for one in scrub.suspects if one["looks"] >= _LOOKS],
        },
    )


def _take_in(device: Device, found: Findings, result: dict[str, Any]) -> None:
    """Turn what a look found into sentences."""
    found.accounting = result["accounting"]
    holdings = device.holdings() if result["suspects"] else ([], [])
    for one in result["suspects"]:
        text = describe(one, *holdings)
        if not result["certain"]:
            found.undecided.append(text)
        elif one["repaired"]:
            found.repaired.append(text)
        elif one["certain"]:
            found.damage.append(text)
    if result["overlooked"]:
        found.damage.append(f"{result['overlooked']} more frames are suspect: run it again")
    if found.accounting["bad_entries"]:
        more = found.accounting["bad_entries"] - 1
        found.damage.append(
            f"{found.accounting['bad_entry']} makes no sense"
            + (f", and {more} more" if more else "")
        )


def holders(
    pfn: int, mapped: list[tuple[int, int, int, int]], held: list[tuple[int, int, int, int]]
) -> list[str]:
    """Say who maps a frame and which Refs hold it, from Device.holdings()."""
    texts = [
        f"host {host} at page {page + pfn - first}"
        for host, page, first, count in mapped
        if first <= pfn < first + count
    ]
    texts += [
        f"Ref {entry} of host {holder}"
        for entry, holder, first, count in held
        if first <= pfn < first + count
    ]
    return texts


def describe(
    one: dict[str, Any],
    mapped: list[tuple[int, int, int, int]],
    held: list[tuple[int, int, int, int]],
) -> str:
    """Say what is wrong with a Ref or a frame, who holds it, and since which operation if an intent record tells."""
    kind = one["kind"]
    if kind == "orphan Ref":
        return f"Ref entry {one['ref']} is held by host {one['owner']}, which is not attached"
    pfn = one["pfn"]
    if kind in ("orphan", "bad owner"):
        text = f"frame {pfn} is free and owned by host {one['owner']}, which is not attached"
    else:
        who = ", ".join(holders(pfn, mapped, held)) or "nobody"
        text = f"frame {pfn} has refcount {one['refcount']}, and is held {one['expected']} times, by {who}"
    if one["host"]:
        text += f"; host {one['host']} was {INTENTS.get(one['op'], 'at it')} there"
    return text


def _describe_hosts(device: Device, found: Findings) -> None:
    mapped, held = device.holdings()
    for host in device.hosts():
        slot = host["host"]
        alive = is_alive(host["pid"], host["start_time"])
        found.hosts.append(
            {
                "host": slot,
                "name": host["name"],
                "pid": host["pid"],
                "alive": alive,
                "free": host["nr_free"],
                "mapped": sum(run[3] for run in mapped if run[0] == slot),
                "refs": len({run[0] for run in held if run[1] == slot}),
                "doing": INTENTS.get(host["intent"]["op"], ""),
            }
        )
        if not alive and not found.coordinator:
            found.damage.append(
                f"host {slot} {host['name']!r} (pid {host['pid']}) is dead and not reclaimed: "
                f"start a coordinator, or repair"
            )


def _check_services(device: Device, found: Findings, *, repair: bool) -> None:
    known = {(host["host"], host["incarnation"]) for host in device.hosts()}
    for entry in device.services():
        stale = (entry["host"], entry["incarnation"]) not in known
        if not entry["damaged"] and not stale:
            continue
        name = entry["name"].decode(errors="replace")
        text = (
            f"entry {entry['slot']} of the service table makes no sense"
            if entry["damaged"]
            else f"service {name!r} is of host {entry['host']}, which is gone"
        )
        if repair:
            device.withdraw(entry["slot"], entry["serial"])
            found.repaired.append(text)
        elif entry["damaged"] or not found.coordinator:
            found.damage.append(text)

"""The comparison of a fabric at rest with what its hosts hold, and an exact account of every frame."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from dmrpc_cxl._native import LAYOUT, Device
from dmrpc_cxl.coordinator.client import Client

from .holdings import Violation

HEAD: int = LAYOUT["PTE_HEAD"]
FREE, ACTIVE = LAYOUT["HOST_FREE"], LAYOUT["HOST_ACTIVE"]
LIVE: int = LAYOUT["REF_LIVE"]
HARMLESS = re.compile("has taken over")  # of the errors in a coordinator's log


def nr_active(device: Device) -> int:
    """Return the number of hosts; 0 while some are being reclaimed."""
    states = [host["state"] for host in device.hosts()]
    return len(states) if all(state == ACTIVE for state in states) else 0


def held_by(device: Device, host: int) -> tuple[int, int]:
    """Return how many mappings and Refs a host has, and how many pages they cover."""
    superblock = device.superblock
    nr_ptes = superblock["ptes_per_host"]
    start = superblock["page_table_off"] + 4 * nr_ptes * (host - 1)
    ptes = np.frombuffer(os.pread(device.fileno(), 4 * nr_ptes, start), "<u4")
    refs = [ref for ref in device.refs() if ref["holder"] == host]
    odd = [ref for ref in refs if ref["state"] != LIVE]
    if odd:
        raise Violation(f"Refs of host {host}, at rest, in transition: {odd}")
    entries = int(np.count_nonzero(ptes & HEAD)) + len(refs)
    return entries, int(np.count_nonzero(ptes)) + sum(ref["nr_pages"] for ref in refs)


def account(device: Device, crashes: int) -> int:
    """Account for every frame, and repair; return how many frames crashes have left behind.

    Raises:
        Violation: frames with a count too few or of no host, or more left behind than processes have crashed.
    """
    with Client.of(device) as client:
        found = client.check(repair=False, timeout=30)
        if not found["certain"]:
            raise Violation(f"hosts rest, and nothing is certain: {found}")
        wrong = [suspect for suspect in found["suspects"] if suspect["kind"] != "leaked"]
        leaked = sum(s["refcount"] - s["expected"] for s in found["suspects"])
        if wrong or leaked > crashes or found["overlooked"]:
            raise Violation(f"{leaked} counts too many after {crashes} crashes; {wrong or found}")
        client.check(repair=True, timeout=30)
        damaged = client.stats()["scrubber"]["damaged"]
    audit = device.audit()
    if audit["nr_violations"] or damaged:
        raise Violation(f"after the repair, {damaged} damaged: {audit['violations']}")
    return int(leaked)


def assert_all_free(device: Device) -> None:
    """Assert that nothing is held, and every frame in the pool or free at a host."""
    audit = device.audit()
    free = audit["pool"] + sum(audit["free"].values())
    if audit["in_use"] or audit["live_refs"] or free != audit["nr_frames"]:
        raise Violation(f"everything was let go, but {audit}")


def read_log(path: Path, begin: int, bad: str) -> int:
    """Return the size of a log; no line since `begin` may hold what is bad."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read()
    lines = data.decode(errors="replace").splitlines()
    for number, line in enumerate(lines):
        if re.search(bad, line) and not HARMLESS.search(line):
            raise Violation("\n".join([f"{path}:", *lines[number : number + 40]]))
    return begin + len(data)


def descriptors(pid: int) -> Counter[str]:
    """Return what a process has open, by kind."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            kinds[re.sub(r"[\[:].*", "", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
        except FileNotFoundError:
            continue
    return kinds

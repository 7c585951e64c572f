"""``dmrpc doctor``: can DmRPC work on this machine, and if not, what is to be done?

A check fails when something cannot work, and warns when it will work badly or only up to a size.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import click

Verdict = Literal["ok", "warning", "failed"]

SHM = "/dev/shm"
MIN_KERNEL = (5, 19)  # userfaultfd write-protects shared memory
GOOD_KERNEL = (6, 4)  # also pages that were never touched
MIN_MAP_COUNT = 65530  # the kernel's default
MIN_SHM_BYTES = 320 << 20  # a device of the default size


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_python() -> Check:
    """Check the interpreter and the machine it was built for."""
    found = f"Python {platform.python_version()}, {platform.machine()}, {sys.byteorder}-endian"
    if not sys.platform.startswith("linux") or sys.byteorder != "little" or sys.maxsize < 2**32:
        return Check("machine", "failed", found, "DmRPC needs 64-bit little-endian Linux")
    return Check("machine", "ok", found)


def kernel_version(release: str) -> tuple[int, int]:
    """Return the first two numbers of a kernel release such as 6.1.0-13-amd64; zeros if it has none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_kernel() -> Check:
    """Check the kernel's version."""
    release = platform.release()
    if kernel_version(release) < MIN_KERNEL:
        return Check(
            "kernel",
            "failed",
            release,
            "userfaultfd can write-protect shared memory from Linux 5.19 on",
        )
    if kernel_version(release) < GOOD_KERNEL:
        return Check(
            "kernel",
            "warning",
            release,
            "before Linux 6.4, reading a page that was never written takes a frame for it",
        )
    return Check("kernel", "ok", release)


def check_userfaultfd() -> Check:
    """Check that a userfaultfd may be opened, with all powers, and write-protects shared memory."""
    import pyuserfaultfd

    needed = {
        pyuserfaultfd.Feature.PAGEFAULT_FLAG_WP: "failed",
        pyuserfaultfd.Feature.WP_HUGETLBFS_SHMEM: "failed",
        pyuserfaultfd.Feature.WP_UNPOPULATED: "warning",
    }
    try:
        # The DM layer must see the faults of system calls, too: a descriptor for user mode only will not do.
        features = pyuserfaultfd.supported_features(user_mode_only=False)
    except pyuserfaultfd.PermissionDenied as error:
        return Check("userfaultfd", "failed", "not permitted", error.strerror or str(error))
    except OSError as error:
        return Check("userfaultfd", "failed", "not available", error.strerror or str(error))
    missing = {feature: verdict for feature, verdict in needed.items() if feature not in features}
    if not missing:
        return Check("userfaultfd", "ok", "permitted, with all features that are needed")
    names = ", ".join(feature.name or "?" for feature in missing)
    verdict: Verdict = "failed" if "failed" in missing.values() else "warning"
    return Check("userfaultfd", verdict, f"without {names}", "use Linux 6.4 or later")


def check_shm() -> Check:
    """Check the file system that holds the devices."""
    try:
        status = os.statvfs(SHM)
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            kinds = [fields[2] for fields in map(str.split, mounts) if fields[1] == SHM]
    except OSError as error:
        return Check(SHM, "failed", error.strerror or str(error), f"mount -t tmpfs tmpfs {SHM}")
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{free >> 20} of {size >> 20} MiB free"
    if not kinds or kinds[-1] != "tmpfs":
        kind = kinds[-1] if kinds else "a plain directory"
        return Check(SHM, "failed", f"{kind}, {found}", f"mount -t tmpfs tmpfs {SHM}")
    if not os.access(SHM, os.W_OK | os.X_OK):
        return Check(SHM, "failed", f"{found}, not writable", f"chmod 1777 {SHM}")
    if free < MIN_SHM_BYTES:
        return Check(
            SHM,
            "warning",
            found,
            f"a device of the default size needs {MIN_SHM_BYTES >> 20} MiB: remove what nobody uses, or "
            f"mount -o remount,size=2G {SHM}; with Docker, --shm-size=2g",
        )
    return Check(SHM, "ok", found)


def check_map_count() -> Check:
    """Check how many pieces a process's address space may have: copy-on-write makes one per page it moves."""
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            count = int(file.read())
    except (OSError, ValueError) as error:
        return Check("vm.max_map_count", "warning", f"unknown ({error})")
    if count < MIN_MAP_COUNT:
        return Check(
            "vm.max_map_count",
            "warning",
            str(count),
            f"scattered copy-on-write will copy more than it must: sysctl vm.max_map_count={4 * MIN_MAP_COUNT}",
        )
    return Check("vm.max_map_count", "ok", str(count))


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_kernel,
    check_userfaultfd,
    check_shm,
    check_map_count,
)


def run_checks() -> list[Check]:
    """Run all checks; one that breaks is one that failed."""
    results = []
    for check in CHECKS:
        try:
            results.append(check())
        except Exception as error:  # a doctor reports, whatever the patient has
            results.append(Check(check.__name__, "failed", f"{type(error).__name__}: {error}"))
    return results


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Check whether DmRPC can work on this machine, and say what to do; exit with 1 if it cannot."""
    results = run_checks()
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("check", "verdict", "found", "what to do")
        colours = {"ok": "green", "warning": "yellow", "failed": "red"}
        for one in results:
            colour = colours[one.verdict]
            table.add_row(one.name, f"[{colour}]{one.verdict}[/{colour}]", one.found, one.advice)
        Console().print(table)
    if any(result.verdict == "failed" for result in results):
        raise click.exceptions.Exit(1)

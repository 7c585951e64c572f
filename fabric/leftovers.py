"""Names for runs, and what a launcher that was killed has left under them.

A device that a run makes for itself is called ``run-PID-START-NAMESPACE`` after its launcher: a pid and
the start time that the kernel keeps for it name one process of a PID namespace. So a later launcher
can tell whether that run still goes on, also in the moments in which nobody lives in its device yet.
Devices that are to be kept have another name, and nobody removes them unasked.
"""

from __future__ import annotations

import os
import re

from dmrpc_cxl.errors import DmError

from . import device
from .liveness import is_alive, start_time
from .topology import remove_runtime_dirs, runtime_dir

_RUN = re.compile(r"run-(\d+)-(\d+)-([0-9a-f]+)")


def _namespace() -> str:
    return f"{os.stat('/proc/self/ns/pid').st_ino:x}"


def name_of_run(*, keep: bool) -> str:
    """Return a name for the device of this process's run; with `keep` one that is never removed unasked."""
    pid = os.getpid()
    return f"{'kept' if keep else 'run'}-{pid}-{start_time(pid)}-{_namespace()}"


def _is_dead(name: str) -> bool:
    match = _RUN.fullmatch(name)
    return (
        match is not None
        and match[3] == _namespace()
        and not is_alive(int(match[1]), int(match[2]))
    )


def remove_dead_runs() -> tuple[list[str], list[str]]:
    """Remove devices and socket folders of runs whose launcher was killed.

    Returns the names of those that were removed, and of those that were not because somebody lives in them.
    """
    removed, inhabited = [], []
    for name in filter(_is_dead, device.names()):
        try:
            device.remove(name)
        except DmError:
            inhabited.append(name)
        else:
            removed.append(name)
    try:
        folders = os.listdir(runtime_dir("any").parent)
    except OSError:
        folders = []
    for name in filter(_is_dead, folders):
        if name not in inhabited:
            remove_runtime_dirs(name)
    return removed, inhabited

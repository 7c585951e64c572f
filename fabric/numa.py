"""Which memory a device is made of: the node of a machine that has several.

Facts. A policy set on a shared mapping of a tmpfs file (mbind) belongs to the file: whoever touches a page first, it comes from that
node, in fallocate as well. mbind has no function in the C library, only a number.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from pathlib import Path

from dmrpc_cxl.errors import EnvironmentFault

_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND = 2
_MOST_NODES = 1024


def nodes_with_memory() -> list[int]:
    """Return the numbers of the nodes that have memory; [0] where the kernel knows of none."""
    try:
        text = _WITH_MEMORY.read_text()
    except OSError:
        return [0]
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found or [0]


def bind(fd: int, offset: int, size: int, node: int) -> None:
    """Have the pages of a tmpfs file come from a node; before any of them is allocated.

    Raises:
        EnvironmentFault: there is no such node, or the kernel cannot do it.
    """
    nodes = nodes_with_memory()
    if node not in nodes:
        have = ", ".join(map(str, nodes))
        raise EnvironmentFault(
            f"node {node} has no memory: this machine has memory on node {have}"
            + ("; attach(latency=...) emulates a slower device" if len(nodes) == 1 else "")
        )
    number = _MBIND.get(platform.machine())
    if number is None:
        raise EnvironmentFault(f"the number of mbind on {platform.machine()} is not known here")
    mask = (ctypes.c_ulong * (_MOST_NODES // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << node % bits
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size, offset=offset) as memory:
        first = ctypes.c_char.from_buffer(memory)
        failed = libc.syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(ctypes.addressof(first)),
            ctypes.c_ulong(size),
            ctypes.c_int(_MPOL_BIND),
            mask,
            ctypes.c_ulong(_MOST_NODES + 1),
            ctypes.c_uint(0),
        )
        error = ctypes.get_errno()
        del first  # or the mapping could not be closed
    if failed:
        raise EnvironmentFault(f"mbind to node {node}: {os.strerror(error)}")

"""A device of one node's memory, as far as a machine with one node can tell."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmrpc_cxl.errors import EnvironmentFault
from dmrpc_cxl.fabric import device, numa

NAME = f"dmrpc-test-numa-{os.getpid()}"
MIB = 1 << 20


@pytest.fixture
def name() -> Iterator[str]:
    yield NAME
    if device.path_of(NAME).exists():
        device.remove(NAME, force=True)


def policies(path: Path) -> list[str]:
    """Return the memory policies of what this process maps of a file."""
    maps = Path("/proc/self/numa_maps").read_text()
    return re.findall(rf"^\S+ (\S+) file={re.escape(str(path))}", maps, re.MULTILINE)


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_the_frames_of_a_device_are_bound_to_the_node_asked_for(name: str) -> None:
    node = numa.nodes_with_memory()[0]
    path = device.create(name, size=8 * MIB, numa_node=node)
    offset = path.stat().st_size - 8 * MIB
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8 * MIB, offset=offset) as memory:
        assert memory[0] == 0
        assert policies(path) == [f"bind:{node}"]


def test_a_node_without_memory_is_refused_and_nothing_is_left_behind(name: str) -> None:
    with pytest.raises(
        EnvironmentFault, match="node 999 has no memory: this machine has memory on"
    ):
        device.create(name, size=8 * MIB, numa_node=999)
    assert not device.path_of(name).exists()


def test_lists_of_nodes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "has_memory"
    listed.write_text("0-2,5\n")
    monkeypatch.setattr(numa, "_WITH_MEMORY", listed)
    assert numa.nodes_with_memory() == [0, 1, 2, 5]
    monkeypatch.setattr(numa, "_WITH_MEMORY", tmp_path / "nothing")
    assert numa.nodes_with_memory() == [0]

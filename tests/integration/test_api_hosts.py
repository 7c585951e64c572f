"""The interface: attaching, detaching, several hosts and fabrics in one process, counters, strict."""

import contextlib
import ctypes
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from dmrpc_cxl._native import COUNTERS
from dmrpc_cxl.errors import (
    BadSize,
    BufferInUse,
    CoordinatorLost,
    DeviceCorrupt,
    DeviceNotFound,
    DeviceTruncated,
    HostClosed,
    MisuseError,
    NotADevice,
)
from dmrpc_cxl.fabric import device
from tests.crews import MIB, Crew, attach, in_host
from tests.fabrics import At, Fabric, running
from tests.pictures import nothing_changes


def states(fabric: str) -> dict[int, int]:
    with device.open(fabric, writable=False) as opened:
        return {host["host"]: host["state"] for host in opened.hosts()}


# ---------------------------------------------------------------- attach


@in_host
def test_an_attached_host_is_in_the_devices_table_under_its_name(at: At) -> None:
    with attach(at, name="somebody") as host, device.open(at.host.fabric) as opened:
        assert isinstance(host, dmrpc_cxl.Host)
        assert (host.name, host.fabric, host.detached) == ("somebody", at.host.fabric, False)
        entry = opened.host(host.id)
        assert (entry["name"], entry["pid"]) == ("somebody", os.getpid())
        assert host.page_size == opened.superblock["page_size"]
        assert os.path.exists(f"/proc/self/task/{host.handler_tid}")
    with attach(at) as host:
        assert host.name == f"pid-{os.getpid()}"


@pytest.mark.parametrize("name", ["x", "x" * 63, "é" * 31])
@in_host
def test_a_name_of_up_to_63_bytes_is_kept(at: At, name: str) -> None:
    with attach(at, name=name) as host, device.open(at.host.fabric) as opened:
        assert opened.host(host.id)["name"] == name


@in_host
def test_a_name_that_is_too_long_is_refused(at: At) -> None:
    before = states(at.host.fabric)
    for name in ("x" * 64, "é" * 32):
        with pytest.raises(BadSize):
            attach(at, name=name)
    assert states(at.host.fabric) == before


@pytest.mark.parametrize("name", ["", "a/b", "/dev/shm/x", "../x", ".hidden", None, "a\0b"])
def test_what_cannot_be_a_fabrics_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        dmrpc_cxl.attach(name)


@pytest.mark.parametrize("name", ["no-such-fabric", "x" * 63])
def test_a_fabric_that_does_not_exist_is_not_found(name: str) -> None:
    with pytest.raises(DeviceNotFound) as caught:
        dmrpc_cxl.attach(name)
    assert name in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_fabrics_name_that_is_too_long_is_refused() -> None:
    with pytest.raises((BadSize, DeviceNotFound)):
        dmrpc_cxl.attach("x" * 300)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"transport": "carrier pigeon"}, ValueError),
        ({"deadline": 0}, ValueError),
        ({"deadline": -1}, ValueError),
        ({"deadline": float("nan")}, ValueError),
        ({"deadline": float("inf")}, ValueError),
        ({"copy_around": 0}, ValueError),
        ({"low": -1}, (ValueError, OverflowError)),
        ({"batch": 1 << 32}, (ValueError, OverflowError)),
        ({"unheard_of": 1}, TypeError),
    ],
    ids=str,
)
@in_host
def test_options_out_of_range_are_refused(at: At, option: dict, error: type) -> None:
    before = states(at.host.fabric)
    with pytest.raises(error):
        attach(at, **option)
    assert states(at.host.fabric) == before


def test_files_that_are_no_intact_devices_are_refused() -> None:
    path = Path(f"/dev/shm/dmrpc-test-{os.getpid()}-broken")
    try:
        path.write_bytes(b"")
        with pytest.raises((NotADevice, DeviceTruncated)):
            dmrpc_cxl.attach(path.name)
        path.write_bytes(b"hello" * 10_000)
        with pytest.raises(NotADevice):
            dmrpc_cxl.attach(path.name)
        path.unlink()
        device.create(path.name, size=MIB)
        content = path.read_bytes()[: 1 << 16]
        os.truncate(path, 1 << 20)
        with pytest.raises(DeviceTruncated):
            dmrpc_cxl.attach(path.name)
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        with pytest.raises((DeviceCorrupt, DeviceTruncated)):
            dmrpc_cxl.attach(path.name)
    finally:
        path.unlink(missing_ok=True)


def test_a_fabric_without_a_coordinator_cannot_be_joined() -> None:
    name = f"dmrpc-test-{os.getpid()}-alone"
    device.create(name, size=MIB)
    try:
        with pytest.raises(CoordinatorLost) as caught:
            dmrpc_cxl.attach(name, deadline=0.3)
        assert isinstance(caught.value, ConnectionError)
    finally:
        device.remove(name, force=True)


@in_host
def test_tcp_where_nobody_listens_on_it_is_said(at: At) -> None:
    before = states(at.host.fabric)
    with pytest.raises(CoordinatorLost, match="TCP"):
        attach(at, transport="tcp", deadline=0.3)
    assert states(at.host.fabric) == before


def test_a_host_cannot_be_attached_twice(crew: Crew) -> None:
    crew[0].call(attach_twice)


def attach_twice(at: At) -> None:
    with pytest.raises(MisuseError):
        at.host.__init__(0, at.host.fabric, "again")
    assert not at.host.detached
    assert at.host.ralloc(1)


@pytest.mark.parametrize("crew", ["tcp"], indirect=True)
def test_over_tcp_everything_is_the_same(crew: Crew) -> None:
    creator, mapper = crew[:2]
    size = 1000 * crew.page_size  # more than a batch
    creator.ralloc("buffer", size)
    creator.write("buffer", b"made", size - 4)
    mapper.map_ref("buffer", creator.create_ref("buffer"))
    mapper.write("buffer", b"mine", size - 4)
    assert creator.read("buffer", 4, size - 4) == b"made"
    assert mapper.stats()["coordinator_round_trips"] >= 1
    creator.kill()
    crew.wait_until_reclaimed(creator)
    assert mapper.read("buffer", 4, size - 4) == b"mine"
    mapper.rfree("buffer")


# ---------------------------------------------------------------- detach


@in_host
def test_detach_frees_buffers_drops_refs_and_gives_frames_back(at: At) -> None:
    host = attach(at)
    buffer, lazy = host.ralloc(100), host.ralloc(100_000, lazy=True)
    ref, moved = host.create_ref(buffer), host.create_ref(host.ralloc(5), move=True)
    wire = moved.to_bytes()
    host_id = host.id
    assert host.detach() is None
    assert host_id not in states(at.host.fabric)
    with device.open(at.host.fabric) as opened:
        audit = opened.audit()
        assert (audit["in_use"], audit["live_refs"], audit["hole_pages"]) == (0, 0, 0)
        assert host_id not in audit["free"]
    assert host.detached
    assert buffer.freed
    assert lazy.freed
    with nothing_changes(at.host.fabric):
        host.detach()  # again: nothing
        for call in (
            lambda: host.ralloc(1), lambda: host.zeros(1), lambda: host.array([1]),
            lambda: host.empty(1), lambda: host.rfree(5), lambda: host.create_ref(5, 5),
            functools.partial(host.map_ref, ref), lambda: host.map_ref(wire), host.stats, lambda: host.id,
            lambda: host.page_size, lambda: host.handler_tid, lambda: host.contains(5),
            ref.accept, ref.clone, ref.drop, lambda: Ref.from_bytes(wire, host),
        ):  # fmt: skip
            with pytest.raises(HostClosed):
                call()
    del buffer, lazy, ref, moved
    gc.collect()


@in_host
def test_detach_is_refused_while_views_are_alive(at: At) -> None:
    host = attach(at)
    buffer, other = host.ralloc(100), host.ralloc(100)
    for view in (memoryview(buffer), buffer.numpy("i4")):
        with nothing_changes(at.host.fabric), pytest.raises(BufferInUse):
            host.detach()
        assert not host.detached
        assert not other.freed
        view[0] = 1
        del view
    host.detach()


@in_host
def test_the_with_block_detaches_also_after_an_exception(at: At) -> None:
    with pytest.raises(ZeroDivisionError), attach(at) as host:
        raise ZeroDivisionError
    assert host.detached
    with attach(at) as host:
        host.detach()
    assert host.detached


@in_host
def test_a_host_that_is_garbage_detaches(at: At) -> None:
    host = attach(at)
    array, host_id = host.zeros(100), host.id
    del host
    array[0] = 1  # the array keeps it
    assert host_id in states(at.host.fabric)
    del array
    gc.collect()
    assert host_id not in states(at.host.fabric)


@in_host
def test_attaching_and_detaching_leaves_no_descriptor_thread_or_mapping(at: At) -> None:
    def kept() -> tuple[list[str], int, int]:
        gc.collect()
        links = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{number}").rstrip("0123456789[]"))
        tasks = len(os.listdir("/proc/self/task"))
        maps = Path("/proc/self/maps").read_text().count(at.host.fabric)
        return sorted(links), tasks, maps

    attach(at).detach()
    before = kept()
    for _ in range(20):
        with attach(at) as host:
            host.map_ref(host.create_ref(host.array([1, 2]))).free()
    assert kept() == before


# ---------------------------------------------------------------- several in one process


@in_host
def test_hosts_of_one_process_are_as_separate_as_any(at: At) -> None:
    with attach(at, copy_around=1) as one, attach(at, copy_around=1) as other:
        assert len({at.host.id, one.id, other.id}) == 3
        assert len({at.host.handler_tid, one.handler_tid, other.handler_tid}) == 3
        made = one.array([1, 2, 3])
        with other.map_ref(one.create_ref(made)) as mapped:
            received = memoryview(mapped).cast("q")
            received[0] = 9
            assert made.tolist() == [1, 2, 3]
            made[1] = 7
            assert received.tolist() == [9, 2, 3]
            received.release()
        assert one.contains(made)
        assert not other.contains(made)
        del made


@pytest.mark.parametrize("leaving", [0, 1], ids=["the first leaves", "the second leaves"])
@pytest.mark.parametrize("how", ["detach", "garbage"])
def test_refs_find_the_host_that_is_still_there(crew: Crew, leaving: int, how: str) -> None:
    with running(size=4 * MIB) as fabric:
        crew[0].call(find_the_one_that_stays, fabric.name, leaving, how)


def find_the_one_that_stays(at: At, name: str, leaving: int, how: str) -> None:
    hosts = [dmrpc_cxl.attach(name), dmrpc_cxl.attach(name)]
    leaver = hosts.pop(leaving)
    if how == "detach":
        leaver.detach()
    del leaver
    gc.collect()
    [stays] = hosts
    wire = stays.create_ref(stays.ralloc(10), move=True).to_bytes()
    ref = Ref.from_bytes(wire)
    assert ref.host is stays
    ref.drop()
    stays.detach()


def test_one_process_may_be_on_several_fabrics(crew: Crew) -> None:
    with running(size=4 * MIB) as two, running(size=4 * MIB, page_size=16384) as three:
        crew[0].call(work_on_all, [two.name, three.name])


def work_on_all(at: At, names: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        hosts = [at.host, *(stack.enter_context(dmrpc_cxl.attach(name)) for name in names)]
        arrays = [host.array([number] * 5000) for number, host in enumerate(hosts)]
        refs = [host.create_ref(array) for host, array in zip(hosts, arrays, strict=True)]
        for array in arrays:
            array[:] = 99
        for number, (host, ref) in enumerate(zip(hosts, refs, strict=True)):
            with host.map_ref(ref) as mapped:
                assert set(memoryview(mapped).cast("q")) == {number}
        del array, arrays


# ---------------------------------------------------------------- strict


STRAY_STORE = """
    import ctypes, sys, dmrpc_cxl
    host = dmrpc_cxl.attach(sys.argv[1], strict=sys.argv[2] == "strict", name="careless")
    buffer = host.ralloc(4096)
    address = buffer.address
    ctypes.memmove(address, b"before", 6)
    ref = host.create_ref(buffer, move=True)
    print(ctypes.string_at(address, 6), flush=True)
    ctypes.memmove(address, b"after!", 6)
    print("survived", flush=True)
    ref.drop()
    host.detach()
"""


def stray_store(fabric: str, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRAY_STORE), fabric, mode],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_strict_ends_a_process_that_stores_to_what_it_has_moved_away(fabric: Fabric) -> None:
    ended = stray_store(fabric.name, "strict")
    assert ended.returncode == -signal.SIGABRT
    assert ended.stdout == "b'before'\n"
    [message] = [line for line in ended.stderr.splitlines() if line.startswith("dmrpc: fatal:")]
    for part in (fabric.name, "careless", "no longer its memory", "moved"):
        assert part in message


def test_without_strict_such_a_store_goes_unnoticed(fabric: Fabric) -> None:
    # What strict is for: if this fails, the default has become safe, and the option pointless.
    ended = stray_store(fabric.name, "lenient")
    assert (ended.returncode, ended.stdout) == (0, "b'before'\nsurvived\n")


def test_what_a_strict_host_gets_back_is_writable_again(fabric: Fabric) -> None:
    strict, other = fabric.host(strict=True), fabric.host()
    for _ in range(3):
        wire = strict.call(move_away)
        wire = other.call(write_and_move_on, wire)
        assert strict.call(take_in, wire) == b"other."


def move_away(at: At) -> bytes:
    buffer = at.host.ralloc(20 * at.host.page_size)
    memoryview(buffer)[:6] = b"strict"
    return at.host.create_ref(buffer, move=True).to_bytes()


def write_and_move_on(at: At, wire: bytes) -> bytes:
    buffer = at.host.map_ref(wire)
    memoryview(buffer)[:6] = b"other."
    return at.host.create_ref(buffer, move=True).to_bytes()


def take_in(at: At, wire: bytes) -> bytes:
    with at.host.map_ref(wire) as buffer:
        content = bytes(memoryview(buffer)[:6])
        ctypes.memset(buffer.address, 1, len(buffer))
        return content


def test_every_counter_is_explained() -> None:
    assert len(dict(COUNTERS)) == len(COUNTERS)
    assert all(text and text == text.strip() for _, text in COUNTERS)

"""pyuserfaultfd: faults and events of one process, read and answered by another.

The functions whose names begin with ``child_`` run in the other process: they map memory, hand
their userfaultfd over, and do what is to be noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from pyuserfaultfd import (
    Feature,
    Fork,
    PageFault,
    PartialResult,
    ProcessGone,
    RegisterMode,
    Remap,
    Remove,
    Unmap,
    UserFaultFD,
    address_of,
)
from tests.unit import pyuserfaultfd_peer as peer
from tests.unit.pyuserfaultfd_peer import (
    LIMIT,
    PAGE,
    Child,
    Link,
    isolated,
    one_event,
    one_fault,
    private,
    require,
    require_capability,
)

nothing_left = peer.nothing_left

A = b"a" * PAGE
B = b"b" * PAGE

libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def serving(function, *arguments) -> Iterator[tuple[Child, UserFaultFD, int]]:
    """Start a child, and take over its userfaultfd; the body says go."""
    with Child(function, *arguments) as child:
        uffd, address = child.take_uffd()
        with uffd:
            yield child, uffd, address


# ---------------------------------------------------------------- missing pages


def child_reads(link: Link, features: int, offset: int) -> None:
    memory = private(2)
    uffd = UserFaultFD(Feature(features))
    uffd.register(*address_of(memory))
    link.share(uffd, memory)
    link.send([memory[offset], threading.get_native_id()])


def child_writes(link: Link) -> None:
    memory = private(1)
    uffd = UserFaultFD()
    uffd.register(*address_of(memory))
    link.share(uffd, memory)
    memory[0] = ord("w")
    link.send(memory[:2].decode())


def test_read_of_a_missing_page_waits_for_the_page_that_another_process_supplies():
    with serving(child_reads, 0, PAGE + 5) as (child, uffd, address):
        child.link.send()
        event = one_fault(uffd)
        assert event == PageFault(address + PAGE, write=False, wp=False, minor=False)
        assert event.missing
        assert uffd.copy(event.page, A) == PAGE
        assert child.receive()[0][0] == ord("a")


def test_write_to_a_missing_page_is_told_from_a_read():
    with serving(child_writes) as (child, uffd, address):
        child.link.send()
        assert one_fault(uffd) == PageFault(address, write=True, wp=False, minor=False)
        uffd.copy(address, A)
        assert child.receive()[0] == "wa"


def test_zeropage_resolves_a_fault():
    with serving(child_reads, 0, 0) as (child, uffd, address):
        child.link.send()
        one_fault(uffd)
        uffd.zeropage(address, PAGE)
        assert child.receive()[0][0] == 0


def test_fault_names_the_thread_when_asked():
    with serving(child_reads, Feature.THREAD_ID, 0) as (child, uffd, address):
        assert uffd.features == Feature.THREAD_ID
        child.link.send()
        event = one_fault(uffd)
        uffd.copy(address, A)
        assert event.thread_id == child.receive()[0][1]


def test_fault_names_the_exact_address_when_asked():
    with serving(child_reads, require(Feature.EXACT_ADDRESS), PAGE + 77) as (child, uffd, address):
        child.link.send()
        event = one_fault(uffd)
        assert event.address == address + PAGE + 77
        assert event.page == address + PAGE
        uffd.copy(event.page, A)
        child.receive()


def test_sleeper_stays_asleep_after_a_copy_that_wakes_nobody_until_wake():
    with serving(child_reads, 0, 0) as (child, uffd, address):
        assert uffd.waiting() == (0, 0)
        child.link.send()
        one_fault(uffd)
        uffd.copy(address, A, wake=False)
        assert uffd.waiting() == (0, 1)
        uffd.wake(address, PAGE)
        assert child.receive()[0][0] == ord("a")
        assert uffd.waiting() == (0, 0)


def test_poisoned_page_kills_the_thread_that_waits_for_it():
    require(Feature.POISON)
    with serving(child_reads, Feature.POISON, 0) as (child, uffd, address):
        child.status = -signal.SIGBUS
        child.link.send()
        one_fault(uffd)
        assert uffd.poison(address, PAGE) == PAGE


def test_closing_the_last_descriptor_wakes_the_sleeper_onto_a_zero_page():
    with serving(child_reads, 0, 0) as (child, uffd, _):
        child.link.send()
        one_fault(uffd)
        uffd.close()
        assert child.receive()[0][0] == 0


def test_operations_on_a_process_that_ended_say_so():
    with serving(child_reads, 0, 0) as (child, uffd, address):
        child.process.kill()
        child.process.wait()
        child.status = child.process.returncode
        with pytest.raises(ProcessGone):
            uffd.copy(address, A)
        with pytest.raises(ProcessGone):
            uffd.zeropage(address, PAGE)


# ---------------------------------------------------------------- several faults


def child_threads_read(link: Link, threads: int) -> None:
    memory = private(threads)
    uffd = UserFaultFD()
    uffd.register(*address_of(memory))
    link.share(uffd, memory)
    address = address_of(memory).address
    seen = ctypes.create_string_buffer(threads)

    def read(index: int) -> None:
        # A foreign function: it faults without the GIL, so the threads fault side by side.
        libc.memcpy(
            ctypes.c_void_p(ctypes.addressof(seen) + index),
            ctypes.c_void_p(address + index * PAGE),
            ctypes.c_size_t(1),
        )

    readers = [threading.Thread(target=read, args=(index,)) for index in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    link.send(seen.raw.decode())


def test_faults_of_many_threads_are_all_read_and_served():
    with serving(child_threads_read, 8) as (child, uffd, address):
        child.link.send()
        served: list[int] = []
        while len(served) < 8:
            found = uffd.read(timeout=LIMIT)
            assert found, "no event came"
            for event in found:
                assert isinstance(event, PageFault)
                index = (event.page - address) // PAGE
                uffd.copy(event.page, bytes([ord("0") + index]) * PAGE)
                served.append(index)
        assert sorted(served) == list(range(8))
        assert child.receive()[0] == "01234567"


def test_read_returns_no_more_events_than_wanted_and_leaves_the_others():
    with serving(child_threads_read, 3) as (child, uffd, _):
        child.link.send()
        while uffd.waiting().unread < 3:
            assert child.process.poll() is None
        assert len(uffd.read(timeout=0, max_events=1)) == 1
        assert uffd.waiting() == (2, 3)
        assert len(uffd.read(timeout=0)) == 2
        assert uffd.read(timeout=0) == []
        uffd.close()
        child.receive()


@isolated
def test_python_thread_can_serve_a_fault_that_was_taken_without_the_gil():
    memory = private(1)
    target = address_of(memory)
    with UserFaultFD() as uffd:
        uffd.register(*target)
        writer = threading.Thread(
            target=libc.memset,
            args=(ctypes.c_void_p(target.address), ord("w"), ctypes.c_size_t(1)),
        )
        writer.start()
        assert one_fault(uffd) == PageFault(target.address, write=True, wp=False, minor=False)
        uffd.copy(target.address, A)
        writer.join()
    assert memory[:2] == b"wa"


# ---------------------------------------------------------------- write protection, minor faults


def child_writes_protected(link: Link, shared: bool) -> None:
    if shared:
        memory = mmap.mmap(-1, 2 * PAGE)
    else:
        memory = private(2)
    memory[:] = A + A
    uffd = UserFaultFD(Feature.PAGEFAULT_FLAG_WP)
    uffd.register(*address_of(memory), RegisterMode.WP)
    link.share(uffd, memory)
    link.send(memory[0])
    memory[PAGE] = ord("w")
    link.send(memory[PAGE : PAGE + 2].decode())


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shmem"])
def test_write_to_a_protected_page_waits_until_the_protection_is_cleared(shared: bool):
    require(Feature.WP_HUGETLBFS_SHMEM if shared else Feature.PAGEFAULT_FLAG_WP)
    with serving(child_writes_protected, shared) as (child, uffd, address):
        uffd.writeprotect(address, 2 * PAGE)
        child.link.send()
        assert child.receive()[0] == ord("a")  # reading raised no fault
        event = one_fault(uffd)
        assert event == PageFault(address + PAGE, write=True, wp=True, minor=False)
        assert not event.missing
        uffd.writeprotect(event.page, PAGE, protect=False)
        assert child.receive()[0] == "wa"
        assert uffd.read(timeout=0) == []


def test_writer_stays_asleep_when_protection_is_cleared_without_waking():
    require(Feature.PAGEFAULT_FLAG_WP)
    with serving(child_writes_protected, False) as (child, uffd, address):
        uffd.writeprotect(address, 2 * PAGE)
        child.link.send()
        child.receive()
        one_fault(uffd)
        uffd.writeprotect(address + PAGE, PAGE, protect=False, wake=False)
        assert uffd.waiting() == (0, 1)
        uffd.wake(address + PAGE, PAGE)
        assert child.receive()[0] == "wa"


def child_writes_unfilled(link: Link) -> None:
    memory = private(1)
    uffd = UserFaultFD(Feature.PAGEFAULT_FLAG_WP)
    uffd.register(*address_of(memory), RegisterMode.MISSING | RegisterMode.WP)
    link.share(uffd, memory)
    memory[0] = ord("w")
    link.send(memory[:2].decode())


def test_page_copied_in_write_protected_faults_again_when_written():
    require(Feature.PAGEFAULT_FLAG_WP)
    with serving(child_writes_unfilled) as (child, uffd, address):
        child.link.send()
        assert one_fault(uffd).missing
        uffd.copy(address, A, write_protect=True)
        assert one_fault(uffd) == PageFault(address, write=True, wp=True, minor=False)
        uffd.writeprotect(address, PAGE, protect=False)
        assert child.receive()[0] == "wa"


def child_reads_page_cache(link: Link, mode: int, write: bool) -> None:
    fd = os.memfd_create("test")
    os.truncate(fd, PAGE)
    memory, elsewhere = mmap.mmap(fd, PAGE), mmap.mmap(fd, PAGE)
    os.close(fd)
    elsewhere[:] = A
    uffd = UserFaultFD(Feature.MINOR_SHMEM)
    uffd.register(*address_of(memory), RegisterMode(mode))
    link.share(uffd, memory)
    if write:
        memory[0] = ord("w")
    link.send(memory[:2].decode())


def test_minor_fault_waits_for_continue():
    require(Feature.MINOR_SHMEM)
    with serving(child_reads_page_cache, RegisterMode.MINOR, False) as (child, uffd, address):
        child.link.send()
        event = one_fault(uffd)
        assert event == PageFault(address, write=False, wp=False, minor=True)
        assert not event.missing
        assert uffd.continue_(event.page, PAGE) == PAGE
        assert child.receive()[0] == "aa"


def test_page_continued_write_protected_faults_again_when_written():
    require(Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM)
    mode = RegisterMode.MINOR | RegisterMode.WP
    with serving(child_reads_page_cache, mode, True) as (child, uffd, address):
        child.link.send()
        assert one_fault(uffd).minor
        uffd.continue_(address, PAGE, write_protect=True)
        assert one_fault(uffd) == PageFault(address, write=True, wp=True, minor=False)
        uffd.writeprotect(address, PAGE, protect=False)
        assert child.receive()[0] == "wa"


# ---------------------------------------------------------------- events of the memory map


def child_forks(link: Link) -> None:
    memory = private(1)
    uffd = UserFaultFD(Feature.EVENT_FORK)
    uffd.register(*address_of(memory))
    link.share(uffd, memory)
    pid = os.fork()
    if not pid:
        os._exit(memory[0])
    link.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_fork_brings_a_userfaultfd_that_serves_the_forked_process():
    require_capability()
    with serving(child_forks) as (child, uffd, address):
        child.link.send()
        event = one_event(uffd)
        assert isinstance(event, Fork)
        with event.uffd as forked:
            assert forked.features == uffd.features
            assert one_event(forked) == PageFault(address, write=False, wp=False, minor=False)
            forked.copy(address, A)
            assert child.receive()[0] == ord("a")


def child_forks_unnoticed(link: Link) -> None:
    memory = private(1)
    uffd = UserFaultFD()
    uffd.register(*address_of(memory))
    link.share(uffd, memory)
    pid = os.fork()
    if not pid:
        os._exit(memory[0])
    link.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_without_the_fork_feature_a_forked_process_is_not_protected():
    with serving(child_forks_unnoticed) as (child, uffd, _):
        child.link.send()
        assert child.receive()[0] == 0
        assert uffd.read(timeout=0) == []


def child_changes_its_map(link: Link, what: str, features: int) -> None:
    memory, elsewhere = private(2), private(2)
    uffd = UserFaultFD(Feature(features))
    uffd.register(*address_of(memory))
    source, target = address_of(memory).address, address_of(elsewhere).address
    link.share(uffd, memory)
    if what == "remap":
        maymove_fixed = 3
        libc.mremap.restype = ctypes.c_void_p
        size = ctypes.c_size_t(2 * PAGE)
        moved = libc.mremap(
            ctypes.c_void_p(source), size, size, maymove_fixed, ctypes.c_void_p(target)
        )
        assert moved == target
    elif what == "remove":
        memory.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
    else:
        memory.close()
    link.send(target)
    link.receive()
    os._exit(0)  # the mmap objects no longer know what is mapped


@pytest.mark.parametrize("what", ["remap", "remove", "unmap"])
def test_change_of_the_memory_map_is_reported_and_waits_to_be_read(what: str):
    with serving(child_changes_its_map, what, Feature[f"EVENT_{what.upper()}"]) as served:
        child, uffd, address = served
        child.link.send()
        event = one_event(uffd)
        target, _ = child.receive()
        if what == "remap":
            assert event == Remap(address, target, 2 * PAGE)
            assert uffd.copy(target, A) == PAGE
        elif what == "remove":
            assert event == Remove(address + PAGE, address + 2 * PAGE)
            assert uffd.copy(address + PAGE, A) == PAGE
        else:
            assert event == Unmap(address, address + 2 * PAGE)
        child.link.send()


def test_remap_is_followed_by_an_unmap_of_the_old_range_when_both_are_reported():
    features = Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    with serving(child_changes_its_map, "remap", features) as (child, uffd, address):
        child.link.send()
        assert isinstance(one_event(uffd), Remap)
        assert one_event(uffd) == Unmap(address, address + 2 * PAGE)
        child.receive()
        child.link.send()


def test_copy_while_an_event_waits_to_be_read_is_a_partial_result_with_nothing_done():
    with serving(child_changes_its_map, "remove", Feature.EVENT_REMOVE) as served:
        child, uffd, address = served
        child.link.send()
        assert select.select([uffd], [], [], LIMIT)[0] == [uffd]
        with pytest.raises(PartialResult) as caught:
            uffd.copy(address, A)
        assert caught.value.bytes_done == 0
        with pytest.raises(PartialResult):
            uffd.zeropage(address, PAGE)
        assert isinstance(one_event(uffd), Remove)
        child.receive()
        assert uffd.copy(address, A) == PAGE
        child.link.send()


# ---------------------------------------------------------------- waiting


def test_read_without_an_event_returns_nothing_when_the_time_is_over():
    with UserFaultFD() as uffd:
        assert uffd.read(timeout=0) == []
        assert uffd.read(timeout=0.01) == []
        with pytest.raises(ValueError, match="max_events"):
            uffd.read(timeout=0, max_events=0)


def test_blocking_descriptor_is_read_without_timeout_only():
    with serving(child_reads, 0, 0) as (child, uffd, address):
        os.set_blocking(uffd.fileno(), True)
        child.link.send()
        with pytest.raises(ValueError, match="nonblock=True"):
            uffd.read(timeout=1)
        assert uffd.read() == [PageFault(address, write=False, wp=False, minor=False)]
        uffd.copy(address, A)
        child.receive()


def test_events_iterates_on_the_event_loop_until_close():
    async def serve(uffd: UserFaultFD, address: int) -> list[int]:
        served = []
        async for event in uffd.events():
            assert isinstance(event, PageFault)
            uffd.copy(event.page, A)
            served.append((event.page - address) // PAGE)
            if len(served) == 4:
                asyncio.get_running_loop().call_soon(uffd.close)  # while the iterator waits
        return served

    with serving(child_threads_read, 4) as (child, uffd, address):
        child.link.send()
        served = asyncio.run(asyncio.wait_for(serve(uffd, address), LIMIT))
        assert sorted(served) == [0, 1, 2, 3]
        assert uffd.closed
        assert child.receive()[0] == "aaaa"


def test_cancelled_wait_loses_no_event():
    async def wait_in_vain_then_serve(child: Child, uffd: UserFaultFD) -> None:
        task = asyncio.ensure_future(anext_of(uffd))
        await asyncio.sleep(0)  # it waits now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        child.link.send()
        event = await anext_of(uffd)
        assert isinstance(event, PageFault)
        uffd.copy(event.page, A)

    async def anext_of(uffd: UserFaultFD):
        events = uffd.events()
        try:
            return await events.__anext__()
        finally:
            await events.aclose()

    with serving(child_reads, 0, 0) as (child, uffd, _):
        asyncio.run(asyncio.wait_for(wait_in_vain_then_serve(child, uffd), LIMIT))
        assert child.receive()[0][0] == ord("a")


def test_event_that_the_iterator_did_not_hand_out_is_still_with_the_kernel():
    async def take_one(uffd: UserFaultFD) -> None:
        async with contextlib.aclosing(uffd.events()) as events:
            async for _ in events:
                break

    with serving(child_threads_read, 3) as (child, uffd, _):
        child.link.send()
        while uffd.waiting().unread < 3:
            assert child.process.poll() is None
        asyncio.run(asyncio.wait_for(take_one(uffd), LIMIT))
        assert uffd.waiting() == (2, 3)
        uffd.close()
        child.receive()


def test_second_task_may_not_wait_beside_the_first():
    async def both(uffd: UserFaultFD) -> None:
        first, second = uffd.events(), uffd.events()
        waiting = asyncio.ensure_future(first.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already waiting"):
            await second.__anext__()
        uffd.close()
        with pytest.raises(StopAsyncIteration):
            await waiting

    with UserFaultFD() as uffd:
        asyncio.run(asyncio.wait_for(both(uffd), LIMIT))


def test_events_of_a_blocking_descriptor_are_refused():
    async def first(uffd: UserFaultFD) -> None:
        await uffd.events().__anext__()

    with UserFaultFD(nonblock=False) as uffd, pytest.raises(ValueError, match="nonblock=True"):
        asyncio.run(first(uffd))

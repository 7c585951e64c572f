"""pyuserfaultfd: operations on ranges, done before anybody touches them.

A page that is filled beforehand raises no fault, so a process can do this to its own memory. Each
test runs in a process of its own all the same: one mistake, and its only thread would sleep in the
kernel.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
import tempfile

import pytest

from pyuserfaultfd import (
    AlreadyMapped,
    Feature,
    InvalidRange,
    Ioctl,
    MemoryRange,
    NotRegistered,
    PartialResult,
    RangeBusy,
    RegisterMode,
    UserFaultFD,
    address_of,
)
from tests.unit import pyuserfaultfd_peer as peer
from tests.unit.pyuserfaultfd_peer import PAGE, Child, Link, isolated, private, require

nothing_left = peer.nothing_left

A = b"a" * PAGE
B = b"b" * PAGE


def shared_twice(pages: int) -> tuple[mmap.mmap, mmap.mmap]:
    """Map the same shmem file at two places."""
    fd = os.memfd_create("test")
    try:
        os.truncate(fd, pages * PAGE)
        return mmap.mmap(fd, pages * PAGE), mmap.mmap(fd, pages * PAGE)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- register


@isolated
def test_register_for_missing_pages_grants_the_ways_to_supply_one():
    memory = private(1)
    with UserFaultFD() as uffd:
        granted = uffd.register(*address_of(memory))
    assert Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.WAKE in granted
    assert Ioctl.WRITEPROTECT not in granted
    assert Ioctl.CONTINUE not in granted


@isolated
def test_register_for_write_protection_grants_writeprotect():
    require(Feature.PAGEFAULT_FLAG_WP)
    memory = private(1)
    with UserFaultFD() as uffd:
        assert Ioctl.WRITEPROTECT in uffd.register(*address_of(memory), RegisterMode.WP)


@isolated
def test_register_for_minor_faults_grants_continue_on_shmem_only():
    require(Feature.MINOR_SHMEM)
    memory, anonymous = shared_twice(1)[0], private(1)
    with UserFaultFD(Feature.MINOR_SHMEM) as uffd:
        assert Ioctl.CONTINUE in uffd.register(*address_of(memory), RegisterMode.MINOR)
        with pytest.raises(InvalidRange, match="only the last two"):
            uffd.register(*address_of(anonymous), RegisterMode.MINOR)


@isolated
def test_register_names_the_alignment_that_is_wrong():
    memory = private(2)
    address, length = address_of(memory)
    with UserFaultFD() as uffd:
        with pytest.raises(InvalidRange, match="the address is not a multiple of the page size"):
            uffd.register(address + 1, PAGE)
        with pytest.raises(InvalidRange, match="the length is not a multiple of the page size"):
            uffd.register(address, length - 1)
        with pytest.raises(InvalidRange, match="the range is empty"):
            uffd.register(address, 0)


@isolated
def test_register_refuses_what_is_not_mapped_or_is_an_ordinary_file():
    memory = private(1)
    address, length = address_of(memory)
    memory.close()
    with tempfile.TemporaryFile(dir=os.getcwd()) as file, UserFaultFD() as uffd:
        with pytest.raises(InvalidRange) as caught:
            uffd.register(address, length)
        assert (caught.value.operation, caught.value.address, caught.value.length) == (
            "register",
            address,
            length,
        )
        if os.fstatvfs(file.fileno()).f_frsize and _is_shmem(file.fileno()):
            pytest.skip("the checkout lies in a tmpfs, whose files can be registered")
        file.truncate(PAGE)
        with pytest.raises(InvalidRange), mmap.mmap(file.fileno(), PAGE) as mapped:
            uffd.register(*address_of(mapped))


def _is_shmem(fd: int) -> bool:
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        device = os.fstat(fd).st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        return any(
            fields[2] == name and fields[fields.index("-") + 1] == "tmpfs"
            for fields in (line.split() for line in mounts)
        )


@isolated
def test_register_refuses_the_range_of_another_userfaultfd():
    memory = private(1)
    with UserFaultFD() as first, UserFaultFD() as second:
        first.register(*address_of(memory))
        with pytest.raises(RangeBusy, match="another userfaultfd"):
            second.register(*address_of(memory))


@isolated
def test_numbers_that_are_no_addresses_are_refused():
    with UserFaultFD() as uffd:
        for address in (-1, 2**64):
            with pytest.raises(InvalidRange, match="from 0 to"):
                uffd.register(address, PAGE)
        with pytest.raises(TypeError):
            uffd.register("0x1000", PAGE)  # type: ignore[arg-type]


@isolated
def test_unregistered_range_faults_no_more():
    memory = private(2)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        uffd.unregister(*address_of(memory))
        assert memory[0] == 0


@isolated
def test_closing_the_last_descriptor_ends_the_registration():
    memory = private(1)
    uffd = UserFaultFD()
    uffd.register(*address_of(memory))
    uffd.close()
    assert memory[0] == 0


@isolated
def test_hugetlbfs_pages_are_filled_like_others_but_have_no_zeropage():
    require(Feature.MISSING_HUGETLBFS)
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    size = int(fields["Hugepagesize"].split()[0]) << 10
    map_hugetlb = 0x40000
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_hugetlb)
    except OSError as error:
        pytest.skip(f"no huge pages are set aside (vm.nr_hugepages): {error.strerror}")
    with UserFaultFD() as uffd:
        assert Ioctl.ZEROPAGE not in uffd.register(*address_of(memory))
        assert uffd.copy(address_of(memory).address, bytes([7]) * size) == size
        assert memory[size - 1] == 7


# ---------------------------------------------------------------- copy, zeropage


@isolated
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "mmap", "address", "part of a buffer"])
def test_copy_fills_a_missing_page_from(kind: str):
    memory = private(2)
    source = private(2)
    source[:] = A + B
    address, _ = address_of(memory)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        if kind == "address":
            done = uffd.copy(address, address_of(source).address, PAGE)
        elif kind == "part of a buffer":
            done = uffd.copy(address, source, PAGE)
        elif kind == "mmap":
            assert uffd.copy(address, source) == 2 * PAGE
            done = PAGE
        else:
            done = uffd.copy(address, A if kind == "bytes" else bytearray(A))
        assert done == PAGE
        assert memory[:PAGE] == A
    source.close()  # nothing holds on to it


@isolated
def test_copy_refuses_more_than_the_buffer_has_and_an_address_without_length():
    memory = private(2)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        with pytest.raises(ValueError, match=f"the source has {PAGE} bytes"):
            uffd.copy(address_of(memory).address, A, 2 * PAGE)
        with pytest.raises(TypeError, match="needs a length"):
            uffd.copy(address_of(memory).address, address_of(memory).address)


@isolated
def test_copy_onto_a_page_that_is_there_changes_nothing():
    memory = private(1)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        uffd.copy(address_of(memory).address, A)
        with pytest.raises(AlreadyMapped):
            uffd.copy(address_of(memory).address, B)
        assert memory[:] == A


@isolated
@pytest.mark.parametrize("operation", ["copy", "zeropage"])
def test_range_that_is_filled_in_part_is_a_partial_result_with_the_bytes_done(operation: str):
    memory = private(4)
    address, length = address_of(memory)
    with UserFaultFD() as uffd:
        uffd.register(address, length)
        uffd.copy(address + 2 * PAGE, A)

        def fill(at: int, size: int) -> int:
            return (
                uffd.copy(at, B * (size // PAGE))
                if operation == "copy"
                else uffd.zeropage(at, size)
            )

        with pytest.raises(PartialResult, match=f"{2 * PAGE} bytes done") as caught:
            fill(address, length)
        assert caught.value.bytes_done == 2 * PAGE
        # Trying again from there says why it stopped.
        with pytest.raises(AlreadyMapped):
            fill(address + caught.value.bytes_done, PAGE)
        assert fill(address + 3 * PAGE, PAGE) == PAGE
        filled = B if operation == "copy" else bytes(PAGE)
        assert memory[:] == 2 * filled + A + filled


@isolated
def test_copy_from_an_unreadable_address_says_so():
    memory = private(1)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        with pytest.raises(InvalidRange, match="source cannot be read") as caught:
            uffd.copy(address_of(memory).address, 8, PAGE)
    assert caught.value.errno == errno.EFAULT


@isolated
def test_copy_to_memory_that_is_not_registered_says_so():
    memory = private(1)
    with UserFaultFD() as uffd, pytest.raises(NotRegistered):
        uffd.copy(address_of(memory).address, A)


@isolated
def test_zeropage_fills_with_zeros():
    memory = private(3)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory))
        assert uffd.zeropage(*address_of(memory)) == 3 * PAGE
        assert memory[:] == bytes(3 * PAGE)


# ---------------------------------------------------------------- continue, write protection


@isolated
def test_continue_maps_what_another_mapping_wrote():
    require(Feature.MINOR_SHMEM)
    memory, elsewhere = shared_twice(2)
    with UserFaultFD(Feature.MINOR_SHMEM) as uffd:
        uffd.register(*address_of(memory), RegisterMode.MINOR)
        elsewhere[:] = A + B
        assert uffd.continue_(*address_of(memory)) == 2 * PAGE
        assert memory[:] == A + B
        with pytest.raises(AlreadyMapped):
            uffd.continue_(*address_of(memory))


@isolated
def test_continue_without_a_page_in_the_page_cache_says_so():
    require(Feature.MINOR_SHMEM)
    memory, _ = shared_twice(1)
    with UserFaultFD(Feature.MINOR_SHMEM) as uffd:
        uffd.register(*address_of(memory), RegisterMode.MINOR)
        with pytest.raises(InvalidRange, match="no page there in the page cache"):
            uffd.continue_(*address_of(memory))


@isolated
def test_cleared_write_protection_lets_writes_through():
    require(Feature.PAGEFAULT_FLAG_WP)
    memory = private(2)
    memory[:] = A + A
    with UserFaultFD(Feature.PAGEFAULT_FLAG_WP) as uffd:
        uffd.register(*address_of(memory), RegisterMode.WP)
        uffd.writeprotect(*address_of(memory))
        assert memory[:] == A + A  # reading is free
        uffd.writeprotect(*address_of(memory), protect=False)
        memory[:PAGE] = B
    assert memory[:] == B + A


@isolated
def test_writeprotect_of_a_range_registered_otherwise_says_so():
    require(Feature.PAGEFAULT_FLAG_WP)
    memory = private(1)
    with UserFaultFD() as uffd:
        uffd.register(*address_of(memory), RegisterMode.MISSING)
        with pytest.raises(NotRegistered, match="write-protect mode"):
            uffd.writeprotect(*address_of(memory))


@isolated
def test_asynchronous_write_protection_lets_writes_through_without_an_event():
    memory = private(1)
    memory[:] = A
    with UserFaultFD(require(Feature.WP_ASYNC)) as uffd:
        uffd.register(*address_of(memory), RegisterMode.WP)
        uffd.writeprotect(*address_of(memory))
        memory[:] = B
        assert uffd.read(timeout=0) == []


# ---------------------------------------------------------------- move


@isolated
def test_move_takes_the_pages_away_from_the_source():
    memory, source = private(2), private(2)
    source[:] = A + B
    with UserFaultFD(require(Feature.MOVE)) as uffd:
        assert Ioctl.MOVE in uffd.register(*address_of(memory))
        done = uffd.move(address_of(memory).address, *address_of(source))
        assert done == 2 * PAGE
        assert memory[:] == A + B
        assert source[:] == bytes(2 * PAGE)


@isolated
def test_move_refuses_a_hole_in_the_source_unless_allowed():
    memory, source = private(2), private(2)
    source[PAGE:] = B
    with UserFaultFD(require(Feature.MOVE)) as uffd:
        uffd.register(*address_of(memory))
        with pytest.raises(InvalidRange, match="holes"):
            uffd.move(address_of(memory).address, *address_of(source))
        done = uffd.move(address_of(memory).address, *address_of(source), allow_holes=True)
        assert done == 2 * PAGE
        assert memory[PAGE:] == B


@isolated
def test_move_onto_a_page_that_is_there_changes_nothing():
    memory, source = private(1), private(1)
    source[:] = B
    with UserFaultFD(require(Feature.MOVE)) as uffd:
        uffd.register(*address_of(memory))
        uffd.copy(address_of(memory).address, A)
        with pytest.raises(AlreadyMapped):
            uffd.move(address_of(memory).address, *address_of(source))
        assert (memory[:], source[:]) == (A, B)


@isolated
def test_move_refuses_memory_that_is_not_private_anonymous():
    memory = private(1)
    source, _ = shared_twice(1)
    source[:] = A
    with UserFaultFD(require(Feature.MOVE)) as uffd:
        uffd.register(*address_of(memory))
        with pytest.raises(InvalidRange, match="private anonymous"):
            uffd.move(address_of(memory).address, *address_of(source))


@isolated
def test_move_refuses_a_page_that_a_forked_process_shares():
    require(Feature.MOVE)
    memory, source = private(1), private(1)
    source[:] = A
    here, there = socket.socketpair()
    pid = os.fork()
    if not pid:
        here.close()
        there.recv(1)
        os._exit(0)
    with here, there, UserFaultFD(Feature.MOVE) as uffd:
        uffd.register(*address_of(memory))
        with pytest.raises(RangeBusy, match="shared with another process"):
            uffd.move(address_of(memory).address, *address_of(source))
        there.close()
        here.close()
        assert os.waitpid(pid, 0)[1] == 0


# ---------------------------------------------------------------- poison, SIGBUS


def touch(kind: str) -> None:
    memory = private(2)
    wanted = {"poisoned": Feature.POISON, "missing": Feature.SIGBUS}[kind]
    with UserFaultFD(wanted) as uffd:
        uffd.register(*address_of(memory))
        if kind == "poisoned":
            assert uffd.poison(*MemoryRange(address_of(memory).address, PAGE)) == PAGE
        else:
            uffd.zeropage(address_of(memory).address + PAGE, PAGE)
        memory[0]


def touch_poisoned_page(link: Link) -> None:
    touch("poisoned")


def touch_missing_page_with_sigbus_feature(link: Link) -> None:
    touch("missing")


def test_poisoned_page_kills_whoever_touches_it():
    require(Feature.POISON)
    with Child(touch_poisoned_page, status=-signal.SIGBUS):
        pass


def test_with_the_sigbus_feature_a_missing_page_kills_instead_of_waiting():
    require(Feature.SIGBUS)
    with Child(touch_missing_page_with_sigbus_feature, status=-signal.SIGBUS):
        pass

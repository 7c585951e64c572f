"""The service table of the device: what is in it is whole, whatever came in between."""

import os
import struct

import pytest

from dmrpc_cxl._native import LAYOUT, Device, format_device
from dmrpc_cxl.coordinator.directory import Directory
from dmrpc_cxl.coordinator.names import Names
from dmrpc_cxl.errors import BadSize, CoordinatorReplaced, ServiceTableFull

SLOT = LAYOUT["SERVICE_SLOT_BYTES"]


@pytest.fixture
def device():
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    format_device(fd, "services", 16 * 4096, 4096, 2, 16)
    with Device(fd) as device:
        yield device
    os.close(fd)


def poke(device, slot, offset, data):
    at = device.superblock["service_table_off"] + slot * SLOT + offset
    os.pwrite(device.fileno(), data, at)


def names_in(device):
    return {entry["name"]: entry["endpoint"] for entry in device.services()}


@pytest.mark.parametrize("size", [0, 1, 400, 464, 465, 4096])
def test_an_entry_of_any_length_is_read_as_it_was_written(device, size):
    endpoint = bytes(number % 251 for number in range(size))
    device.publish(1, 77, b"before", b"1")
    device.publish(2, 78, b"name" * 20, endpoint)
    (_, entry) = device.services()
    assert (entry["host"], entry["incarnation"], entry["damaged"]) == (2, 78, False)
    assert (entry["name"], entry["endpoint"]) == (b"name" * 20, endpoint)


@pytest.mark.parametrize(
    ("name", "endpoint"), [(b"", b"1"), (b"x" * 1024, b""), (b"x", b"y" * 4097)]
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(device, name, endpoint):
    with pytest.raises(BadSize):
        device.publish(1, 1, name, endpoint)
    assert device.services() == []


def test_an_entry_whose_last_store_is_missing_is_not_there_and_its_slots_are_free(device):
    slot, _ = device.publish(1, 1, b"long", b"x" * 3000)
    poke(device, slot, 0, struct.pack("<I", 0))  # the state, which is written last
    assert device.services() == []
    assert device.publish(1, 1, b"other", b"y")[0] == slot


def test_slots_that_were_withdrawn_are_used_again_without_end(device):
    for number in range(2000):
        place = device.publish(1, 1, b"name", b"x" * (number % 4000))
        assert len(device.services()) == 1
        device.withdraw(*place)
    assert device.services() == []


def test_a_full_table_refuses_and_keeps_what_it_has(device):
    count = device.superblock["nr_services"]
    for number in range(count - 1):
        device.publish(1, 1, b"%d" % number, b"")
    with pytest.raises(ServiceTableFull):
        device.publish(1, 1, b"long", b"x" * 1000)
    device.publish(1, 1, b"short", b"")
    assert len(names_in(device)) == count


def test_withdrawing_an_entry_that_was_replaced_leaves_the_new_one(device):
    slot, serial = device.publish(1, 1, b"old", b"")
    device.withdraw(slot, serial)
    assert device.publish(1, 1, b"new", b"")[0] == slot
    device.withdraw(slot, serial)
    assert names_in(device) == {b"new": b""}


@pytest.mark.parametrize("offset", [4, 8, 16, 24, 32, 36, 40, 48])
def test_a_damaged_entry_is_told_and_removed_at_the_next_start(device, offset):
    slot, _ = device.publish(1, 1, b"name", b"7" * 1000)
    poke(device, slot, offset, b"\xee")
    device.publish(1, 1, b"good", b"8")
    assert [entry["damaged"] for entry in device.services()].count(True) == 1
    Directory(device, Names()).restore({1: 1})
    assert names_in(device) == {b"good": b"8"}


def test_of_two_entries_that_a_crash_left_the_later_one_counts(device):
    device.publish(1, 1, b"name", b"1")
    device.publish(1, 1, b"name", b"2")
    directory = Directory(device, Names())
    directory.restore({1: 1})
    assert directory.lookup("name").endpoint == 2
    assert names_in(device) == {b"name": b"2"}


def test_names_of_hosts_that_are_gone_are_removed_at_the_next_start(device):
    device.publish(1, 11, b"stays", b"1")
    device.publish(1, 10, b"earlier incarnation", b"1")
    device.publish(2, 12, b"gone", b"1")
    Directory(device, Names()).restore({1: 11})
    assert names_in(device) == {b"stays": b"1"}


def test_who_was_replaced_publishes_and_withdraws_nothing(device):
    place = device.publish(1, 1, b"name", b"1")
    device.fence_epoch = device.start_coordinator(os.getpid(), 1, "/nowhere", "", 0)
    device.publish(1, 1, b"still", b"1")
    device.start_coordinator(os.getpid(), 2, "/nowhere", "", 0)
    for change in (
        lambda: device.publish(1, 1, b"late", b"1"),
        lambda: device.withdraw(*place),
        lambda: device.transfer(0, 1, 0, 1),
    ):
        with pytest.raises(CoordinatorReplaced):
            change()
    assert set(names_in(device)) == {b"name", b"still"}
    assert device.frame(0) == (0, 0, 0)

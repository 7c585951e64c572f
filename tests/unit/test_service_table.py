"""The service table of the device: what is in it is whole, whatever came in between."""

import os
import signal

import pytest

from dmrpc_cxl._native import LAYOUT, Device, crash_at, format_device
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


def dies_at(label, do, n=1):
    """Let a process do it that is killed at the n-th pass of a label."""
    pid = os.fork()
    if pid == 0:
        try:
            crash_at(label, n)
            do()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("size", [1, 500, 4000])
def test_an_entry_that_was_not_completed_is_not_there_and_its_slots_are_free(device, size):
    device.publish(2, 2, b"other", b"1")
    dies_at("service_written", lambda: device.publish(1, 1, b"long", b"x" * size))
    assert names_in(device) == {b"other": b"1"}
    assert device.publish(1, 1, b"next", b"y")[0] == 1


@pytest.mark.parametrize("size", [1, 500, 4000])
def test_an_entry_that_was_completed_is_there_whole_whatever_became_of_its_maker(device, size):
    dies_at("service_live", lambda: device.publish(1, 1, b"long", b"x" * size))
    assert names_in(device) == {b"long": b"x" * size}


STEPS = [("service_written", 1), ("service_live", 2), ("service_withdrawn", 2), ("published", 2)]


@pytest.mark.parametrize(("label", "counts"), STEPS)
def test_a_name_that_was_being_published_anew_has_its_old_endpoint_or_its_new_one(
    device, label, counts
):
    directory = Directory(device, Names())
    directory.publish("name", 1, 1, 1)
    dies_at(label, lambda: directory.publish("name", 2, 1, 1))
    successor = Directory(device, Names())
    successor.restore({1: 1})
    assert successor.lookup("name").endpoint == counts
    assert names_in(device) == {b"name": b"%d" % counts}


def test_a_withdrawal_counts_from_its_store_on(device):
    directory = Directory(device, Names())
    directory.publish("name", 1, 1, 1)
    directory.publish("other", 2, 1, 1)
    dies_at("service_withdrawn", lambda: directory.withdraw("name", 1))
    successor = Directory(device, Names())
    successor.restore({1: 1})
    assert [service.name for service in successor.with_prefix()] == ["other"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_names_of_a_dead_host_go_however_often_those_die_who_remove_them(device, n):
    directory = Directory(device, Names())
    for number in range(4):
        directory.publish(f"name-{number}", "x" * 1000, 1, 1)
    directory.publish("stays", 1, 2, 2)
    dies_at("service_withdrawn", lambda: directory.forget_host(1), n)
    assert len(device.services()) == 5 - n
    dies_at("service_withdrawn", lambda: Directory(device, Names()).restore({2: 2}))
    Directory(device, Names()).restore({2: 2})
    assert names_in(device) == {b"stays": b"1"}


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

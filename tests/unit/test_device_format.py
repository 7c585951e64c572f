"""The device format as Python sees it: what is written, and what is refused.

The superblock is taken apart and put together here with a layout and a checksum of this file's own, so that the format
cannot change unnoticed.
"""

import gc
import itertools
import os
import struct

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dmrpc_cxl import _native, errors
from dmrpc_cxl._native import COUNTERS, LAYOUT, WIRE, Device, format_device, geometry

PAGE_SIZES = (4096, 16384, 65536)
NR_FRAMES = 40
MAX_HOSTS = 3
MAX_REFS = 16

SUPERBLOCK = struct.Struct("<QIIQQQIIQQQQQQQQQQ64s32sQ")
FIELDS = (
    *("magic", "version", "page_size", "fabric_id", "device_bytes", "nr_frames"),
    *(
        "max_hosts",
        "max_refs",
        "host_table_off",
        "ref_table_off",
        "service_table_off",
        "nr_services",
        "frame_table_off",
    ),
    *("page_table_off", "ptes_per_host", "vma_pages", "data_off", "created_ns"),
    *("name", "secret", "checksum"),
)
CHECKED_BYTES = SUPERBLOCK.size - 8

REFUSALS = (
    errors.NotADevice,
    errors.DeviceTruncated,
    errors.DeviceVersionMismatch,
    errors.DeviceCorrupt,
)


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def unnamed_file():
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


@pytest.fixture(params=PAGE_SIZES)
def page_size(request):
    return request.param


@pytest.fixture
def device_fd(page_size):
    """Open an intact device in a file without a name."""
    fd = unnamed_file()
    format_device(fd, "format-test", NR_FRAMES * page_size, page_size, MAX_HOSTS, MAX_REFS)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def no_descriptor_is_leaked():
    gc.collect()  # what other tests left to the garbage collector is not ours to count
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def read_superblock(fd):
    return dict(zip(FIELDS, SUPERBLOCK.unpack(os.pread(fd, SUPERBLOCK.size, 0)), strict=True))


def write_superblock(fd, fields, checksum=None):
    """Write a superblock, with the checksum that its fields give unless another one is wanted."""
    data = SUPERBLOCK.pack(*fields.values())
    right = fnv1a(data[:CHECKED_BYTES])
    os.pwrite(fd, data[:-8] + struct.pack("<Q", right if checksum is None else checksum), 0)


def refusal_of(fd):
    """Return the exception that the device in fd is refused with, and its text."""
    with pytest.raises(REFUSALS) as caught:
        Device(fd)
    return caught.type, str(caught.value)


# ---------------------------------------------------------------- geometry


@given(
    nr_frames=st.integers(1, LAYOUT["MAX_FRAMES"]),
    page_size=st.sampled_from(PAGE_SIZES),
    max_hosts=st.integers(1, LAYOUT["MAX_HOSTS"]),
    max_refs=st.integers(1, LAYOUT["MAX_REFS"]),
)
@example(LAYOUT["MAX_FRAMES"], 65536, LAYOUT["MAX_HOSTS"], LAYOUT["MAX_REFS"])
@example(1, 4096, 1, 1)
def test_areas_follow_each_other_aligned(nr_frames, page_size, max_hosts, max_refs):
    g = geometry(nr_frames * page_size, page_size, max_hosts, max_refs)
    page_table_bytes = 4 * g["ptes_per_host"]
    areas = [
        (0, LAYOUT["SUPERBLOCK_BYTES"]),
        (g["host_table_off"], max_hosts * LAYOUT["HOST_ENTRY_BYTES"]),
        (g["ref_table_off"], max_refs * LAYOUT["REF_ENTRY_BYTES"]),
        (g["service_table_off"], g["nr_services"] * LAYOUT["SERVICE_SLOT_BYTES"]),
        (g["frame_table_off"], nr_frames * 8),
        (g["page_table_off"], max_hosts * page_table_bytes),
        (g["data_off"], nr_frames * page_size),
    ]
    for (start, size), (following, _) in itertools.pairwise(areas):
        assert start + size <= following
    assert all(start % 4096 == 0 for start, _ in areas)
    assert g["data_off"] % LAYOUT["DATA_ALIGN"] == 0
    assert g["device_bytes"] == sum(areas[-1])
    assert page_table_bytes % 4096 == 0  # a host slot is allocated and emptied alone
    assert g["ptes_per_host"] == 2 * nr_frames + g["vma_pages"]
    assert 0 <= g["vma_pages"] - max(2 * nr_frames, 65536) < 1024


@pytest.mark.parametrize(
    ("data_bytes", "page_size", "max_hosts", "max_refs"),
    [
        (4096, 8192, 1, 1),
        (0, 4096, 1, 1),
        (4097, 4096, 1, 1),
        (4096, 4096, 0, 1),
        (4096, 4096, 1025, 1),
        (4096, 4096, 1, 0),
        (2**50, 4096, 1, 1),
    ],
)
def test_impossible_geometry_is_bad_size(data_bytes, page_size, max_hosts, max_refs):
    with pytest.raises(errors.BadSize, match=r"geometry: ."):
        geometry(data_bytes, page_size, max_hosts, max_refs)


# ---------------------------------------------------------------- what format writes


def test_superblock_is_laid_out_as_documented(device_fd, page_size):
    fields = read_superblock(device_fd)
    assert LAYOUT["SUPERBLOCK_CHECKED_BYTES"] == CHECKED_BYTES
    assert fields["magic"].to_bytes(8, "little") == b"DRC-GFAM"
    assert fields["version"] == LAYOUT["LAYOUT_VERSION"]
    assert fields["name"].rstrip(b"\0") == b"format-test"
    assert fields["fabric_id"] != 0
    assert len(set(fields["secret"])) > 8
    assert fields["checksum"] == fnv1a(os.pread(device_fd, CHECKED_BYTES, 0))
    expected = geometry(NR_FRAMES * page_size, page_size, MAX_HOSTS, MAX_REFS)
    assert {name: fields[name] for name in expected} == expected


def test_device_reports_the_superblock_that_is_in_the_file(device_fd):
    fields = read_superblock(device_fd)
    fields["name"] = "format-test"
    del fields["magic"]
    with Device(device_fd) as device:
        found = device.superblock
    assert {name: found[name] for name in fields} == fields
    assert found["coordinator_epoch"] == found["coordinator_pid"] == 0


def test_all_frames_of_a_new_device_are_in_the_pool(device_fd):
    with Device(device_fd) as device:
        assert device.free_runs(LAYOUT["OWNER_POOL"]) == [(0, NR_FRAMES)]
        assert device.hosts() == []
        assert device.refs() == []
        audit = device.audit()
    assert (audit["pool"], audit["in_use"], audit["nr_violations"]) == (NR_FRAMES, 0, 0)


def test_two_devices_never_share_id_or_secret(device_fd):
    first = read_superblock(device_fd)
    format_device(
        device_fd, "again", first["nr_frames"] * first["page_size"], first["page_size"], 3, 16
    )
    second = read_superblock(device_fd)
    assert first["fabric_id"] != second["fabric_id"]
    assert first["secret"] != second["secret"]


def test_format_into_a_file_of_another_size_is_refused():
    fd = unnamed_file()
    try:
        os.truncate(fd, 5000)
        with pytest.raises(errors.BadSize, match="5000 bytes"):
            format_device(fd, "x", 4096, 4096, 1, 1)
        assert os.pread(fd, 8, 0) == bytes(8)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- what open refuses


def test_flip_of_any_byte_of_the_checked_part_is_refused(device_fd):
    for offset in range(SUPERBLOCK.size):
        (byte,) = os.pread(device_fd, 1, offset)
        os.pwrite(device_fd, bytes([byte ^ 0xFF]), offset)
        kind, _ = refusal_of(device_fd)
        expected: type[errors.DeviceError] = errors.DeviceCorrupt
        if offset < 8:
            expected = errors.NotADevice
        elif offset < 12:
            expected = errors.DeviceVersionMismatch
        assert kind is expected, offset
        os.pwrite(device_fd, bytes([byte]), offset)
    Device(device_fd).close()


@given(
    offset=st.integers(0, CHECKED_BYTES - 1),
    data=st.binary(min_size=1, max_size=CHECKED_BYTES),
)
def test_any_overwriting_of_the_checked_part_is_refused(offset, data):
    fd = unnamed_file()
    try:
        format_device(fd, "x", 4096, 4096, 1, 1)
        before = os.pread(fd, CHECKED_BYTES, 0)
        os.pwrite(fd, data[: CHECKED_BYTES - offset], offset)
        if os.pread(fd, CHECKED_BYTES, 0) == before:
            Device(fd).close()
        else:
            refusal_of(fd)
    finally:
        os.close(fd)


@given(data=st.binary(max_size=3 * SUPERBLOCK.size))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data):
    fd = unnamed_file()
    try:
        os.pwrite(fd, data, 0)
        refusal_of(fd)
    finally:
        os.close(fd)


_NUMBERS = [
    name for name in FIELDS if name not in ("magic", "version", "name", "secret", "checksum")
]
# Any value of these is right.
_GEOMETRY = [name for name in _NUMBERS if name not in ("fabric_id", "created_ns")]


@given(field=st.sampled_from(_GEOMETRY), value=st.integers(0, 2**64 - 1))
@example("nr_frames", 2**64 - 1)
@example("device_bytes", 2**64 - 1)
@example("data_off", 0)
@example("page_size", 0)
@example("max_hosts", 2**32 - 1)
def test_superblock_with_right_checksum_and_wrong_geometry_is_refused(field, value):
    fd = unnamed_file()
    try:
        format_device(fd, "x", 40 * 4096, 4096, 3, 16)
        fields = read_superblock(fd)
        if field in ("page_size", "max_hosts", "max_refs"):
            value %= 2**32
        # Up to 32 Refs fit into the one block that their table has: a smaller table is sound, too.
        assume(value != fields[field])
        assume(not (field == "max_refs" and 1 <= value <= 32))
        write_superblock(fd, {**fields, field: value})
        kind, _ = refusal_of(fd)
        assert kind is errors.DeviceCorrupt
    finally:
        os.close(fd)


@pytest.mark.parametrize("field", ["host_table_off", "frame_table_off", "data_off", "vma_pages"])
def test_refusal_of_wrong_geometry_names_the_field(device_fd, field):
    fields = read_superblock(device_fd)
    write_superblock(device_fd, {**fields, field: fields[field] + 4096})
    _, text = refusal_of(device_fd)
    assert field in text
    assert str(fields[field]) in text


def test_wrong_checksum_is_refused_as_corrupt(device_fd):
    write_superblock(device_fd, read_superblock(device_fd), checksum=1)
    kind, text = refusal_of(device_fd)
    assert kind is errors.DeviceCorrupt
    assert "checksum" in text
    assert "create the device again" in text


def test_fabric_id_of_zero_is_refused(device_fd):
    write_superblock(device_fd, {**read_superblock(device_fd), "fabric_id": 0})
    assert refusal_of(device_fd)[0] is errors.DeviceCorrupt


@pytest.mark.parametrize("name", [bytes(64), b"x" * 64])
def test_name_that_is_empty_or_does_not_end_is_refused(device_fd, name):
    write_superblock(device_fd, {**read_superblock(device_fd), "name": name})
    kind, text = refusal_of(device_fd)
    assert kind is errors.DeviceCorrupt
    assert "name" in text


def test_other_layout_version_is_refused_with_both_versions(device_fd):
    write_superblock(device_fd, {**read_superblock(device_fd), "version": 77})
    kind, text = refusal_of(device_fd)
    assert kind is errors.DeviceVersionMismatch
    assert "77" in text
    assert f"reads {LAYOUT['LAYOUT_VERSION']}" in text


def test_other_layout_version_is_told_before_the_checksum(device_fd):
    """A later version may checksum other bytes."""
    write_superblock(
        device_fd,
        {**read_superblock(device_fd), "version": LAYOUT["LAYOUT_VERSION"] + 1},
        checksum=1,
    )
    assert refusal_of(device_fd)[0] is errors.DeviceVersionMismatch


@pytest.mark.parametrize("cut", ["last byte", "data area", "superblock", "magic only"])
def test_truncated_device_is_refused(device_fd, cut):
    fields = read_superblock(device_fd)
    size = {
        "last byte": fields["device_bytes"] - 1,
        "data area": fields["data_off"],
        "superblock": LAYOUT["SUPERBLOCK_BYTES"] - 1,
        "magic only": 8,
    }[cut]
    os.truncate(device_fd, size)
    kind, text = refusal_of(device_fd)
    assert kind is errors.DeviceTruncated
    assert str(size) in text


def test_device_with_bytes_appended_is_refused(device_fd):
    os.truncate(device_fd, read_superblock(device_fd)["device_bytes"] + 4096)
    kind, text = refusal_of(device_fd)
    assert kind is errors.DeviceCorrupt
    assert "appended" in text


@pytest.mark.parametrize("content", [b"", bytes(8192), b"DRC-GFA", b"hello, world\n" * 1000])
def test_foreign_file_is_not_a_device(content):
    fd = unnamed_file()
    try:
        os.pwrite(fd, content, 0)
        assert refusal_of(fd)[0] is errors.NotADevice
    finally:
        os.close(fd)


def test_interrupted_format_is_not_a_device(device_fd):
    os.pwrite(device_fd, bytes(8), 0)  # all is written but the magic, which comes last
    kind, text = refusal_of(device_fd)
    assert kind is errors.NotADevice
    assert "interrupted" in text


def test_directory_and_pipe_are_not_devices():
    directory = os.open("/dev/shm", os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        for fd in (directory, read_end):
            assert refusal_of(fd)[0] is errors.NotADevice
    finally:
        for fd in (directory, read_end, write_end):
            os.close(fd)


def test_closed_descriptor_is_reported_with_operation_and_system_call():
    with pytest.raises(errors.SystemCallFailed, match=r"open device: .*fstat: Bad file descriptor"):
        Device(987654)


# ---------------------------------------------------------------- using a device


def test_changes_made_through_one_mapping_are_seen_through_another(device_fd):
    with Device(device_fd) as one, Device(device_fd, writable=False) as other:
        one.activate_host(2, 4321, 99, 7, "worker", 5)
        assert one.transfer(10, 20, LAYOUT["OWNER_POOL"], 2) == 20
        assert other.free_runs(2) == [(10, 20)]
        assert other.frame(10) == (0, 2, 0)
        (host,) = other.hosts()
    assert (host["host"], host["pid"], host["start_time"], host["name"]) == (2, 4321, 99, "worker")
    assert (host["incarnation"], host["frame_limit"]) == (7, 5)
    assert set(host["counters"].values()) == {0}


def test_read_only_device_refuses_changes(device_fd):
    with Device(device_fd, writable=False) as device:
        with pytest.raises(errors.SystemCallFailed, match="read-only"):
            device.transfer(0, 1, 0, 1)
        with pytest.raises(errors.SystemCallFailed, match="read-only"):
            device.activate_host(1, 1, 1, 1, "x", 0)
        assert not device.stop_coordinator(0)


def test_free_runs_of_a_scattered_owner_are_complete(device_fd):
    with Device(device_fd) as device:
        device.activate_host(1, 1, 1, 1, "x", 0)
        for pfn in range(0, NR_FRAMES, 2):
            device.transfer(pfn, 1, 0, 1)
        assert device.free_runs(1) == [(pfn, 1) for pfn in range(0, NR_FRAMES, 2)]
        assert device.free_runs(0) == [(pfn, 1) for pfn in range(1, NR_FRAMES, 2)]


def test_more_runs_than_one_native_call_returns_are_listed():
    fd = unnamed_file()
    try:
        nr_frames = 10_001
        format_device(fd, "x", nr_frames * 4096, 4096, 1, 1)
        with Device(fd) as device:
            for pfn in range(0, nr_frames, 2):
                device.transfer(pfn, 1, 0, 1)
            assert device.free_runs(0) == [(pfn, 1) for pfn in range(1, nr_frames, 2)]
    finally:
        os.close(fd)


def test_a_host_name_is_cut_between_characters(device_fd):
    with Device(device_fd) as device:
        device.activate_host(1, 1, 1, 1, "é" * 60, 0)
        assert device.host(1)["name"] == "é" * 31


def test_an_active_entry_is_not_given_away(device_fd):
    with Device(device_fd) as device:
        device.activate_host(1, 1, 1, 1, "first", 0)
        with pytest.raises(errors.BufferInUse):
            device.activate_host(1, 2, 2, 2, "second", 0)
        assert device.host(1)["name"] == "first"


def test_a_free_entry_keeps_the_incarnation_of_its_last_host(device_fd):
    with Device(device_fd) as device:
        device.activate_host(1, 1, 1, 12345, "x", 0)
        assert device.set_host_state(1, LAYOUT["HOST_ACTIVE"], LAYOUT["HOST_FREE"])
        assert device.hosts() == []
        assert device.host(1)["incarnation"] == 12345


@pytest.mark.parametrize("host", [0, MAX_HOSTS + 1])
def test_host_ids_outside_the_table_are_refused(device_fd, host):
    with Device(device_fd) as device:
        with pytest.raises(errors.BadSize):
            device.host(host)
        with pytest.raises(errors.BadSize):
            device.activate_host(host, 1, 1, 1, "x", 0)


def test_coordinator_fields_change_hands_by_epoch(device_fd):
    with Device(device_fd) as device:
        first = device.start_coordinator(100, 5, "/run/a.sock", "::1", 7000)
        assert device.superblock["unix_path"] == "/run/a.sock"
        second = device.start_coordinator(200, 6, "", "localhost", 7001)
        assert second == first + 1
        assert not device.stop_coordinator(first)
        found = device.superblock
        assert (found["coordinator_pid"], found["tcp_host"], found["tcp_port"]) == (
            200,
            "localhost",
            7001,
        )
        assert device.stop_coordinator(second)
        found = device.superblock
        assert (found["coordinator_pid"], found["tcp_host"], found["unix_path"]) == (0, "", "")
        assert found["coordinator_epoch"] == second


def test_a_socket_path_that_does_not_fit_is_refused_and_changes_nothing(device_fd):
    room = LAYOUT["UNIX_PATH_BYTES"]
    with Device(device_fd) as device:
        device.start_coordinator(1, 1, "/" + "x" * (room - 2), "", 0)
        with pytest.raises(errors.BadSize, match=f"{room} bytes"):
            device.start_coordinator(2, 1, "/" + "x" * (room - 1), "", 0)
        assert device.superblock["coordinator_pid"] == 1


def test_closed_device_refuses_everything(device_fd):
    device = Device(device_fd)
    device.close()
    device.close()
    for use in (
        lambda: device.superblock,
        lambda: device.frame(0),
        lambda: device.free_runs(0),
        lambda: device.transfer(0, 1, 0, 1),
        device.hosts,
        lambda: device.host(1),
        device.refs,
        device.audit,
        lambda: device.prefault(0, 1),
        lambda: device.start_coordinator(1, 1, "", "", 0),
        lambda: device.stop_coordinator(1),
        lambda: device.activate_host(1, 1, 1, 1, "x", 0),
        lambda: device.set_host_state(1, 0, 1),
        device.fileno,
    ):
        with pytest.raises(errors.HostClosed):
            use()


# ---------------------------------------------------------------- constants from the headers


def test_counters_have_distinct_names_and_all_are_in_a_host_entry(device_fd):
    names = [name for name, text in COUNTERS if text]
    assert len(set(names)) == len(COUNTERS)
    with Device(device_fd) as device:
        assert list(device.host(1)["counters"]) == names


def test_wire_formats_pack_as_many_values_as_they_have_fields():
    for layout, fields in WIRE["structs"].values():
        size = struct.calcsize(layout)
        assert len(struct.unpack(layout, bytes(size))) == len(fields)
    assert struct.calcsize(WIRE["structs"]["header"][0]) == 24
    assert WIRE["magic"].to_bytes(4, "little") == b"DMRD"
    for table in ("types", "status"):
        assert len(set(WIRE[table].values())) == len(WIRE[table])


def test_no_constant_is_negative():
    assert min(LAYOUT.values()) >= 0
    assert _native.LAYOUT["NO_FRAME"] == 2**32 - 1

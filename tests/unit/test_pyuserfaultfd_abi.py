"""pyuserfaultfd: numbers and layouts, the decoding of messages, addresses of buffers."""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import subprocess

import pytest

from pyuserfaultfd import (
    PAGE_SIZE,
    Feature,
    Fork,
    Ioctl,
    PageFault,
    RegisterMode,
    Remap,
    UnknownEvent,
    UserFaultFD,
    _abi,
    address_of,
    supported_features,
)
from tests.unit import pyuserfaultfd_peer as peer

nothing_left = peer.nothing_left

STRUCTS = {
    "uffd_msg": _abi.MESSAGE_STRUCT,
    "uffdio_api": _abi.API_STRUCT,
    "uffdio_range": _abi.RANGE_STRUCT,
    "uffdio_register": _abi.REGISTER_STRUCT,
    "uffdio_copy": _abi.COPY_STRUCT,
    "uffdio_move": _abi.MOVE_STRUCT,
    "uffdio_zeropage": _abi.FILL_STRUCT,
    "uffdio_continue": _abi.FILL_STRUCT,
    "uffdio_poison": _abi.FILL_STRUCT,
    "uffdio_writeprotect": _abi.WRITEPROTECT_STRUCT,
}

# C name -> our value. A name that the installed header lacks is left out of the comparison.
CONSTANTS = {
    **{f"UFFD_FEATURE_{feature.name}": int(feature) for feature in Feature},
    **{f"UFFDIO_REGISTER_MODE_{mode.name}": int(mode) for mode in RegisterMode},
    **{f"((__u64)1 << _UFFDIO_{one.name})": int(one) for one in Ioctl},
    **{
        f"UFFDIO_{name}": getattr(_abi, f"UFFDIO_{name}")
        for name in (
            *("API", "REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "MOVE", "WRITEPROTECT"),
            *("CONTINUE", "POISON"),
        )
    },
    **{f"UFFD_EVENT_{one}": getattr(_abi, f"EVENT_{one}") for one in ("FORK", "REMAP", "UNMAP")},
    "UFFD_EVENT_PAGEFAULT": _abi.EVENT_PAGEFAULT,
    "UFFD_EVENT_REMOVE": _abi.EVENT_REMOVE,
    "UFFD_PAGEFAULT_FLAG_WRITE": _abi.PAGEFAULT_FLAG_WRITE,
    "UFFD_PAGEFAULT_FLAG_WP": _abi.PAGEFAULT_FLAG_WP,
    "UFFD_PAGEFAULT_FLAG_MINOR": _abi.PAGEFAULT_FLAG_MINOR,
    "UFFD_API": _abi.API,
    "UFFD_USER_MODE_ONLY": _abi.USER_MODE_ONLY,
    "USERFAULTFD_IOC_NEW": _abi.USERFAULTFD_IOC_NEW,
    "UFFDIO_COPY_MODE_DONTWAKE": _abi.MODE_DONTWAKE,
    "UFFDIO_COPY_MODE_WP": _abi.COPY_MODE_WP,
    "UFFDIO_ZEROPAGE_MODE_DONTWAKE": _abi.MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_DONTWAKE": _abi.MODE_DONTWAKE,
    "UFFDIO_CONTINUE_MODE_WP": _abi.CONTINUE_MODE_WP,
    "UFFDIO_POISON_MODE_DONTWAKE": _abi.MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_DONTWAKE": _abi.MODE_DONTWAKE,
    "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES": _abi.MOVE_MODE_ALLOW_SRC_HOLES,
    "UFFDIO_WRITEPROTECT_MODE_WP": _abi.WRITEPROTECT_MODE_WP,
    "UFFDIO_WRITEPROTECT_MODE_DONTWAKE": _abi.WRITEPROTECT_MODE_DONTWAKE,
    "__NR_userfaultfd": _abi.syscall_number(),
}


# ---------------------------------------------------------------- numbers


def test_all_constants_agree_with_the_c_header_where_it_has_them():
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to read the header with")
    source = "#include <sys/syscall.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\n"
    found = subprocess.run(
        [compiler, "-E", "-dM", "-"], input=source, capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("linux/userfaultfd.h is not installed")
    defined = set(re.findall(r"#define (\w+)", found.stdout))
    known = {name for name in CONSTANTS if re.findall(r"_*U\w+|__NR\w+", name)[-1] in defined}
    assert "UFFDIO_COPY" in known
    checks = [f"_Static_assert({name} == {CONSTANTS[name]}ull, {name!r});" for name in known]
    checks += [
        f"_Static_assert(sizeof(struct {name}) == {layout.size}, {name!r});"
        for name, layout in STRUCTS.items()
        if name.upper() in defined or name in ("uffd_msg", "uffdio_range")
    ]
    program = source + "\n".join(checks).replace("'", '"')
    checked = subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c", "-"],
        input=program,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("machine", "api", "unregister", "new"),
    [
        ("x86_64", 0xC018AA3F, 0x8010AA01, 0x0000AA00),
        ("aarch64", 0xC018AA3F, 0x8010AA01, 0x0000AA00),
        ("riscv64", 0xC018AA3F, 0x8010AA01, 0x0000AA00),
        ("ppc64le", 0xC018AA3F, 0x4010AA01, 0x2000AA00),
        ("mips64", 0xC018AA3F, 0x4010AA01, 0x2000AA00),
        ("sparc64", 0xC018AA3F, 0x4010AA01, 0x2000AA00),
    ],
)
def test_request_numbers_follow_the_architecture(machine: str, api: int, unregister: int, new: int):
    direction = _abi.Direction
    assert _abi.ioctl_number(direction.READ_WRITE, 0x3F, 24, machine) == api
    assert _abi.ioctl_number(direction.READ, 0x01, 16, machine) == unregister
    assert _abi.ioctl_number(direction.NONE, 0x00, 0, machine) == new


@pytest.mark.parametrize(
    ("machine", "bits", "number"),
    [
        ("x86_64", 64, 323),
        ("x86_64", 32, 374),
        ("i686", 32, 374),
        ("aarch64", 64, 282),
        ("aarch64", 32, 388),
        ("armv7l", 32, 388),
        ("riscv64", 64, 282),
        ("ppc64le", 64, 364),
        ("s390x", 64, 355),
        ("mips64", 64, 5317),
        ("a machine yet to be built", 64, None),
    ],
)
def test_system_call_number_follows_architecture_and_pointers(
    machine: str, bits: int, number: int | None
):
    assert _abi.syscall_number(machine, bits) == number


def test_every_feature_is_known_with_the_linux_that_brought_it():
    assert set(_abi.FEATURE_SINCE) == set(Feature)
    assert all(re.fullmatch(r"\d+\.\d+", since) for since in _abi.FEATURE_SINCE.values())


def test_running_kernel_has_no_feature_without_a_name():
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if version > (6, 18):
        pytest.skip(f"Linux {platform.release()} is younger than the table of features, 6.18")
    unnamed = int(supported_features()) & ~sum(int(feature) for feature in Feature)
    assert unnamed == 0


def test_running_kernel_has_every_feature_of_its_age_that_needs_no_configuration():
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    configurable = ("MISSING_", "MINOR_", "WP_", "PAGEFAULT_FLAG_WP", "MOVE")
    for feature, since in _abi.FEATURE_SINCE.items():
        assert feature.name is not None
        if not feature.name.startswith(configurable):
            old_enough = tuple(int(part) for part in since.split(".")) <= version
            assert bool(supported_features() & feature) == old_enough, feature


# ---------------------------------------------------------------- messages


def message(kind: int, *fields: int) -> bytes:
    return _abi.MESSAGE_STRUCT.pack(kind, *fields, *[0] * (3 - len(fields)))


def read_all(*messages: bytes):
    """Let a userfaultfd object read these bytes, from a pipe in the place of the kernel's end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with UserFaultFD.from_fd(reader, Feature(0)) as uffd:
        os.write(writer, b"".join(messages))
        os.close(writer)
        return uffd.read(timeout=0)


def test_events_of_one_read_keep_their_order():
    first = message(_abi.EVENT_REMAP, 0x1000, 0x2000, 0x3000)
    second = message(_abi.EVENT_PAGEFAULT, _abi.PAGEFAULT_FLAG_WRITE, 0x4000, 17)
    assert read_all(first, second) == [
        Remap(0x1000, 0x2000, 0x3000),
        PageFault(0x4000, write=True, wp=False, minor=False, thread_id=17),
    ]


@pytest.mark.parametrize("unknown", [message(0x17), message(0), message(0x12, 1 << 3, 0x5000)])
def test_unknown_event_or_flag_is_an_error_that_keeps_the_events_beside_it(unknown: bytes):
    fd = os.dup(0)
    fault = message(_abi.EVENT_PAGEFAULT, 0, 0x4000)
    with pytest.raises(UnknownEvent, match="unknown") as caught:
        read_all(message(_abi.EVENT_FORK, fd), unknown, fault)
    assert caught.value.raw == unknown
    fork, other = caught.value.others
    assert other == PageFault(0x4000, write=False, wp=False, minor=False)
    assert isinstance(fork, Fork)
    assert fork.uffd.fileno() == fd
    fork.uffd.close()


def test_events_are_values():
    fault = PageFault(0x1234, write=True, wp=False, minor=False)
    assert fault == PageFault(0x1234, write=True, wp=False, minor=False)
    assert len({fault, PageFault(0x1234, write=True, wp=False, minor=False)}) == 1
    with pytest.raises(AttributeError):
        fault.address = 0  # type: ignore[misc]


# ---------------------------------------------------------------- addresses


def test_address_of_a_mapping_begins_a_page_and_does_not_hold_it():
    memory = mmap.mmap(-1, 2 * PAGE_SIZE)
    address, length = address_of(memory)
    assert (address % PAGE_SIZE, length) == (0, 2 * PAGE_SIZE)
    memory.close()


def test_address_of_a_part_is_the_address_of_the_whole_plus_the_offset():
    memory = mmap.mmap(-1, 2 * PAGE_SIZE)
    whole = address_of(memory)
    with memoryview(memory) as view, view[PAGE_SIZE:] as part:
        assert address_of(part) == (whole.address + PAGE_SIZE, PAGE_SIZE)
        assert address_of(part).end == whole.end
    memory.close()


def test_address_of_refuses_buffers_that_have_no_one_writable_place():
    with pytest.raises(TypeError, match="writable"):
        address_of(b"read-only")
    with pytest.raises(TypeError):
        address_of(4096)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="contiguous"):
        address_of(memoryview(bytearray(8))[::2])
    with pytest.raises(ValueError, match="empty"):
        address_of(bytearray())

"""The kernel's binary interface to userfaultfd: numbers, flags and structures, each written once.

Nothing is taken from C headers. Those of the build machine are often older than the kernel that
runs (or newer), and what the kernel can do is asked of the kernel, in the handshake.

Rules:

- Every field of every structure is a fixed-width integer, so layouts are the same on all
  architectures.
- What does differ between architectures is how an ioctl's direction and size are packed into its
  number, and the number of the system call. Both are computed here, from the machine's name.
- Flags are IntFlags: a bit that a later kernel adds survives the trip through Python unnamed.
"""

from __future__ import annotations

import os
import struct
from enum import Enum, IntFlag
from typing import Final

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")
"""Bytes in a base page of this machine; what addresses and lengths must be multiples of."""

# ---------------------------------------------------------------- flags


class Feature(IntFlag):
    """What a userfaultfd can be asked to do, in the handshake (UFFD_FEATURE_*).

    ``EVENT_*`` ask for that event to be reported. ``MISSING_*``, ``MINOR_*`` and
    ``WP_HUGETLBFS_SHMEM`` only tell what the kernel can do with other memory than private
    anonymous; they are true whether asked for or not. The rest change how faults are delivered or
    which operations exist.

    >>> Feature.MOVE | Feature.POISON in Feature.MOVE | Feature.POISON | Feature.SIGBUS
    True
    """

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


FEATURE_SINCE: Final[dict[Feature, str]] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
}
"""The Linux release that introduced each feature. (An architecture may have got it later.)"""

USER_MODE_ONLY_SINCE: Final = "5.11"
DEVICE_SINCE: Final = "6.1"

# Set by the kernel in the features that it prints for a descriptor whose handshake is done.
FEATURE_INITIALIZED: Final = 1 << 31


class RegisterMode(IntFlag):
    """Which faults in a range are reported (UFFDIO_REGISTER_MODE_*)."""

    MISSING = 1 << 0
    """No page is there yet."""
    WP = 1 << 1
    """A write to a page that :meth:`~pyuserfaultfd.UserFaultFD.writeprotect` protected."""
    MINOR = 1 << 2
    """The page is in the page cache (shmem, hugetlbfs) but not in this page table."""


class Ioctl(IntFlag):
    """Which operations the kernel offers for a range: bit n stands for ioctl number n."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


class Method(Enum):
    """How to get a userfaultfd from the kernel."""

    AUTO = "auto"
    """The system call; the device where the system call is refused or missing."""
    SYSCALL = "syscall"
    """userfaultfd(2)."""
    DEVICE = "device"
    """/dev/userfaultfd, for whoever has permission on that file (Linux 6.1)."""


USER_MODE_ONLY: Final = 1
"""Flag of the system call: report no faults that the kernel itself takes, as in read(2)."""

# Mode bits of the operations; bit 0 has this meaning in all of them but WRITEPROTECT.
MODE_DONTWAKE: Final = 1 << 0
COPY_MODE_WP: Final = 1 << 1
CONTINUE_MODE_WP: Final = 1 << 1
MOVE_MODE_ALLOW_SRC_HOLES: Final = 1 << 1
WRITEPROTECT_MODE_WP: Final = 1 << 0
WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1

# ---------------------------------------------------------------- structures

API: Final = 0xAA

# An integer that the kernel writes stands last, and is signed where it may be a negative errno.
API_STRUCT: Final = struct.Struct("=QQQ")  # api, features, ioctls
RANGE_STRUCT: Final = struct.Struct("=QQ")  # start, len
REGISTER_STRUCT: Final = struct.Struct("=QQQQ")  # start, len, mode; ioctls
COPY_STRUCT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode; copy
MOVE_STRUCT: Final = COPY_STRUCT  # dst, src, len, mode; move
FILL_STRUCT: Final = struct.Struct("=QQQq")  # start, len, mode; bytes (zeropage, continue, poison)
WRITEPROTECT_STRUCT: Final = struct.Struct("=QQQ")  # start, len, mode

#   uffd_msg:   0        1         8                16               24              32
#               | event  | padding | argument 0     | argument 1     | argument 2    |
#   page fault    0x12               flags            address          thread id u32
#   fork          0x13               descriptor u32
#   remap         0x14               from             to               length
#   remove        0x15               start            end
#   unmap         0x16               start            end
MESSAGE_STRUCT: Final = struct.Struct("=B7xQQQ")
PAGEFAULT_STRUCT: Final = struct.Struct("=B7xQQI4x")
FORK_STRUCT: Final = struct.Struct("=B7xI20x")
EVENT_PAGEFAULT: Final = 0x12
EVENT_FORK: Final = 0x13
EVENT_REMAP: Final = 0x14
EVENT_REMOVE: Final = 0x15
EVENT_UNMAP: Final = 0x16

PAGEFAULT_FLAG_WRITE: Final = 1 << 0
PAGEFAULT_FLAG_WP: Final = 1 << 1
PAGEFAULT_FLAG_MINOR: Final = 1 << 2

# ---------------------------------------------------------------- numbers

MACHINE: Final = os.uname().machine
POINTER_BITS: Final = struct.calcsize("P") * 8


class Direction(Enum):
    """The direction in an ioctl's number, as seen from user space."""

    NONE = "none"
    READ = "read"
    READ_WRITE = "read and write"


def ioctl_number(direction: Direction, number: int, size: int, machine: str = MACHINE) -> int:
    """Compute the request number of a userfaultfd ioctl.

    Args:
        direction: which way the structure travels.
        number: the ioctl's own number, 0 to 0x3F.
        size: bytes in its structure.
        machine: the architecture, as uname(2) spells it.

    >>> hex(ioctl_number(Direction.READ_WRITE, 0x3F, 24, "x86_64"))
    '0xc018aa3f'
    """
    if machine.startswith(("ppc", "mips", "sparc", "alpha")):
        # Three bits of direction, 13 of size; "none" is a bit of its own.
        bits = {Direction.NONE: 1, Direction.READ: 2, Direction.READ_WRITE: 6}[direction]
        return bits << 29 | size << 16 | API << 8 | number
    bits = {Direction.NONE: 0, Direction.READ: 2, Direction.READ_WRITE: 3}[direction]
    return bits << 30 | size << 16 | API << 8 | number


def syscall_number(machine: str = MACHINE, pointer_bits: int = POINTER_BITS) -> int | None:
    """Return the number of userfaultfd(2), or None where it is not known.

    A 32-bit process on a 64-bit kernel sees the name of the 64-bit machine, hence ``pointer_bits``.
    """
    wide = pointer_bits == 64
    if machine == "x86_64":
        return 323 if wide else 374
    if machine == "aarch64":
        return 282 if wide else 388
    if machine.startswith("mips"):
        return 5317 if wide else 4357
    if len(machine) == 4 and machine.startswith("i") and machine.endswith("86"):
        return 374
    for prefix, number in (
        ("arm", 388),
        ("riscv", 282),
        ("loongarch", 282),
        ("ppc", 364),
        ("s390", 355),
        ("sparc", 352),
    ):
        if machine.startswith(prefix):
            return number
    return None


# WAKE and UNREGISTER are declared as reading although the kernel only takes; it is too late to
# mend.
USERFAULTFD_IOC_NEW: Final = ioctl_number(Direction.NONE, 0x00, 0)
UFFDIO_API: Final = ioctl_number(Direction.READ_WRITE, 0x3F, API_STRUCT.size)
UFFDIO_REGISTER: Final = ioctl_number(Direction.READ_WRITE, 0x00, REGISTER_STRUCT.size)
UFFDIO_UNREGISTER: Final = ioctl_number(Direction.READ, 0x01, RANGE_STRUCT.size)
UFFDIO_WAKE: Final = ioctl_number(Direction.READ, 0x02, RANGE_STRUCT.size)
UFFDIO_COPY: Final = ioctl_number(Direction.READ_WRITE, 0x03, COPY_STRUCT.size)
UFFDIO_ZEROPAGE: Final = ioctl_number(Direction.READ_WRITE, 0x04, FILL_STRUCT.size)
UFFDIO_MOVE: Final = ioctl_number(Direction.READ_WRITE, 0x05, MOVE_STRUCT.size)
UFFDIO_WRITEPROTECT: Final = ioctl_number(Direction.READ_WRITE, 0x06, WRITEPROTECT_STRUCT.size)
UFFDIO_CONTINUE: Final = ioctl_number(Direction.READ_WRITE, 0x07, FILL_STRUCT.size)
UFFDIO_POISON: Final = ioctl_number(Direction.READ_WRITE, 0x08, FILL_STRUCT.size)

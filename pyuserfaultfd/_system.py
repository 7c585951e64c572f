"""The two calls into the kernel, and how a descriptor is got from it.

Both calls go through ctypes, which lets go of the GIL while the kernel works and keeps what the
kernel wrote even when the call fails. The latter is why fcntl.ioctl is not used: recent CPython
drops the output of a failed call, and that output is how many bytes of a copy were done.

Who may open a userfaultfd (Linux 6.1 and later; before that there is no device):

    the process has CAP_SYS_PTRACE             system call, all faults
    vm.unprivileged_userfaultfd is 1           system call, all faults
    it may open /dev/userfaultfd               device, all faults
    anybody else                               system call, only with UFFD_USER_MODE_ONLY

So there is always a way, but the last one reports no fault that the kernel takes for the process,
as when read(2) is given a registered buffer; such a call fails with EFAULT. A program has to be
written for that, so it is never chosen unless the caller says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from . import _abi
from ._abi import Feature, Method
from .errors import InvalidDescriptor, NotSupported, PermissionDenied, from_errno

DEVICE_PATH = "/dev/userfaultfd"
SYSCTL_PATH = "/proc/sys/vm/unprivileged_userfaultfd"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.ioctl.restype = ctypes.c_int
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long


def ioctl(fd: int, request: int, data: bytes) -> tuple[int, bytes]:
    """Call ioctl(2) on a copy of ``data``.

    Returns:
        The errno, 0 on success, and the structure as the kernel left it in either case.
    """
    block = ctypes.create_string_buffer(data, len(data))
    failed = _libc.ioctl(fd, request, block) < 0
    return (ctypes.get_errno() if failed else 0), block.raw


# ---------------------------------------------------------------- opening


class Opened(NamedTuple):
    """A new descriptor, and the way that led to it."""

    fd: int
    method: Method
    user_mode_only: bool


class Attempt(NamedTuple):
    """A way that did not lead to one."""

    method: Method
    user_mode_only: bool
    code: int

    def __str__(self) -> str:
        """Tell the way and the failure."""
        way = "userfaultfd(2)" if self.method is Method.SYSCALL else DEVICE_PATH
        flag = " with UFFD_USER_MODE_ONLY" if self.user_mode_only else ""
        return f"{way}{flag}: {os.strerror(self.code)}"


def open_descriptor(
    method: Method, *, user_mode_only: bool | None, cloexec: bool, nonblock: bool
) -> Opened:
    """Open a userfaultfd, trying the ways that the arguments allow, in the order of the table.

    Raises:
        PermissionDenied: all ways are barred, or the one left does not exist.
        NotSupported: there is none at all.
    """
    flags = (os.O_CLOEXEC if cloexec else 0) | (os.O_NONBLOCK if nonblock else 0)
    methods = [Method.SYSCALL, Method.DEVICE] if method is Method.AUTO else [method]
    modes = [False, True] if user_mode_only is None else [user_mode_only]
    failures = []
    for only in modes:
        for way in methods:
            code, fd = _open_by(way, flags | (_abi.USER_MODE_ONLY if only else 0))
            if not code:
                return Opened(fd, way, only)
            failures.append(Attempt(way, only, code))
            if code not in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT, errno.EINVAL):
                raise from_errno(code, "open", detail=str(failures[-1]))
    raise _refusal(failures)


def _open_by(method: Method, flags: int) -> tuple[int, int]:
    if method is Method.SYSCALL:
        number = _abi.syscall_number()
        if number is None:
            return errno.ENOSYS, -1
        fd = _libc.syscall(number, flags)
        return (ctypes.get_errno(), -1) if fd < 0 else (0, fd)
    try:
        device = os.open(DEVICE_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO, -1
    try:
        fd = _libc.ioctl(device, _abi.USERFAULTFD_IOC_NEW, flags)
        return (ctypes.get_errno(), -1) if fd < 0 else (0, fd)
    finally:
        os.close(device)


def _refusal(failures: Sequence[Attempt]) -> PermissionDenied | NotSupported:
    tried = "; ".join(str(failure) for failure in failures)
    for failure in failures:
        if failure.code in (errno.EPERM, errno.EACCES):
            return PermissionDenied(
                failure.code, f"{tried}. {_how_to_allow(failures)}", operation="open"
            )
    code = failures[0].code
    advice = (
        "the system call needs a kernel with CONFIG_USERFAULTFD, "
        f"{DEVICE_PATH} needs Linux {_abi.DEVICE_SINCE} as well"
    )
    if any(failure.user_mode_only and failure.code == errno.EINVAL for failure in failures):
        advice = f"UFFD_USER_MODE_ONLY needs Linux {_abi.USER_MODE_ONLY_SINCE}"
    elif _abi.syscall_number() is None:
        advice = f"the number of the system call on {_abi.MACHINE} is not known, {advice}"
    return NotSupported(code, f"{tried}. Note: {advice}", operation="open")


def _how_to_allow(failures: Sequence[Attempt]) -> str:
    """Say what stands in the way on this machine, and each way to remove it."""
    try:
        with open(SYSCTL_PATH, encoding="utf-8") as file:
            setting = f"is {file.read().strip()}"
    except OSError:
        setting = "cannot be read"
    try:
        status = os.stat(DEVICE_PATH)
    except OSError as error:
        device = f"{DEVICE_PATH} cannot be used: {os.strerror(error.errno or errno.EIO)}"
    else:
        device = (
            f"{DEVICE_PATH} is {stat.filemode(status.st_mode)}, "
            f"uid {status.st_uid}, gid {status.st_gid}"
        )
    ways = [
        "run with CAP_SYS_PTRACE",
        "set vm.unprivileged_userfaultfd=1 with sysctl",
        f"give the user read and write permission on {DEVICE_PATH} (chgrp and chmod, or udev)",
    ]
    if not any(failure.user_mode_only for failure in failures):
        ways.append("pass user_mode_only=True if the kernel never touches the memory by itself")
    return (
        f"vm.unprivileged_userfaultfd {setting}; {device}. "
        f"Any one of these helps: {'; '.join(ways)}. "
        "In a container, its seccomp profile has to let userfaultfd(2) through as well"
    )


# ---------------------------------------------------------------- handshake


def handshake(fd: int, features: Feature) -> Feature:
    """Agree with the kernel on features; a descriptor can do so once, and nothing else before.

    Returns:
        All features that the kernel has, asked for or not.

    Raises:
        PermissionDenied: a feature needs a capability.
        InvalidDescriptor: the kernel lacks one of them, or the handshake has been done before.
    """
    request = _abi.API_STRUCT.pack(_abi.API, int(features), 0)
    code, answer = ioctl(fd, _abi.UFFDIO_API, request)
    if code == errno.EPERM:
        raise from_errno(
            code,
            "handshake",
            detail="Feature.EVENT_FORK needs CAP_SYS_PTRACE in the initial namespace",
        )
    if code == errno.EINVAL:
        raise InvalidDescriptor(
            code,
            "a feature is not known to the kernel, or its handshake is done",
            operation="handshake",
        )
    if code:
        raise from_errno(code, "handshake")
    _, available, _ = _abi.API_STRUCT.unpack(answer)
    return Feature(available)


# ---------------------------------------------------------------- looking at a descriptor


class Waiting(NamedTuple):
    """How many threads sleep in a page fault of one userfaultfd."""

    unread: int
    """Their faults have not been read yet."""
    total: int
    """All of them."""


def inspect(fd: int) -> tuple[Waiting, Feature]:
    """Read what the kernel tells about a descriptor in /proc.

    Raises:
        InvalidDescriptor: it is no userfaultfd.
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as file:
            fields = dict(line.rstrip().split(":\t", 1) for line in file if ":\t" in line)
    except FileNotFoundError:
        raise from_errno(errno.EBADF, "inspect", detail=f"descriptor {fd}") from None
    if "API" not in fields or "pending" not in fields:
        raise InvalidDescriptor(
            errno.EINVAL, f"descriptor {fd} is no userfaultfd", operation="inspect"
        )
    enabled = int(fields["API"].split(":")[1], 16) & ~_abi.FEATURE_INITIALIZED
    return Waiting(int(fields["pending"]), int(fields["total"])), Feature(enabled)

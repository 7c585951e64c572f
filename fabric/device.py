"""The device file: making it, opening it, looking at it, removing it.

Facts about shared memory files, then what they force on us:

- shmem that is full fails a write with ENOSPC, but a page fault with SIGBUS. So a device is allocated
  when it is made, unless the user asks for a sparse one, and a file system that is too small is
  reported then and there.
- A file that has no name yet (O_TMPFILE) vanishes when its last descriptor closes, however the
  process ends, and linkat(2) gives it a name only if nobody has it. So a device appears in /dev/shm
  complete, all at once, or not at all.
- unlink(2) removes whatever has the name by now. So who removes a device holds its flock and has
  looked that the file with the name is the locked one: two who replace the same dead device cannot
  remove each other's new one.
- Removing a file does not disturb those who have mapped it. Still a fabric whose device is gone
  cannot be joined by anybody any more, so removal is refused while somebody lives in it.

A coordinator that holds the flock for as long as it runs gives us one more sign of life, which also
works across PID namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import posix_ipc
import psutil

from dmrpc_cxl._native import LAYOUT, Device, allocate, format_device, geometry
from dmrpc_cxl.errors import (
    BadSize,
    DeviceCorrupt,
    DeviceError,
    DeviceExists,
    DeviceFull,
    DeviceNotFound,
    DeviceTruncated,
    DeviceVersionMismatch,
    NotADevice,
    SystemCallFailed,
)

from . import numa
from .liveness import Inhabitant, inhabitants
from .services import account, services
from .topology import (
    DEFAULT_MAX_HOSTS,
    DEFAULT_MAX_REFS,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SIZE,
    check_name,
    remove_runtime_dirs,
)

DIRECTORY = Path("/dev/shm")
STEP_BYTES = 64 << 20  # allocated or touched at a time; between steps a signal is noticed

Progress = Callable[[int, int], None]
"""Called with the number of bytes done and of all bytes."""


def path_of(name: str) -> Path:
    """Return the path of the device of that name, which need not exist."""
    return DIRECTORY / check_name(name)


# ---------------------------------------------------------------- opening


@contextmanager
def _descriptor(name: str, *, writable: bool) -> Iterator[int]:
    """Give a descriptor on the device file for a while."""
    path = path_of(name)
    try:
        shared = posix_ipc.SharedMemory(f"/{name}", read_only=not writable)
    except posix_ipc.ExistentialError:
        raise DeviceNotFound(
            errno.ENOENT, f"no device {path}: make it with `dmrpc fabric create {name}`"
        ) from None
    except posix_ipc.PermissionsError:
        raise SystemCallFailed(errno.EACCES, f"device {path} belongs to another user") from None
    except OSError as error:
        raise SystemCallFailed(error.errno, f"device {path}: {error.strerror}") from error
    try:
        yield shared.fd
    finally:
        shared.close_fd()


def _map(name: str, fd: int, *, writable: bool) -> Device:
    """Verify and map; what is wrong is said with the device's name."""
    try:
        return Device(fd, writable)
    except (NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt) as error:
        raise type(error)(f"{path_of(name)}: {error}") from None


def open(name: str, *, writable: bool = True) -> Device:
    """Open and verify the device of a fabric.

    Raises:
        DeviceNotFound: there is none.
        NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: it is no intact device of this
            version; the message says what is wrong and what to do.
        SystemCallFailed: it belongs to another user, or cannot be mapped.
    """
    with _descriptor(name, writable=writable) as fd:
        return _map(name, fd, writable=writable)


# ---------------------------------------------------------------- removing


@contextmanager
def _sole_remover(name: str, fd: int, *, force: bool) -> Iterator[None]:
    """Hold the lock that allows to unlink the file fd is open on, which has the name."""
    path = path_of(name)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not force:
            raise DeviceExists(
                errno.EEXIST, f"{path} is locked: its coordinator runs, or somebody is removing it"
            ) from None
    try:
        same = os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        same = False
    if not same:
        raise DeviceExists(errno.EEXIST, f"{path} was replaced by somebody else just now")
    yield  # the lock goes with the descriptor


def _refuse_if_inhabited(name: str, device: Device) -> None:
    alive = inhabitants(device.superblock, device.hosts())
    if alive:
        shown = ", ".join(map(str, alive[:4])) + (", ..." if len(alive) > 4 else "")
        raise DeviceExists(
            errno.EEXIST, f"{path_of(name)} is in use: {shown}; stop them first, or use force"
        )


def remove(name: str, *, force: bool = False) -> None:
    """Remove a device and its socket directory.

    Args:
        name: of the fabric.
        force: remove it even if somebody lives in it, or if it is damaged. A file that never was a device is not
            removed even so.

    Raises:
        DeviceNotFound: there is none.
        DeviceExists: somebody lives in it; names them.
        NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: nothing can be known about it.
    """
    socket_file = ""
    with _descriptor(name, writable=False) as fd:
        try:
            with _map(name, fd, writable=False) as device:
                if not force:
                    _refuse_if_inhabited(name, device)
                with _sole_remover(name, fd, force=force):
                    if not force:  # somebody may have come in before we had the lock
                        _refuse_if_inhabited(name, device)
                    socket_file = device.superblock["unix_path"]
                    posix_ipc.unlink_shared_memory(f"/{name}")
        except (DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt):
            if not force:
                raise
            with _sole_remover(name, fd, force=True):
                posix_ipc.unlink_shared_memory(f"/{name}")
    remove_runtime_dirs(name)
    if socket_file:
        _remove_stale_socket(socket_file)


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a coordinator that was killed and listened at a place of its own."""
    try:
        status = os.lstat(path)
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.getuid():
            os.unlink(path)
    except OSError:
        pass  # gone, or not ours to remove


# ---------------------------------------------------------------- making


def _check_room(needed: int) -> None:
    """Refuse what cannot fit before it takes the room away from everybody else."""
    shm = os.statvfs(DIRECTORY)
    free = shm.f_bavail * shm.f_frsize
    if needed > free:
        raise DeviceFull(
            errno.ENOSPC,
            f"{DIRECTORY} has {free >> 20} MiB free, the device needs {needed >> 20} MiB: make it smaller or "
            f"sparse, or enlarge {DIRECTORY} (mount -o remount,size=... {DIRECTORY}; docker run --shm-size=...)",
        )
    memory = psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > memory:
        raise DeviceFull(
            errno.ENOMEM,
            f"{memory >> 20} MiB of memory are available, the device needs {needed >> 20} MiB: make it smaller "
            "or sparse",
        )


def _allocate(fd: int, first: int, size: int) -> None:
    try:
        for offset in range(first, first + size, STEP_BYTES):
            allocate(fd, offset, min(STEP_BYTES, first + size - offset))
    except DeviceFull as error:
        raise DeviceFull(
            error.errno, f"{DIRECTORY} became full while the device was allocated: {error}"
        ) from error


def _touch(fd: int, layout: dict[str, int], progress: Progress | None) -> None:
    frames_per_step = max(1, STEP_BYTES // layout["page_size"])
    total = layout["nr_frames"]
    with Device(fd) as device:
        for first in range(0, total, frames_per_step):
            count = min(frames_per_step, total - first)
            device.prefault(first, count)
            if progress is not None:
                progress((first + count) * layout["page_size"], total * layout["page_size"])


def _remove_dead(name: str) -> None:
    """Remove a device in which nobody lives; there may be none."""
    try:
        remove(name)
    except DeviceNotFound:
        pass
    except (DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt) as error:
        raise type(error)(
            f"{error}. It cannot be told whether somebody lives in it; if you know that nobody does: "
            f"dmrpc fabric remove --force {name}"
        ) from None


def create(
    name: str,
    *,
    size: int = DEFAULT_SIZE,
    page_size: int = DEFAULT_PAGE_SIZE,
    max_hosts: int = DEFAULT_MAX_HOSTS,
    max_refs: int = DEFAULT_MAX_REFS,
    preallocate: bool = True,
    prefault: bool = False,
    overwrite: bool = False,
    numa_node: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the device of a new fabric; it appears complete or not at all.

    Args:
        name: of the fabric; the device is /dev/shm/NAME, for its user only (mode 0600).
        size: bytes of frames, rounded up to whole frames.
        page_size: 4096, 16384 or 65536; a multiple of the machine's page size.
        max_hosts: most processes attached at a time.
        max_refs: most Refs alive at a time.
        preallocate: take the room now. Otherwise the frames are allocated when they are first touched, and a
            program that touches one when /dev/shm is full dies of SIGBUS.
        prefault: touch every frame now, so that nobody waits for the kernel to zero it later.
        overwrite: replace a device of that name in which nobody lives. It is removed first.
        numa_node: take the frames from the memory of that node, as far memory; None: from where they are touched first.
        progress: is told how much of the prefaulting is done.

    Returns:
        The path of the device.

    Raises:
        DeviceExists: the name is taken and overwrite was not asked for, or somebody lives in it.
        NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: what was to be overwritten
            is not an intact device.
        BadSize, MisuseError: an argument is out of range.
        DeviceFull: /dev/shm, or memory, has no room for it.
        EnvironmentFault: the machine has no memory on that node.
    """
    path = path_of(name)
    machine_page = os.sysconf("SC_PAGESIZE")
    if page_size > 0 and page_size % machine_page:
        raise BadSize(f"page size {page_size}: this machine's pages have {machine_page} bytes")
    size = -(-size // page_size) * page_size if page_size > 0 and size > 0 else max(size, 0)
    layout = geometry(size, max(page_size, 0), max(max_hosts, 0), max(max_refs, 0))

    if overwrite:
        _remove_dead(name)
    elif os.path.lexists(path):
        raise DeviceExists(
            errno.EEXIST,
            f"{path} exists: use another name, or overwrite it if nobody uses it any more",
        )
    allocated = layout["page_table_off"] + (size if preallocate or prefault else 0)
    _check_room(allocated)
    fd = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        os.truncate(fd, layout["device_bytes"])
        if numa_node is not None:
            numa.bind(fd, layout["data_off"], size, numa_node)
        if preallocate:
            _allocate(fd, layout["data_off"], size)
        format_device(fd, name, size, page_size, max_hosts, max_refs)
        if prefault:
            _touch(fd, layout, progress)
        _name_file(fd, path)
    finally:
        os.close(fd)
    return path


def _name_file(fd: int, path: Path) -> None:
    """Give an unnamed file its name, unless somebody else has it."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a directory descriptor Python calls linkat(2), which follows the link in /proc to the file.
        os.link(f"/proc/self/fd/{fd}", path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        raise DeviceExists(errno.EEXIST, f"{path} was made by somebody else just now") from None
    finally:
        os.close(directory)


# ---------------------------------------------------------------- looking


@dataclass(frozen=True)
class Report:
    """What `inspect` finds; plain values, fit for JSON. Sizes are in bytes."""

    name: str
    path: str
    file_bytes: int
    allocated_bytes: int
    superblock: dict[str, Any]
    coordinator: dict[str, Any]
    hosts: list[dict[str, Any]]
    refs: list[dict[str, Any]]
    frames: dict[str, Any]
    services: list[dict[str, Any]]
    inhabitants: list[Inhabitant]


_COORDINATOR_FIELDS = ("epoch", "pid", "start_time", "unix_path", "tcp_host", "tcp_port")


def inspect(name: str) -> Report:
    """Look at a device without changing it.

    The accounting in `frames` is exact only while no operation is in flight.

    Raises:
        As `open` does.
    """
    with _descriptor(name, writable=False) as fd, _map(name, fd, writable=False) as device:
        status = os.fstat(fd)
        superblock = device.superblock
        hosts = device.hosts()
        alive = inhabitants(superblock, hosts)
        live_hosts = {one.host for one in alive if one.role == "host"}
        del superblock["secret"]  # whoever may open the device can read it; logs need not hold it
        coordinator = {
            field: superblock.pop(field if field in superblock else f"coordinator_{field}")
            for field in _COORDINATOR_FIELDS
        }
        coordinator["alive"] = any(one.role == "coordinator" for one in alive)
        return Report(
            name=name,
            path=str(path_of(name)),
            file_bytes=status.st_size,
            allocated_bytes=status.st_blocks * 512,
            superblock=superblock,
            coordinator=coordinator,
            hosts=[{**host, "alive": host["host"] in live_hosts} for host in hosts],
            refs=device.refs(),
            frames=account(device),
            services=services(device),
            inhabitants=alive,
        )


def verify(name: str) -> dict[str, Any]:
    """Check a device: the superblock, every frame's refcount and owner, every published name.

    Returns:
        As `services.account`; "nr_violations" is 0 when all is well. Exact only while no operation is
        in flight.

    Raises:
        As `open` does.
    """
    with open(name, writable=False) as device:
        return account(device)


def names() -> list[str]:
    """List the names in /dev/shm that belong to devices of ours, intact or not, sorted."""
    found = []
    for entry in os.scandir(DIRECTORY):
        try:
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                continue
            fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or gone
            continue
        try:
            if os.pread(fd, 8, 0) == LAYOUT["MAGIC"].to_bytes(8, "little"):
                found.append(entry.name)
        finally:
            os.close(fd)
    return sorted(found)


def status_of(name: str) -> tuple[str, list[Inhabitant]]:
    """Return a few words about a device for a list, and who lives in it; never raises a DeviceError."""
    try:
        with open(name, writable=False) as device:
            alive = inhabitants(device.superblock, device.hosts())
            return ("alive" if alive else "idle"), alive
    except DeviceError as error:
        return type(error).__name__, []

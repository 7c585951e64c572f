"""What a launcher starts, and where a fabric's sockets are.

Sockets live in a directory of their own, one for each fabric, that only its user may enter::

    $XDG_RUNTIME_DIR/dmrpc/FABRIC/      where that variable names a directory of ours
    /tmp/dmrpc-UID/FABRIC/              elsewhere

/tmp is everybody's: a directory there is used only if it is a real directory, ours, and closed to
others. The address of a Unix socket has room for 107 bytes and is cut silently by some tools, so a
longer path is refused here. Processes with different environments may compute different
directories; peers therefore take the path that the coordinator has written into the superblock, and
`remove_runtime_dirs` looks in both places.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.errors import BadSize, EnvironmentFault, MisuseError

Transport = Literal["unix", "tcp"]

DEFAULT_SIZE = 256 << 20
DEFAULT_PAGE_SIZE = 4096
DEFAULT_MAX_HOSTS = 32
DEFAULT_MAX_REFS = 16384
PAGE_SIZES = (4096, 16384, 65536)
LOG_LEVELS = ("debug", "info", "warning", "error")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Return the name of a fabric, or raise if it is not one.

    It is the name of a file and of a directory: ASCII letters, digits, dots, dashes, underscores, the first a letter
    or digit.

    Raises:
        MisuseError: it has other characters.
        BadSize: it is too long for the superblock.
    """
    if not _NAME.fullmatch(name):
        raise MisuseError(
            f"fabric name {name!r}: use letters, digits, '.', '-' and '_', a letter or digit first"
        )
    if len(name) >= LAYOUT["NAME_BYTES"]:
        raise BadSize(
            f"fabric name {name!r} has {len(name)} bytes, at most {LAYOUT['NAME_BYTES'] - 1} fit"
        )
    return name


# ---------------------------------------------------------------- where the sockets are


def _shared_base() -> Path:
    return Path(f"/tmp/dmrpc-{os.getuid()}")


def _runtime_base() -> Path:
    configured = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(configured):
        try:
            status = os.stat(configured)
        except OSError:
            return _shared_base()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            return Path(configured) / "dmrpc"
    return _shared_base()


def runtime_dir(fabric: str) -> Path:
    """Return the directory for a fabric's sockets, which may not exist yet."""
    return _runtime_base() / check_name(fabric)


def _private_dir(path: Path) -> None:
    """Make a directory that only we may enter, or check that it is one."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}: cannot make a directory") from error
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise EnvironmentFault(
            f"{path} is not a directory of user {os.getuid()}: remove it, or set XDG_RUNTIME_DIR to a "
            "directory of yours"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise EnvironmentFault(f"{path} is open to other users: chmod 700 {path}")


def make_runtime_dir(fabric: str) -> Path:
    """Make the directory for a fabric's sockets, mode 0700; one that exists is checked.

    Raises:
        EnvironmentFault: something else has that name, or others may enter it; says what to do.
    """
    path = runtime_dir(fabric)
    _private_dir(path.parent)
    _private_dir(path)
    return path


def socket_path(fabric: str, what: str = "coordinator") -> str:
    """Return the path of one of a fabric's Unix sockets.

    Raises:
        BadSize: it does not fit into the address of a Unix socket.
    """
    path = str(runtime_dir(fabric) / f"{what}.sock")
    room = LAYOUT["UNIX_PATH_BYTES"] - 1
    if len(os.fsencode(path)) > room:
        raise BadSize(
            f"socket path {path} has {len(os.fsencode(path))} bytes, at most {room} fit: use a shorter "
            "fabric name, or set XDG_RUNTIME_DIR to a shorter path"
        )
    return path


def remove_runtime_dirs(fabric: str) -> None:
    """Remove a fabric's socket directories wherever they may be, and what held only them.

    Directories of other users are left alone.
    """
    check_name(fabric)
    for base in {_runtime_base(), _shared_base()}:
        path = base / fabric
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
            try:
                base.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOENT):
                    raise


# ---------------------------------------------------------------- what is started


@dataclass(frozen=True)
class Program:
    """A program to run: its arguments, the program's own name first, and what to add to its environment."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to run."""
        if not self.argv:
            raise MisuseError("a program needs at least its own name")


@dataclass(frozen=True)
class HostSpec:
    """A host: the programs that stand for one machine of the fabric."""

    name: str
    programs: tuple[Program, ...] = ()


@dataclass(frozen=True)
class Topology:
    """A fabric and the hosts on it; sizes are in bytes."""

    fabric: str
    hosts: tuple[HostSpec, ...] = field(default=())
    size: int = DEFAULT_SIZE
    page_size: int = DEFAULT_PAGE_SIZE
    max_hosts: int = DEFAULT_MAX_HOSTS
    max_refs: int = DEFAULT_MAX_REFS
    transport: Transport = "unix"
    log_level: str = "info"
    memory_servers: int = 0
    memory_size: int = DEFAULT_SIZE
    numa_node: int | None = None  # that the frames come from
    latency: str = ""  # that hosts emulate
    same_layout: bool = False  # programs are loaded without ASLR

    def __post_init__(self) -> None:
        """Check what can be checked before anything is started."""
        check_name(self.fabric)
        if self.transport not in ("unix", "tcp"):
            raise MisuseError(f"transport {self.transport!r}: use 'unix' or 'tcp'")
        if self.log_level not in LOG_LEVELS:
            raise MisuseError(f"log level {self.log_level!r}: use one of {', '.join(LOG_LEVELS)}")
        names = [host.name for host in self.hosts]
        if len(set(names)) != len(names):
            raise MisuseError(f"two hosts have the same name: {', '.join(sorted(names))}")
        nr_processes = sum(len(host.programs) for host in self.hosts)
        if nr_processes > self.max_hosts:
            raise BadSize(f"{nr_processes} programs, but max_hosts is {self.max_hosts}")
        if self.transport == "unix":
            socket_path(self.fabric)

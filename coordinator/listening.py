"""The sockets that the coordinator listens on, and what can be wrong with them.

The file of a Unix socket outlives the process that made it. Who finds one tries to connect: nobody
answers on a stale one, which may be replaced.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat

from dmrpc_cxl._native import LAYOUT, crash_point
from dmrpc_cxl.errors import BadSize, EnvironmentFault, MisuseError

BACKLOG = 512


class CannotListen(EnvironmentFault):
    """A socket cannot be had; the message says what to do."""


class UnixListener:
    """A listening Unix socket and its file."""

    def __init__(self, path: str, *, replace: bool = False) -> None:
        """Listen at `path`, for this user only; with `replace` whoever listens there.

        Raises:
            BadSize: the path is too long for the address of a Unix socket.
            CannotListen: something is in the way, or the directory does not allow it.
        """
        self.path = os.path.abspath(path)
        room = LAYOUT["UNIX_PATH_BYTES"] - 1
        if len(os.fsencode(self.path)) > room:
            raise BadSize(
                f"socket path {self.path} has {len(os.fsencode(self.path))} bytes, at most {room} fit: "
                "choose a shorter one with --socket"
            )
        self._clear_the_way(replace)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self.socket.bind(self.path)
            self.socket.listen(BACKLOG)
            crash_point("listener_bound")
        except OSError as error:
            self.socket.close()
            raise CannotListen(
                f"cannot listen at {self.path}: {error.strerror}; choose another path with --socket"
            ) from error
        finally:
            os.umask(before)
        self._file = os.lstat(self.path)

    def _clear_the_way(self, replace: bool) -> None:
        try:
            found = os.lstat(self.path)
        except OSError:
            return  # bind will say what is wrong, if anything is
        if not stat.S_ISSOCK(found.st_mode):
            raise CannotListen(
                f"{self.path} exists and is no socket: remove it, "
                "or choose another path with --socket"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            refused = probe.connect_ex(self.path)
        if refused != errno.ECONNREFUSED and not replace:
            raise CannotListen(
                f"somebody else listens at {self.path}: stop them, "
                "or choose another path with --socket"
            )
        os.unlink(self.path)

    def close(self) -> None:
        """Stop listening and remove the file, if it is still ours."""
        self.socket.close()
        try:
            if os.path.samestat(os.lstat(self.path), self._file):
                os.unlink(self.path)
        except OSError:
            pass


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT, [HOST]:PORT or PORT; the default host is the loopback address.

    Raises:
        MisuseError: it is none of them.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise MisuseError(f"TCP address {text!r}: use HOST:PORT, with port 0 for any free one")
    return host or "127.0.0.1", int(port)


def listen_tcp(host: str, port: int, *, anywhere: bool) -> socket.socket:
    """Listen on TCP.

    Raises:
        MisuseError: the address can be reached from other machines, and that was not asked for.
        CannotListen: the port is taken, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise CannotListen(f"--tcp {host}: {error}") from None
    family, kind, protocol, _, address = found[0]
    if not anywhere and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise MisuseError(
            f"--tcp {host} can be reached from other machines, and the fabric's secret travels in "
            "the clear: use 127.0.0.1, or add --tcp-anywhere if that is meant"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        raise CannotListen(
            f"cannot listen on TCP {host}:{port}: {error.strerror}; "
            + ("choose another port, or 0 for any free one" if taken else "choose another address")
        ) from error
    return listener

"""``dmrpc net-server``: run one memory server until it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import resource
import secrets
import signal
import socket
import stat
import sys
import tempfile

import click

from dmrpc_cxl.errors import DmError, EnvironmentFault, MisuseError
from dmrpc_cxl.fabric.commands import size_option

from ._native import WIRE, Server
from .client import read_secret
from .greeting import SECRET_BYTES, Address, parse_address, show_address

log = logging.getLogger("dmrpc.net")

BACKLOG = 512
SPARE_DESCRIPTORS = 300  # beside those of clients: strangers, listeners, logs
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG_LEVELS = ("debug", "info", "warning", "error")


def clear_the_way(path: str) -> None:
    """Remove the file of a Unix socket on which nobody listens any more.

    Raises:
        EnvironmentFault: it is something else, or somebody listens.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        stale = stat.S_ISSOCK(found.st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED
    if not stale:
        raise EnvironmentFault(
            f"cannot listen at unix:{path}: something else is there, or somebody listens"
        )
    os.unlink(path)


def listen(address: Address, *, anywhere: bool) -> socket.socket:
    """Listen for clients.

    Raises:
        MisuseError: others can reach that address, and it was not said that they may.
        EnvironmentFault: it cannot be had.
    """
    try:
        if isinstance(address, str):
            clear_the_way(address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                listener.bind(address)
            finally:
                os.umask(before)
        else:
            family, kind, protocol, _, found = socket.getaddrinfo(
                *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            if (
                not anywhere
                and not ipaddress.ip_address(str(found[0]).partition("%")[0]).is_loopback
            ):
                raise MisuseError(
                    f"{show_address(address)} can be reached from other machines, and secret and data "
                    "travel in the clear: use 127.0.0.1, or add --anywhere if that is meant"
                )
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except (OSError, UnicodeError) as error:
        raise EnvironmentFault(
            f"cannot listen at {show_address(address)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return where a listener listens, as clients are to be told."""
    name = listener.getsockname()
    return show_address(name if isinstance(name, str) else name[:2])


def secret_at(path: str) -> bytes:
    """Read the secret of a file, which is made if there is none: whole, or not at all, whoever else is at it."""
    if os.path.lexists(path):
        return read_secret(path)
    secret = secrets.token_bytes(SECRET_BYTES)
    fd, made = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".secret-")  # mode 0600
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secret.hex() + "\n")
        os.link(made, path)
    except FileExistsError:  # somebody was faster
        return read_secret(path)
    finally:
        os.unlink(made)
    return secret


def make_room_for_descriptors(clients: int, shards: int) -> str:
    """Raise the limit of open files as far as that many clients may need and we may go; say so if that is not far enough."""
    wanted = clients * (1 + shards) + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft != endless and soft < wanted:
        soft = wanted if hard == endless else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == endless or soft >= wanted:
        return ""
    return (
        f"{soft} open files are allowed (ulimit -Hn), enough for {(soft - SPARE_DESCRIPTORS) // (1 + shards)} clients; "
        f"--max-clients {clients} needs {wanted}"
    )


def describe(server: Server, pool: int, shards: int) -> str:
    """Say what the pool is, and whether it is locked."""
    text = f"{server.slice_bytes * shards >> 20} MiB in {shards} shard{'s' if shards > 1 else ''}"
    if server.locked_bytes:
        return f"{text}, locked in memory"
    if server.lock_error:
        return (
            f"{text}, NOT locked in memory ({os.strerror(server.lock_error)}; limit: ulimit -l), "
            "so it may be swapped out"
        )
    return f"{text}, not locked in memory"


@click.command()
@click.option(
    "--listen",
    "where",
    multiple=True,
    default=("127.0.0.1:0",),
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen, or unix:PATH; port 0: any free one. May be repeated.",
)
@click.option("--anywhere", is_flag=True, help="Allow addresses that other machines can reach.")
@click.option(
    "--secret",
    "secret_file",
    type=click.Path(dir_okay=False),
    required=True,
    help="File with the secret of all servers and clients; made if there is none.",
)
@click.option(
    "--size", callback=size_option, default="256M", show_default=True, help="Bytes of the pool."
)
@click.option("--page-size", callback=size_option, default="4096", show_default=True)
@click.option(
    "--shards",
    type=click.IntRange(0, WIRE["max_shards"]),
    default=0,
    help="Threads that serve, each with its part of the pool [default: one for each CPU].",
)
@click.option(
    "--number",
    type=click.IntRange(0, WIRE["max_servers"] - 1),
    default=0,
    show_default=True,
    help="This server's place in the list that clients are given.",
)
@click.option(
    "--copy", is_flag=True, help="Copy pages when a Ref is made, not when they are written to."
)
@click.option("--no-lock", is_flag=True, help="Do not try to lock the pool in memory.")
@click.option("--max-clients", type=click.IntRange(1, 1 << 20), default=1024, show_default=True)
@click.option(
    "--client-pages",
    type=click.IntRange(0),
    default=0,
    help="Most pages that a client may hold in a shard; 0: all.",
)
@click.option(
    "--client-refs",
    type=click.IntRange(1, 1 << 31),
    default=1 << 20,
    show_default=True,
    help="Most Refs that a client may hold in a shard.",
)
@click.option(
    "--client-ranges",
    type=click.IntRange(1, 1 << 31),
    default=1 << 20,
    show_default=True,
    help="Most ranges that a client may have in a shard.",
)
@click.option(
    "--client-virtual",
    type=click.IntRange(0),
    default=0,
    help="Most pages, holes included, of a client's ranges and Refs in a shard [default: 16 times what the shard has].",
)
@click.option(
    "--client-outstanding",
    type=click.IntRange(16, 1 << 16),
    default=1024,
    show_default=True,
    help="Most requests without answer of a client to a shard.",
)
@click.option(
    "--max-count",
    type=click.IntRange(2, (1 << 32) - 1),
    default=(1 << 32) - 1,
    hidden=True,
    help="Most holders of a page.",
)
@click.option(
    "--hello-timeout",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Longest wait for a hello, s.",
)
@click.option(
    "--vanished",
    type=click.IntRange(0, 3600),
    default=30,
    show_default=True,
    help="Seconds after which a client is given up whose machine does not answer; 0: never.",
)
@click.option("--time-translation", is_flag=True, help="Measure what looking up addresses takes.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option(
    "--ready-fd", type=int, help="Descriptor that gets a line with the addresses when it serves."
)
def main(
    where: tuple[str, ...],
    anywhere: bool,
    secret_file: str,
    size: int,
    page_size: int,
    shards: int,
    number: int,
    copy: bool,
    no_lock: bool,
    max_clients: int,
    client_pages: int,
    client_refs: int,
    client_ranges: int,
    client_virtual: int,
    client_outstanding: int,
    max_count: int,
    hello_timeout: float,
    vanished: int,
    time_translation: bool,
    log_level: str,
    ready_fd: int | None,
) -> None:
    """Run a memory server: a pool of pages that clients read and write over the network."""
    logging.basicConfig(
        level=log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    shards = shards or len(os.sched_getaffinity(0))
    if told := make_room_for_descriptors(max_clients, shards):
        log.warning("%s", told)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        listeners = [listen(parse_address(text), anywhere=anywhere) for text in where]
        server = Server(
            [listener.fileno() for listener in listeners],
            secret_at(secret_file),
            pool_bytes=size,
            server=number,
            shards=shards,
            page_bytes=page_size,
            max_processes=max_clients,
            hello_ms=int(hello_timeout * 1000),
            vanished_s=vanished,
            lock_pool=not no_lock,
            eager=copy,
            time_translation=time_translation,
            max_pages=client_pages,
            max_refs=client_refs,
            max_ranges=client_ranges,
            max_virtual=client_virtual or 16 * (size // shards // page_size),
            max_outstanding=client_outstanding,
            max_count=max_count,
        )
    except (DmError, OSError, ValueError, MemoryError) as error:
        click.echo(f"dmrpc net-server: {error}", err=True)
        sys.exit(1)
    places = " ".join(address_of(listener) for listener in listeners)
    log.info("number %d serves at %s: %s", number, places, describe(server, size, shards))
    if ready_fd is not None:
        with contextlib.suppress(BrokenPipeError), open(ready_fd, "w", encoding="utf-8") as stream:
            stream.write(f"ready pid={os.getpid()} {places}\n")
    got = signal.sigwait(STOP_SIGNALS)
    log.info("stops on %s; %d clients are connected", signal.Signals(got).name, server.nr_processes)
    server.close()
    for listener in listeners:
        name = listener.getsockname()
        listener.close()
        if isinstance(name, str):
            with contextlib.suppress(OSError):
                os.unlink(name)


if __name__ == "__main__":
    main(prog_name="python -m dmrpc_net.server")

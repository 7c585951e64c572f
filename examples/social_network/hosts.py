"""The processes: which there are, for the launcher, and what each of them runs.

    programs(args)  what the hosts of a run execute, for the launcher
    serve(host)     what the host of a service runs: the services of the process that has the host's name

Besides, each host has a desk: ../serving/desk.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dmrpc_cxl

from ..serving.desk import Desk, wait_for
from .roles import LOAD_BALANCER, called_by, process_names, start
from .stores import Stores
from .variants import VARIANTS

KINDS = ("memory", "sqlite", "redis")


def programs(args: Sequence[str] = ()) -> list[str]:
    """Return what the hosts of a run execute, as `dmrpc fabric run --program` takes it: the client, and the services."""
    parser = argparse.ArgumentParser(add_help=False)
    add_service_options(parser)
    options, _ = parser.parse_known_args(list(args))
    told = shlex.join(words_of(options))
    return [
        f"client={__package__}.session:main {shlex.join(args)}",
        *(f"{name}={__package__}.hosts:serve {told}" for name in process_names(compact=options.compact)),
    ]  # fmt: skip


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all hosts of a run have to agree about."""
    add = parser.add_argument
    add("--transport", choices=("auto", "ring", "tcp"), default="auto",
        help="between the services; auto: rings where they reach  [default: auto]")  # fmt: skip
    add(
        "--compact",
        action="store_true",
        help="one process for the six services that help with composing",
    )
    add(
        "--store",
        choices=KINDS,
        default="sqlite",
        help="where services keep things  [default: sqlite]",
    )
    add("--folder", metavar="FOLDER", default="",
        help="of SQLite files that shall stay; they are read again  [default: a temporary one]")  # fmt: skip
    add("--redis", metavar="URL", default="redis://127.0.0.1:6379", help="with --store redis")
    add("--http-port", type=int, default=0, metavar="N",
        help="of the load balancer; 0: one that is free, -1: no HTTP  [default: 0]")  # fmt: skip
    add("--http-variant", choices=tuple(VARIANTS), default="cxl",
        help="how lists of posts come to the load balancer for HTTP  [default: cxl]")  # fmt: skip


def words_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the options of add_service_options() as words of a command."""
    words = [
        "--transport", options.transport, "--store", options.store, "--folder", options.folder, "--redis", options.redis,
        "--http-port", str(options.http_port), "--http-variant", options.http_variant,
    ]  # fmt: skip
    return (*words, "--compact") if options.compact else tuple(words)


def folder_of(fabric: str, folder: str) -> Path:
    """Return where the files of a run are: temporary ones where the launcher removes them, however the run ends."""
    if folder:
        return Path(folder)
    temporary = os.environ.get("DMRPC_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(temporary) / f"social-network-{fabric}"


def stores_of(fabric: str, options: argparse.Namespace) -> Stores:
    """Return where the services of a run keep things."""
    return Stores(
        options.store,
        folder_of(fabric, options.folder),
        options.redis,
        prefix=f"social-network:{'kept' if options.folder else fabric}",
        temporary=not options.folder,
    )


def serve(host: dmrpc_cxl.Host) -> int:
    """Run the services of the process that has this host's name, until nobody attends to its desk."""
    parser = argparse.ArgumentParser(prog=host.name)
    add_service_options(parser)
    options = parser.parse_args()
    wait_for(host, *called_by(host.name))
    how: dict[str, Any] = {}
    if host.name == LOAD_BALANCER and options.http_port >= 0:
        how["http"] = {"port": options.http_port, "variant": options.http_variant}
    running = start(
        host,
        host.name,
        stores=stores_of(host.fabric, options),
        transport=options.transport,
        **how,
    )
    if running.http_port:
        print(f"HTTP at http://127.0.0.1:{running.http_port}", flush=True)
    with contextlib.ExitStack() as ending:
        ending.callback(running.stop)
        desk = Desk(running.account)
        ending.enter_context(host.serve(desk, name=f"desk-{host.name}", threads=1))
        desk.over.wait()
    return 0

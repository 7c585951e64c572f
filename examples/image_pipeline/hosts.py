"""The processes: which there are, for the launcher, and what each of them runs.

    hosts(args)     the hosts of a run, for dmrpc_cxl.fabric.launcher
    serve(host)     what the host of a service runs: the service that has the host's name

Besides its service each host has a desk: ../serving/desk.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import dmrpc_cxl
from dmrpc_cxl.errors import MisuseError
from dmrpc_cxl.fabric.topology import HostSpec

from ..serving.desk import Desk, host_of, wait_for
from .roles import (
    NR_PROCESSORS,
    WORKER_THREADS,
    called_by,
    service_names,
    start,
)
from .variants import VARIANTS, memory_of

# ---------------------------------------------------------------- the launcher's side


def hosts(args: Sequence[str] = (), nr_processors: int = NR_PROCESSORS) -> tuple[HostSpec, ...]:
    """Make the hosts of a run: the client, which gets the arguments, and the services.

    Args:
        args: for session.py; what concerns the services is read here as well.

    Raises:
        MisuseError: variants that cannot be measured in one run.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--variants", default="")
    add_service_options(parser)
    options, _ = parser.parse_known_args(list(args))
    variants = tuple(name for name in options.variants.split(",") if name in VARIANTS)
    try:
        memory = memory_of(variants)
    except ValueError as error:
        raise MisuseError(f"--variants {options.variants}: {error}") from None
    environment = {"DMRPC_DM": "net"} if memory == "servers" else {}
    told = ("--transport", options.transport, "--processors", str(nr_processors))

    return (
        host_of("client", f"{__package__}.session:main", *args, *told[2:], **environment),
        *(
            host_of(name, f"{__package__}.hosts:serve", *told, **environment)
            for name in service_names(nr_processors, variants)
        ),
    )


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all hosts of a run have to agree about."""
    parser.add_argument(
        "--transport",
        choices=("auto", "ring", "tcp"),
        default="auto",
        help="between the services; auto: rings where they reach  [default: auto]",
    )
    parser.add_argument("--processors", type=int, default=NR_PROCESSORS, help=argparse.SUPPRESS)


# ---------------------------------------------------------------- a host's side


def serve(host: dmrpc_cxl.Host) -> int:
    """Run the service that has this host's name, until nobody attends to its desk."""
    parser = argparse.ArgumentParser(prog=host.name)
    add_service_options(parser)
    parser.add_argument("--threads", type=int, default=WORKER_THREADS, metavar="N")
    parser.add_argument(
        "--die-at", type=int, metavar="N", help="of a worker: SIGKILL itself with the Nth picture"
    )
    options = parser.parse_args()
    wait_for(host, *called_by(host.name, options.processors))
    running = start(
        host,
        host.name,
        transport=options.transport,
        nr_processors=options.processors,
        threads=options.threads,
        die_at=options.die_at,
    )
    with contextlib.ExitStack() as ending:
        ending.callback(running.stop)
        desk = Desk(running.account)
        ending.enter_context(host.serve(desk, name=f"desk-{host.name}", threads=1))
        desk.over.wait()
    if pictures := running.account().counts.get("pictures"):
        print(f"{pictures} pictures")
    return 0

"""``python -m dmrpc_cxl.coordinator FABRIC``: run the coordinator of a fabric until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import click

from dmrpc_cxl.errors import DmError

from .connection import TimeLimits
from .ledger import Policy
from .listening import parse_address
from .server import Server, Settings, raise_descriptor_limit

LOG_LEVELS = ("debug", "info", "warning", "error")


async def run(settings: Settings, ready_fd: int | None) -> None:
    """Serve until SIGTERM, SIGINT or a SHUTDOWN request."""
    server = Server(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def ready(server: Server) -> None:
        if ready_fd is not None:
            with open(ready_fd, "w", encoding="utf-8") as stream:
                stream.write(f"ready pid={os.getpid()} {server.where}\n")

    await server.serve(ready)


@click.command()
@click.argument("fabric")
@click.option("--socket", metavar="PATH", help="Unix socket [default: in the runtime directory].")
@click.option("--tcp", metavar="HOST:PORT", help="Listen on TCP as well; port 0: any free one.")
@click.option("--tcp-anywhere", is_flag=True, help="Allow --tcp addresses that others can reach.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--ready-fd", type=int, help="Descriptor that gets a line when the fabric is served.")
@click.option("--batch", default=Policy.batch, show_default=True, help="Frames handed out at once.")
@click.option("--low", default=Policy.low, show_default=True, help="A host below asks for more.")
@click.option("--high", default=Policy.high, show_default=True, help="A host above gives back.")
@click.option("--batch-max", default=Policy.batch_max, show_default=True, help="Largest batch.")
@click.option("--frame-limit", default=0, show_default=True, help="Most frames a host may hold.")
@click.option("--recall-timeout", default=1.0, show_default=True, help="Wait for other hosts, s.")
@click.option("--hello-timeout", default=5.0, show_default=True, help="Wait for HELLO, s.")
@click.option("--max-connections", default=4096, show_default=True)
def main(
    fabric: str,
    socket: str | None,
    tcp: str | None,
    tcp_anywhere: bool,
    log_level: str,
    ready_fd: int | None,
    batch: int,
    low: int,
    high: int,
    batch_max: int,
    frame_limit: int,
    recall_timeout: float,
    hello_timeout: float,
    max_connections: int,
) -> None:
    """Run the coordinator of FABRIC: it owns the free frames of the device and hands them out to hosts."""
    logging.basicConfig(
        level=log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        settings = Settings(
            fabric=fabric,
            socket=socket,
            tcp=parse_address(tcp) if tcp else None,
            tcp_anywhere=tcp_anywhere,
            policy=Policy(batch, low, high, batch_max, frame_limit),
            limits=TimeLimits(hello=hello_timeout),
            recall_seconds=recall_timeout,
            max_connections=max_connections,
        )
        raise_descriptor_limit()
        asyncio.run(run(settings, ready_fd))
    except DmError as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        click.echo(f"dmrpc coordinator: {text}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m dmrpc_cxl.coordinator")

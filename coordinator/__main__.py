"""``python -m dmrpc_cxl.coordinator FABRIC``: run the coordinator of a fabric until it is told to
stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import click

from dmrpc_cxl.errors import CoordinatorReplaced, DmError

from .connection import TimeLimits
from .ledger import Policy
from .listening import parse_address
from .scrubber import Pace
from .server import Server, Settings, raise_descriptor_limit

_F = TypeVar("_F", bound=Callable[..., Any])

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOG_LEVELS = ("debug", "info", "warning", "error")


async def run(settings: Settings, ready_fd: int | None) -> None:
    """Serve until SIGTERM, SIGINT or a SHUTDOWN request."""
    server = Server(settings)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        """Stop in order; a second signal ends the process at once, which does no harm either."""
        server.stop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)

    def ready(server: Server) -> None:
        if ready_fd is not None:
            with suppress(BrokenPipeError), open(ready_fd, "w", encoding="utf-8") as stream:
                stream.write(f"ready pid={os.getpid()} {server.where}\n")

    await server.serve(ready)
    if server.replaced:
        raise CoordinatorReplaced("another coordinator has taken over")


def _number(name: str, default: int, text: str, least: int = 1) -> Callable[[_F], _F]:
    kind = click.IntRange(least, 2**31 - 1)
    return click.option(name, type=kind, default=default, show_default=True, help=text)


def _seconds(name: str, default: float, text: str) -> Callable[[_F], _F]:
    kind = click.FloatRange(0, 3600)
    return click.option(name, type=kind, default=default, show_default=True, help=text)


@click.command()
@click.argument("fabric")
@click.option("--socket", metavar="PATH", help="Unix socket [default: in the runtime directory].")
@click.option("--tcp", metavar="HOST:PORT", help="Listen on TCP as well; port 0: any free one.")
@click.option("--tcp-anywhere", is_flag=True, help="Allow --tcp addresses that others can reach.")
@click.option(
    "--take-over",
    is_flag=True,
    help="Replace a coordinator that serves the fabric; it stops as soon as it notices.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", show_default=True)
@click.option("--ready-fd", type=int, help="Descriptor that gets a line when the fabric is served.")
@_number("--batch", Policy.batch, "Frames handed out at once.")
@_number("--low", Policy.low, "A host with fewer free frames asks for more.", least=0)
@_number("--high", Policy.high, "A host with more free frames gives some back.")
@_number("--batch-max", Policy.batch_max, "Most frames that a growing batch reaches.")
@_number("--frame-limit", 0, "Most frames that a host may hold; 0: any number.", least=0)
@_seconds("--recall-timeout", 1.0, "Longest wait for frames that other hosts are asked for, s.")
@_seconds("--hello-timeout", TimeLimits.hello, "Longest wait for an introduction, s.")
@_number("--max-connections", 4096, "Most connections at a time.")
@_seconds("--scrub-interval", Pace.interval, "Between looks at all frames, s; 0: none.")
@click.option(
    "--scrub-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=Pace.share,
    show_default=True,
    help="Most that such a look takes of one CPU.",
)
def main(
    fabric: str,
    socket: str | None,
    tcp: str | None,
    tcp_anywhere: bool,
    take_over: bool,
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
    scrub_interval: float,
    scrub_share: float,
) -> None:
    """Run the coordinator of FABRIC, which hands out the device's free frames to hosts."""
    if ready_fd is not None:
        try:
            os.fstat(ready_fd)
        except OSError:
            raise click.BadParameter(f"{ready_fd} is not open", param_hint="--ready-fd") from None
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
            take_over=take_over,
            policy=Policy(batch, low, high, batch_max, frame_limit),
            limits=TimeLimits(hello=hello_timeout),
            recall_seconds=recall_timeout,
            max_connections=max_connections,
            pace=Pace(interval=scrub_interval, share=scrub_share),
        )
        raise_descriptor_limit()
        asyncio.run(run(settings, ready_fd))
    except (DmError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        click.echo(f"dmrpc coordinator: {text}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m dmrpc_cxl.coordinator")

"""The command ``dmrpc fabric run``: what launcher.py does, for people and scripts."""

from __future__ import annotations

import sys

import click

from . import topology


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    from .commands import size_option  # which imports this module

    return size_option(ctx, param, value)


@click.command()
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("--hosts", type=int, help="How many hosts.  [default: as many as programs]")
@click.option(
    "--program",
    "programs",
    multiple=True,
    metavar="[NAME=]COMMAND",
    help="What a host runs; may be repeated.  [default: a demonstration]",
)
@click.option("--fabric", metavar="NAME", help="Name of the device.  [default: a unique one]")
@click.option(
    "--size",
    default=f"{topology.DEFAULT_SIZE >> 20}M",
    callback=_size,
    show_default=True,
    help="Of all frames together: 64K, 256M, 1.5G.",
)
@click.option(
    "--page-size", type=click.Choice([str(size) for size in topology.PAGE_SIZES]), default="4096"
)
@click.option(
    "--memory-servers",
    type=click.IntRange(0, 16),
    default=0,
    show_default=True,
    help="Start so many memory servers as well; programs find them by dmrpc_net.attach().",
)
@click.option(
    "--memory-size",
    default=f"{topology.DEFAULT_SIZE >> 20}M",
    callback=_size,
    show_default=True,
    help="Of the pool of each.",
)
@click.option("--numa-node", type=int, help="Take the frames from the memory of that node.")
@click.option(
    "--latency",
    default="",
    metavar="LATENCY",
    help="Have hosts emulate a device that slow: 265ns, +190ns.",
)
@click.option(
    "--same-layout",
    is_flag=True,
    help="Load all programs at the same addresses, without ASLR: less CPU time where they share CPUs.",
)
@click.option("--tcp", is_flag=True, help="Hosts reach the coordinator over TCP (loopback).")
@click.option(
    "--log-level", type=click.Choice(topology.LOG_LEVELS), default="warning", show_default=True
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Stop after that long, s."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="For hosts to end after another has failed, and again after a signal, s.",
)
@click.option("--keep-going", is_flag=True, help="Hosts may go on when another has failed.")
@click.option(
    "--restart/--no-restart",
    default=True,
    show_default=True,
    help="Start a coordinator again that dies.",
)
@click.option("--keep", is_flag=True, help="Do not remove the device.")
@click.pass_context
def run(
    ctx: click.Context,
    args: tuple[str, ...],
    hosts: int | None,
    programs: tuple[str, ...],
    fabric: str | None,
    size: int,
    page_size: str,
    memory_servers: int,
    memory_size: int,
    numa_node: int | None,
    latency: str,
    same_layout: bool,
    tcp: bool,
    log_level: str,
    timeout: float | None,
    grace: float,
    keep_going: bool,
    restart: bool,
    keep: bool,
) -> None:
    """Run hosts on a new fabric: make a device, start a coordinator and the hosts, and when they
    have ended remove everything.

    A program is a Python file (worker.py --fast), a function that is called with an attached Host
    (photos.worker:main --fast), or a command for the shell. One program runs on every host, or
    there is one for each. Without any, examples/image_pipeline runs, and ARGS after -- are for it.

    The exit status is that of the first host that fails (128 + n for signal n), 124 after the
    timeout, 1 if a frame was lost.
    """
    from .launcher import Launcher, Rules, checkout
    from .leftovers import name_of_run
    from .programs import demo_hosts, hosts_of

    if programs and args:
        raise click.UsageError("ARGS are for the demonstration; write those of a program into it")
    specs = hosts_of(programs, hosts) if programs else demo_hosts(checkout(), hosts, args)
    if not memory_servers and any(
        ("DMRPC_DM", "net") in one.env for spec in specs for one in spec.programs
    ):
        raise click.UsageError(
            "these hosts use memory servers: give --memory-servers 1, before the --"
        )
    plan = topology.Topology(
        fabric=fabric or name_of_run(keep=keep),
        hosts=specs,
        size=size,
        page_size=int(page_size),
        max_hosts=max(topology.DEFAULT_MAX_HOSTS, len(specs)),
        transport="tcp" if tcp else "unix",
        log_level=log_level,
        memory_servers=memory_servers,
        memory_size=memory_size,
        numa_node=numa_node,
        latency=latency,
        same_layout=same_layout,
    )
    rules = Rules(timeout=timeout, grace=grace, keep_going=keep_going, restart=restart, keep=keep)
    sys.stdout.flush()
    ctx.exit(Launcher(plan, rules).run())

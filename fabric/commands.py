"""The commands ``dmrpc fabric ...``: what device.py does, for people and, with --json, for programs."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dmrpc_cxl.errors import DmError

from . import topology

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .device import Report

# rich, posix_ipc and the native module are imported by the commands that need them: `--help` is instant.

MAX_ENDPOINT_SHOWN = 60  # characters, in a table

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes that a size such as 4096, 64K, 256MiB, 1.5G stands for (powers of 1024).

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size; write 4096, 64K, 256M, 1.5G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: int) -> str:
    """Return a size in the largest unit that keeps it above 1: 306184192 is 292.0 MiB."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def size_option(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Parse the value of an option that is a size."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


class Reported(click.Group):
    """A group whose commands report a DmError in one line and exit with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except DmError as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise click.ClickException(f"{type(error).__name__}: {text}") from error


@click.group("fabric", cls=Reported)
def fabric() -> None:
    """Make, look at and remove G-FAM devices."""


name_argument = click.argument("name")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@fabric.command()
@name_argument
@click.option(
    "--size",
    default=f"{topology.DEFAULT_SIZE >> 20}M",
    callback=size_option,
    show_default=True,
    help="Of all frames together: 64K, 256M, 1.5G.",
)
@click.option(
    "--page-size", type=click.Choice([str(size) for size in topology.PAGE_SIZES]), default="4096"
)
@click.option("--max-hosts", type=int, default=topology.DEFAULT_MAX_HOSTS, show_default=True)
@click.option("--max-refs", type=int, default=topology.DEFAULT_MAX_REFS, show_default=True)
@click.option("--sparse", is_flag=True, help="Do not take the room for the frames now.")
@click.option("--prefault", is_flag=True, help="Touch every frame now.")
@click.option("--overwrite", is_flag=True, help="Replace a device in which nobody lives.")
@click.option("--numa-node", type=int, help="Take the frames from the memory of that node.")
def create(
    name: str,
    size: int,
    page_size: str,
    max_hosts: int,
    max_refs: int,
    sparse: bool,
    prefault: bool,
    overwrite: bool,
    numa_node: int | None,
) -> None:
    """Make the device of a new fabric, /dev/shm/NAME."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from . import device

    columns = (
        TextColumn("touching frames"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not prefault) as bar:
        task = bar.add_task("touch", total=size)
        path = device.create(
            name,
            size=size,
            page_size=int(page_size),
            max_hosts=max_hosts,
            max_refs=max_refs,
            preallocate=not sparse,
            prefault=prefault,
            overwrite=overwrite,
            numa_node=numa_node,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    click.echo(str(path))


@fabric.command()
@name_argument
@json_option
def inspect(name: str, as_json: bool) -> None:
    """Show a device, who lives in it, what became of its frames, and what is published."""
    from . import device

    report = device.inspect(name)
    if as_json:
        fields = asdict(report)
        fields["inhabitants"] = [one._asdict() for one in report.inhabitants]
        click.echo(json.dumps(fields, indent=2))
        return
    from rich.console import Console

    _print_report(Console(), report)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _when(created_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_ns / 1e9))


def _print_report(console: Console, report: Report) -> None:
    sb, frames, coordinator = report.superblock, report.frames, report.coordinator
    running = (
        f"pid {coordinator['pid']}" + ("" if coordinator["alive"] else ", dead")
        if coordinator["pid"]
        else "none"
    )
    listening = [
        *filter(None, [coordinator["unix_path"]]),
        *(
            [f"{coordinator['tcp_host']}:{coordinator['tcp_port']}"]
            if coordinator["tcp_port"]
            else []
        ),
    ]
    table = _table(report.path, "device", "")
    for key, value in (
        ("fabric id", f"{sb['fabric_id']:016x}"),
        ("layout version", str(sb["version"])),
        ("created", _when(sb["created_ns"])),
        (
            "file, allocated",
            f"{format_size(report.file_bytes)}, {format_size(report.allocated_bytes)}",
        ),
        ("frames", f"{sb['nr_frames']} of {format_size(sb['page_size'])}"),
        ("hosts, Refs at most", f"{sb['max_hosts']}, {sb['max_refs']}"),
        ("coordinator", f"{running}, epoch {coordinator['epoch']}"),
        ("listens on", "\n".join(listening) or "-"),
    ):
        table.add_row(key, value)
    console.print(table)

    table = _table("Frames", "state", "frames", "bytes")
    rows = [("pool", frames["pool"])]
    rows += [(f"free at host {host}", count) for host, count in frames["free"].items()]
    rows.append(("in use", frames["in_use"]))
    for state, count in rows:
        table.add_row(state, str(count), format_size(count * sb["page_size"]))
    console.print(table)
    console.print(
        f"{frames['mapped_pages']} pages mapped, {frames['hole_pages']} holes; {frames['live_refs']} Refs over "
        f"{frames['ref_pages']} pages"
    )

    if report.hosts:
        table = _table("Hosts", "host", "name", "pid", "state", "free", "faults", "copied")
        for host in report.hosts:
            counters = host["counters"]
            table.add_row(
                str(host["host"]),
                host["name"],
                str(host["pid"]) + ("" if host["alive"] else " (dead)"),
                _host_state(host["state"]),
                str(host["nr_free"]),
                str(counters["missing_faults"] + counters["wp_faults"]),
                format_size(counters["bytes_copied"]),
            )
        console.print(table)
    if report.services:
        table = _table("Services", "name", "host", "state", "endpoint")
        for service in report.services:
            row = service["name"], str(service["host"]), service["state"]
            table.add_row(*row, _endpoint(service["endpoint"]))
        console.print(table)
    _print_violations(console, frames)


def _endpoint(endpoint: Any) -> str:
    text = json.dumps(endpoint)
    return text if len(text) <= MAX_ENDPOINT_SHOWN else text[: MAX_ENDPOINT_SHOWN - 3] + "..."


def _host_state(state: int) -> str:
    from dmrpc_cxl._native import LAYOUT

    for name in ("FREE", "ACTIVE", "DEAD", "DRAINING"):
        if LAYOUT[f"HOST_{name}"] == state:
            return name.lower()
    return str(state)


def _print_violations(console: Console, frames: dict[str, Any]) -> None:
    if frames["in_flight"]:
        console.print(
            f"{frames['in_flight']} operations in flight: the accounting may be transient"
        )
    if not frames["nr_violations"]:
        return
    table = _table(f"{frames['nr_violations']} violations", "what is wrong")
    for _, text in frames["violations"]:
        table.add_row(text)
    console.print(table)


@fabric.command()
@name_argument
@json_option
def verify(name: str, as_json: bool) -> None:
    """Check a device, account for every frame and every name; exit with 1 if something is wrong.

    Exact while no operation is in flight; otherwise run it again.
    """
    from . import device

    frames = device.verify(name)
    if as_json:
        click.echo(json.dumps(frames, indent=2))
    else:
        from rich.console import Console

        _print_violations(Console(), frames)
        if not frames["nr_violations"]:
            click.echo(
                f"{name}: {frames['nr_frames']} frames accounted for: {frames['pool']} in the pool, "
                f"{sum(frames['free'].values())} free at hosts, {frames['in_use']} in use; "
                f"{frames['services']} services published"
            )
    if frames["nr_violations"]:
        raise click.exceptions.Exit(1)


@fabric.command()
@name_argument
@click.option("--force", is_flag=True, help="Even if somebody lives in it or it is damaged.")
def remove(name: str, force: bool) -> None:
    """Remove a device and its socket directory."""
    from . import device

    device.remove(name, force=force)


@fabric.command("list")
@json_option
def list_devices(as_json: bool) -> None:
    """List the devices in /dev/shm."""
    from . import device

    found = [(name, *device.status_of(name)) for name in device.names()]
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "name": name,
                        "status": status,
                        "inhabitants": [one._asdict() for one in alive],
                    }
                    for name, status, alive in found
                ],
                indent=2,
            )
        )
        return
    from rich.console import Console

    table = _table("Devices in /dev/shm", "name", "status", "hosts")
    for name, status, alive in found:
        table.add_row(name, status, str(sum(one.role == "host" for one in alive)))
    Console().print(table)


from .run import run  # noqa: E402 - it uses what stands above

fabric.add_command(run)

"""The command ``dmrpc fsck``: what fsck.py does, for people and scripts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dmrpc_cxl.errors import DmError

if TYPE_CHECKING:
    from .fsck import Findings

# The native module is imported by the command itself: `--help` is instant.


@click.command()
@click.argument("fabric")
@click.option("--repair", is_flag=True, help="Take back what nothing holds.")
@click.option("--frame", "frames", type=int, multiple=True, help="Say who holds this frame.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--wait",
    "seconds",
    type=click.FloatRange(0, 3600),
    default=2.0,
    show_default=True,
    help="To try to be certain of what is suspect while hosts are at work, s.",
)
def main(fabric: str, repair: bool, frames: tuple[int, ...], as_json: bool, seconds: float) -> None:
    """Account for every frame of FABRIC, which may be at work meanwhile.

    The exit status is 0 if all is well, 1 if all that was wrong is repaired, 2 if something is left that is wrong,
    3 if hosts were too busy to be certain, 8 if there is nothing to check.
    """
    from . import fsck
    from .device import open as open_device

    try:
        found = fsck.check(fabric, repair=repair, seconds=seconds)
        asked: dict[int, dict[str, Any]] = {}
        if frames:
            with open_device(fabric, writable=False) as device:
                holdings = device.holdings()
                for pfn in frames:
                    refcount, owner, _ = device.frame(pfn)
                    asked[pfn] = {
                        "refcount": refcount,
                        "owner": owner,
                        "holders": fsck.holders(pfn, *holdings),
                    }
    except DmError as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        click.echo(f"dmrpc fsck: {type(error).__name__}: {text}", err=True)
        sys.exit(fsck.FAILED)
    if as_json:
        click.echo(json.dumps({**asdict(found), "status": found.status, "frames": asked}, indent=2))
    else:
        _print(found)
        for pfn, one in asked.items():
            who = ", ".join(one["holders"]) or "nobody"
            click.echo(
                f"frame {pfn}: refcount {one['refcount']}, owner {one['owner']}, held by {who}"
            )
    sys.exit(found.status)


def _print(found: Findings) -> None:
    sums = found.accounting
    click.echo(
        f"{found.name}: {found.nr_frames} frames: {sums['pool']} in the pool, {sums['free']} free at hosts, "
        f"{sums['in_use']} in use; {sums['mapped_pages']} pages mapped, {sums['live_refs']} Refs over "
        f"{sums['ref_pages']} pages"
    )
    for host in found.hosts:
        click.echo(
            f"  host {host['host']} {host['name']!r} (pid {host['pid']}{'' if host['alive'] else ', dead'}): "
            f"{host['free']} frames free, {host['mapped']} pages mapped, {host['refs']} Refs"
            + (f", {host['doing']}" if host["doing"] else "")
        )
    for title, texts in (
        ("repaired", found.repaired),
        ("WRONG", found.damage),
        ("undecided", found.undecided),
    ):
        for text in texts:
            click.echo(f"{title}: {text}")


if __name__ == "__main__":
    main(prog_name="python -m dmrpc_cxl.fabric.check")

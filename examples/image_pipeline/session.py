"""The main job: a few hundred photographs through the services, each way in turn, compared, checked and reported.

All variants use the same processes, and take turns in short blocks whose order is drawn. Three series are measured:

1. one size, one amount of work, many pictures: the table, and the plots of latencies and CPU time;
2. sizes from 4 KB to 4 MB: throughput;
3. amounts of work, from none to real: what computing hides.

After every block nothing may be held in DM. A few pictures are sent once more for the report, to look at.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

import dmrpc_cxl
from dmrpc_cxl.errors import DmError

from ..serving.desk import CHECKOUT, Desk, wait_for
from .bmp import Bytes
from .client import Client, Wrong
from .hosts import add_service_options
from .measure import Cost, Meter
from .messages import RequestFailed
from .photographs import NR_PICTURES, SHIPPED, SIZES, Album, Picture, album_of, pictures, size_named
from .roles import service_names
from .variants import MODES, VARIANTS
from .work import WORKS, Op, Work

SWEPT_SIZES = tuple(nominal for nominal in SIZES if nominal.bit_length() % 2)  # 4K, 16K, ... 4M
SWEEP_PICTURES = 14
MAX_WINDOW = 64
BLOCK = 28  # pictures of one variant in a row
MOST_SHOWN = 24  # photographs in the report


class Session:
    """One run: a client for each variant, and what each has taken."""

    def __init__(self, host: dmrpc_cxl.Host, options: argparse.Namespace) -> None:
        self.options = options
        self._random = random.Random(options.seed)
        names = service_names(options.processors, tuple(options.variants))
        wait_for(host, *(f"desk-{name}" for name in names))
        desks: dict[str, Any] = {
            name: host.connect(f"desk-{name}", Desk, timeout=None) for name in names
        }
        self._attending = [desk.future.attend() for desk in desks.values()]
        self.meter = Meter(host, desks)
        self.clients = {
            name: Client(
                host,
                variant=name,
                mode=options.mode if options.mode in VARIANTS[name].modes else "fresh",
                transport=options.transport,
                bad_share=options.bad_share,
                seed=options.seed,
            )
            for name in options.variants
        }

    def close(self) -> None:
        """Let the services end."""
        for client in self.clients.values():
            client.close()
        for one in self._attending:
            one.cancel()

    def block(self, cost: Cost, name: str, files: Sequence[Bytes], **how: Any) -> None:
        """Have one variant process pictures; see Client.run for how.

        Raises:
            Wrong, RequestFailed, DmError: at the first that fails.
        """
        client = self.clients[name]
        if client.mode == "pre-shared":
            client.share(files)
        with self.meter.measuring(cost, client):
            tally = client.run(files, window=self.options.window, **how)
        client.unshare()
        cost.tally.add(tally)
        cost.nr_left += self.meter.check_drained()

    def in_turn(self) -> list[str]:
        """Return the variants in an order that is drawn."""
        return self._random.sample(list(self.clients), len(self.clients))


def compare(session: Session, progress: Progress) -> dict[str, Cost]:
    """Measure the first series: as many pictures as were asked for, of one size."""
    options = session.options
    files = [picture.file for picture in pictures(options.size, album=options.album)]
    costs = {name: Cost() for name in session.clients}
    for name in costs:  # connections, caches and free lists: a block each that does not count
        session.block(Cost(), name, files[:BLOCK], count=BLOCK, work=options.work)
    task = progress.add_task("pictures", total=options.pictures)
    done = 0
    while done < options.pictures:
        number = min(BLOCK, options.pictures - done)
        chosen = [files[(done + place) % len(files)] for place in range(number)]
        for name in session.in_turn():
            session.block(
                costs[name], name, chosen, count=number, work=options.work,
                check_every=options.check_every,
            )  # fmt: skip
        done += number
        progress.update(task, completed=done)
    return costs


def _some(options: argparse.Namespace, nominal: int) -> list[Bytes]:
    number = min(SWEEP_PICTURES, options.album.nr_pictures)
    return [picture.file for picture in pictures(nominal, number, options.album)]


def sweep_sizes(session: Session, progress: Progress) -> dict[str, dict[int, Cost]]:
    """Measure the second series."""
    options = session.options
    series: dict[str, dict[int, Cost]] = {name: {} for name in session.clients}
    for nominal in progress.track(SWEPT_SIZES, description="sizes"):
        files = _some(options, nominal)
        for found in series.values():
            found[nominal] = Cost()
        for _ in range(options.rounds):
            for name in session.in_turn():
                cost = series[name][nominal]
                session.block(cost, name, files, seconds=options.block_seconds, work=options.work)
    return series


def sweep_works(session: Session, progress: Progress) -> dict[str, dict[Work, Cost]]:
    """Measure the third series."""
    options = session.options
    files = _some(options, options.size)
    series: dict[str, dict[Work, Cost]] = {name: {} for name in session.clients}
    for work in progress.track(WORKS, description="work"):
        for found in series.values():
            found[work] = Cost()
        for _ in range(options.rounds):
            for name in session.in_turn():
                cost = series[name][work]
                session.block(cost, name, files, seconds=options.block_seconds, work=work)
    return series


def gallery(session: Session) -> list[tuple[Picture, Bytes, Bytes]]:
    """Have every photograph transcoded and compressed for real, to look at."""
    client = list(session.clients.values())[-1]
    album = session.options.album
    chosen = list(pictures(256 << 10, min(len(album.names), MOST_SHOWN), album))
    if client.mode == "pre-shared":
        client.share([picture.file for picture in chosen])
    found = []
    for picture in chosen:
        both = [client.submit(op, picture.file, "real").result().copy() for op in Op]
        found.append((picture, both[0], both[1]))
    client.unshare()
    session.meter.check_drained()
    return found


# ---------------------------------------------------------------- the command


def _variants(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: use some of {', '.join(VARIANTS)}, with commas between"
        )
    return names


def _size(text: str) -> int:
    try:
        return size_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _album(text: str) -> Album:
    try:
        return album_of(Path(text), lambda told: print(f"warning: {told}", file=sys.stderr))
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(kind: type[Any], least: float, below: float | None = None) -> Callable[[str], Any]:
    """Return what reads a number that is not less than one limit, and less than the other."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value or (below is not None and not value < below):
            most = "" if below is None else f", less than {below:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {least:g} or more{most}")
        return value

    return read


def _writable(text: str) -> Path:
    """Return a folder that exists or was made, and into which files may be written."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(prog="client", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variants", type=_variants, default=["value", "cxl"], metavar="NAME,...",
        help=f"some of {', '.join(VARIANTS)}  [default: value,cxl]")  # fmt: skip
    add("--mode", choices=MODES, default="fresh",
        help="of variants that have it; pre-shared: placed and mapped before  [default: fresh]")  # fmt: skip
    add("--pictures-from", dest="album", type=_album, default=SHIPPED, metavar="FOLDER",
        help="take the photographs in there  [default: those of scikit-image]")  # fmt: skip
    add("--pictures", type=_number(int, 1), default=5 * NR_PICTURES, metavar="N",
        help=f"for each variant in the comparison  [default: {5 * NR_PICTURES}]")  # fmt: skip
    add("--size", type=_size, default=1 << 20, metavar="SIZE",
        help="of these, 4K to 4M  [default: 1M]")  # fmt: skip
    add("--work", choices=WORKS, default="scale", help="what is computed  [default: scale]")
    add(
        "--window",
        type=_number(int, 1, MAX_WINDOW + 1),
        default=4,
        metavar="N",
        help="requests under way  [default: 4]",
    )
    add("--bad-share", type=_number(float, 0, 1), default=0.01, metavar="X",
        help="of the requests, forged: the firewall must block them  [default: 0.01]")  # fmt: skip
    add("--check-every", type=_number(int, 0), default=8, metavar="N",
        help="compare so many results with what the client computes itself  [default: 8]")  # fmt: skip
    add("--rounds", type=_number(int, 0), default=3, metavar="N",
        help="blocks of each variant at each point of the plots; 0: no plots  [default: 3]")  # fmt: skip
    add(
        "--block-seconds",
        type=_number(float, 0.001),
        default=0.2,
        metavar="S",
        help="[default: 0.2]",
    )
    add("--seed", type=int, default=1, metavar="N", help="of all that is drawn  [default: 1]")
    add("--out", type=_writable, default=CHECKOUT / "build" / "image-pipeline", metavar="FOLDER",
        help="for the report  [default: build/image-pipeline]")  # fmt: skip
    add_service_options(parser)
    return parser


def main(host: dmrpc_cxl.Host) -> int:
    """Run the session; print the comparison, write the report."""
    from .report import show, write_page

    options = parser().parse_args()
    began = time.monotonic()
    session = None
    try:
        session = Session(host, options)
        with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
            costs = compare(session, progress)
            sizes = sweep_sizes(session, progress) if options.rounds else {}
            works = sweep_works(session, progress) if options.rounds else {}
        shown = gallery(session)
    except (Wrong, RequestFailed, DmError) as error:
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        if session is not None:
            session.close()
    show(options, costs)
    page = write_page(options, costs, sizes, works, shown)
    print(f"{time.monotonic() - began:.0f} s; the report is {page}")
    return 0

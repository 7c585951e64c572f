"""The client: has photographs in DM, has them edited elsewhere in two ways, and checks what comes back."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dmrpc_cxl import Host
from dmrpc_cxl.errors import DmError, PeerLost, RefConsumed

from .balancer import Desk
from .picture import Edit, Pixels, histogram, pictures
from .report import MODES, Report
from .service import THRESHOLD, Edited, PhotoService, wait_for

CHECKOUT = Path(__file__).resolve().parents[2]
AT_ONCE = 8  # calls under way: enough to keep two workers busy


class Wrong(Exception):
    """A picture did not come back, or not as it should."""


class Picture:
    """A photograph, and what is to be done to it."""

    def __init__(self, host: Host, number: int, name: str, source: Pixels) -> None:
        self.name = name
        self.source = source
        self.edit = Edit.number(number, source.shape[0])
        self.placed = host.array(source)  # in DM: this is what the client keeps and sends

    def check(self, edited: Edited) -> None:
        """Compare with what this process computes by itself.

        Raises:
            Wrong: they differ.
        """
        expected = self.source.copy()
        self.edit.apply(expected)
        if not np.array_equal(edited.histogram, histogram(self.source)):
            raise Wrong(f"{self.name}: another histogram")
        if not np.array_equal(edited.pixels, expected):
            raise Wrong(f"{self.name}: other pixels than expected")
        if not np.array_equal(self.placed, self.source):
            raise Wrong(f"{self.name}: the edit shows in the client's own picture")


class Client:
    """One session: every picture once in each mode."""

    def __init__(self, host: Host, report: Report, out: Path) -> None:
        self.nr_done = 0
        self.nr_repeated = 0
        self._host = host
        self._report = report
        self._out = out
        self._services = {
            mode: host.connect("balancer", PhotoService, transfer=transfer, threshold=THRESHOLD)
            for mode, transfer in MODES.items()
        }

    def run(self, work: Iterable[tuple[str, Pixels]]) -> None:
        """Have every picture edited, some at a time, the modes taking turns.

        Raises:
            Wrong, DmError: at the first that fails.
        """
        modes = list(MODES)
        numbered = enumerate(work)
        while chosen := list(itertools.islice(numbered, AT_ONCE)):
            batch = [Picture(self._host, number, name, pixels) for number, (name, pixels) in chosen]
            for mode in modes:
                with self._report.measure(mode, len(batch)):
                    results = list(self._edited(self._services[mode], batch))
                for picture, edited in zip(batch, results, strict=True):
                    picture.check(edited)
                    self._save(picture.name, edited.pixels)
                del edited, results
            modes.reverse()  # nobody is always the first
            self.nr_done += len(batch)

    def _edited(self, service: PhotoService, batch: list[Picture]) -> Iterator[Edited]:
        futures = [service.future.edit(picture.placed, picture.edit) for picture in batch]  # type: ignore[attr-defined]
        for picture, future in zip(batch, futures, strict=True):
            try:
                yield future.result()
            except (PeerLost, RefConsumed):  # its worker has died: an edit can be done again
                self.nr_repeated += 1
                try:
                    yield service.edit(picture.placed, picture.edit)
                except PeerLost as error:
                    raise Wrong(f"{picture.name}: {error}") from None

    def _save(self, name: str, pixels: Pixels) -> None:
        # Level 1: compressing the pictures would otherwise take longer than all the rest.
        Image.fromarray(pixels).save(self._out / f"{name}.png", compress_level=1)


def main(host: Host) -> int:
    """Run the session and print what it took."""
    parser = argparse.ArgumentParser(prog="client")
    parser.add_argument("--pictures", type=int, metavar="N", help="only the first N")
    parser.add_argument(
        "--out", type=Path, default=CHECKOUT / "build" / "photos", help="folder for the results"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = itertools.islice(pictures(), options.pictures)
    began = time.monotonic()
    try:
        wait_for(host, "balancer", "desk")
        desk = host.connect("desk", Desk, timeout=None)
        attending = desk.future.attend()  # type: ignore[attr-defined]
        report = Report(host.fabric, desk)
        client = Client(host, report, options.out)
        client.run(work)
        report.show()
        attending.cancel()  # the balancer ends, and then the workers
    except (Wrong, DmError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    if client.nr_repeated:
        print(f"a worker was lost: {client.nr_repeated} edits were asked for again")
    print(
        f"{client.nr_done} pictures, each in {len(MODES)} ways, in {time.monotonic() - began:.1f} s: "
        f"every result is right, every original is untouched; results are in {options.out}"
    )
    return 0

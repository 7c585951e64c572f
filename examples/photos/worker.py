"""The worker: a service like any other. It does not know whether a picture came by value or by reference."""

from __future__ import annotations

import argparse
import os
import signal

import dmrpc_cxl

from .picture import Edit, Pixels, histogram
from .service import THRESHOLD, Attended, Edited, PhotoService


class Worker(Attended, PhotoService):
    """Edits pictures, until whoever attends to it has gone."""

    def __init__(self, die_at: int | None = None) -> None:
        super().__init__()
        self.nr_served = 0
        self._die_at = die_at

    def edit(self, pixels: Pixels, edit: Edit) -> Edited:
        """Count the values of a picture and change a band of it."""
        self.nr_served += 1
        counts = histogram(pixels)  # reading costs nothing: no fault, no copy
        if self.nr_served == self._die_at:
            print(f"dying with {pixels.nbytes} bytes in hand")
            os.kill(os.getpid(), signal.SIGKILL)
        edit.apply(pixels)  # the first store to a page that others hold copies that page
        return Edited(pixels, counts)  # nobody else refers to the pixels: they are handed on


def main(host: dmrpc_cxl.Host) -> int:
    """Serve under this host's name."""
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument(
        "--die-at", type=int, metavar="N", help="SIGKILL itself with the Nth picture in hand"
    )
    worker = Worker(parser.parse_args().die_at)
    with host.serve(worker, name=host.name, threads=1, threshold=THRESHOLD):
        worker.over.wait()
    print(f"{worker.nr_served} pictures served")
    return 0

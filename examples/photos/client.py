"""The client: places photographs in DM, has them edited elsewhere, and checks what comes back."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

import dmrpc_cxl
from dmrpc_cxl.errors import RefConsumed

from . import report, wire
from .messages import Answer, Failure, Finish, Request
from .picture import Edit, Pixels, histogram, pictures

CHECKOUT = Path(__file__).resolve().parents[2]
IN_FLIGHT = 8  # requests: enough to keep two workers busy


class Wrong(Exception):
    """A picture did not come back, or not as it should."""


class Pending:
    """A request without its answer."""

    def __init__(self, host: dmrpc_cxl.Host, number: int, name: str, source: Pixels) -> None:
        self.name = name
        self.source = source
        self.edit = Edit.number(number, source.shape[0])
        self.placed = host.array(source)  # in DM; stays ours, copy-on-write from now on
        self.ref = host.create_ref(self.placed)
        self.request = Request(
            number,
            self.ref.to_bytes(),
            source.shape,
            source.dtype.str,
            source.nbytes,
            self.edit,
        )

    def check(self, counts: bytes, result: Pixels) -> None:
        """Compare with what this process computes by itself.

        Raises:
            Wrong: they differ.
        """
        if counts != histogram(self.source).tobytes():
            raise Wrong(f"{self.name}: another histogram")
        expected = self.source.copy()
        self.edit.apply(expected)
        if not np.array_equal(result, expected):
            raise Wrong(f"{self.name}: other pixels than expected")
        if not np.array_equal(self.placed, self.source):
            raise Wrong(f"{self.name}: the edit shows in the client's own picture")


class Client:
    """One session with the balancer."""

    def __init__(self, host: dmrpc_cxl.Host, balancer: wire.Channel, out: Path) -> None:
        self.nr_done = 0
        self.bytes_done = 0
        self._host = host
        self._balancer = balancer
        self._out = out
        self._pending: dict[int, Pending] = {}

    def run(self, work: Iterable[tuple[str, Pixels]]) -> None:
        """Have every picture edited.

        Raises:
            Wrong, PeerGone, TimeoutError, DmError: at the first that fails.
        """
        try:
            for number, (name, pixels) in enumerate(work):
                if len(self._pending) == IN_FLIGHT:
                    self._receive()
                pending = Pending(self._host, number, name, pixels)
                self._pending[number] = pending
                self._balancer.send(pending.request)
            while self._pending:
                self._receive()
        finally:
            for pending in self._pending.values():
                pending.ref.drop()  # those that nobody has accepted yet
            self._pending.clear()

    def _receive(self) -> None:
        message = self._balancer.receive()
        if isinstance(message, Failure):
            pending = self._pending[message.number]
            raise Wrong(f"{pending.name}: {message.text}")
        assert isinstance(message, Answer)
        pending = self._pending.pop(message.number)
        try:
            mapped = self._host.map_ref(message.ref)
        except RefConsumed as error:  # a Ref that nobody has accepted yet dies with its holder
            raise Wrong(f"{pending.name}: {message.worker} has died: {error}") from None
        with mapped as buffer:
            self._finish(pending, message, buffer.numpy(pending.source.dtype, pending.source.shape))

    def _finish(self, pending: Pending, answer: Answer, result: Pixels) -> None:
        pending.check(answer.histogram, result)
        # Level 1: compressing the pictures would otherwise take longer than all the rest.
        Image.fromarray(result).save(self._out / f"{pending.name}.png", compress_level=1)
        self.nr_done += 1
        self.bytes_done += pending.source.nbytes


def main(host: dmrpc_cxl.Host) -> int:
    """Run the session and print what it took."""
    parser = argparse.ArgumentParser(prog="client")
    parser.add_argument("--pictures", type=int, metavar="N", help="only the first N")
    parser.add_argument(
        "--out", type=Path, default=CHECKOUT / "build" / "photos", help="folder for the results"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = itertools.islice(pictures(), options.pictures)
    try:
        balancer = wire.connect(host, "balancer")
    except (wire.PeerGone, dmrpc_cxl.DmError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    client = Client(host, balancer, options.out)
    began = time.monotonic()
    failure = None
    try:
        client.run(work)
        report.show(host.fabric)
    except (Wrong, wire.PeerGone, TimeoutError, dmrpc_cxl.DmError) as error:
        failure = str(error)
    with contextlib.suppress(wire.PeerGone):
        balancer.send(Finish())
    if failure is not None:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(
        f"{client.nr_done} pictures of {report.size(client.bytes_done)} edited in {seconds:.1f} s with "
        f"{report.size(balancer.bytes_sent)} of requests and {report.size(balancer.bytes_received)} of answers"
    )
    print(f"every result is right, every original is untouched; results are in {options.out}")
    return 0

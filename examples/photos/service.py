"""The services: what is called, with which types. Nothing here says how the data travels."""

from __future__ import annotations

import asyncio
import threading

import msgspec
import numpy as np
import numpy.typing as npt

from dmrpc_cxl import Host
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.fabric.place import Place

from .picture import Edit, Pixels

SECONDS = 30.0  # for the others to come up
THRESHOLD = 8 << 10  # every photograph is larger, no histogram is


class Edited(msgspec.Struct):
    """A picture after an edit."""

    pixels: Pixels
    histogram: npt.NDArray[np.int64]
    """Of the picture as it came: channels x 256."""


class PhotoService:
    """What workers do."""

    def edit(self, pixels: Pixels, edit: Edit) -> Edited:
        """Count the values of a picture and change a band of it."""
        raise NotImplementedError


class Tally(msgspec.Struct):
    """What a balancer has passed on: calls by worker, and bytes of calls and replies together."""

    calls: dict[str, int]
    nbytes: int


class Attended:
    """A service that ends when the process that attends to it ends, in order or by a crash."""

    def __init__(self) -> None:
        self.over = threading.Event()

    async def attend(self) -> None:
        """Last as long as the caller stays: a call is cancelled when its connection ends."""
        try:
            await asyncio.Event().wait()
        finally:
            self.over.set()


def wait_for(host: Host, *names: str) -> None:
    """Wait until these services are published: all hosts of a run start at once.

    Raises:
        ServiceNotFound: one of them does not come.
    """
    with Client.to(host.fabric, tcp=Place.of_environment().transport == "tcp") as coordinator:
        for name in names:
            coordinator.wait_for_service(name, SECONDS)

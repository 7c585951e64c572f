"""Hosts of a run: how the launcher starts them, and the desk that each has besides its service.

At the desk, "desk-NAME", a client asks what was counted, and the host ends when nobody attends to it any more. So all hosts
end with the client, however it ends.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client as Coordinator
from dmrpc_cxl.fabric.place import Place
from dmrpc_cxl.fabric.topology import HostSpec, Program

from .running import Account

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 30.0  # for the others to come up


def host_of(name: str, function: str, *words: str, **environment: str) -> HostSpec:
    """Make a host that runs "MODULE:FUNCTION" of this checkout, with more in its environment."""
    argv = (sys.executable, "-m", "dmrpc_cxl.fabric.call", function, *words)
    told = (("PYTHONPATH", str(CHECKOUT)), *environment.items())
    return HostSpec(name, (Program(argv, told),))


class Desk:
    """What a host tells about itself; it is over when nobody attends to it."""

    def __init__(self, account: Callable[[], Account]) -> None:
        self._account = account
        self.over = threading.Event()

    def account(self) -> Account:
        """Return what was counted so far."""
        return self._account()

    async def attend(self) -> None:
        """Last as long as the caller stays: a call is cancelled when its connection ends."""
        try:
            await asyncio.Event().wait()
        finally:
            self.over.set()


def wait_for(host: dmrpc_cxl.Host, *names: str) -> None:
    """Wait until these services are published: all hosts of a run start at once.

    Raises:
        ServiceNotFound: one of them does not come.
    """
    with Coordinator.to(host.fabric, tcp=Place.of_environment().transport == "tcp") as coordinator:
        for name in names:
            coordinator.wait_for_service(name, SECONDS)

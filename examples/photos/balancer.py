"""The load balancer: a Forwarder, and a service that tells what went through it.

It passes messages on as they are and touches neither pixels nor DM: its counters stay at zero.
"""

from __future__ import annotations

import sys

import dmrpc_cxl

from .service import Attended, Tally, wait_for


class Desk(Attended):
    """What the client may ask the balancer itself."""

    def __init__(self, forwarder: dmrpc_cxl.Forwarder) -> None:
        super().__init__()
        self._forwarder = forwarder

    def tally(self) -> Tally:
        """Return what has been passed on so far."""
        return Tally(dict(self._forwarder.forwarded_to), self._forwarder.bytes_forwarded)


def main(host: dmrpc_cxl.Host) -> int:
    """Balance between the workers named on the command line."""
    names = sys.argv[1:]
    wait_for(host, *names)
    workers = [host.connect(name, timeout=None) for name in names]
    attending = [worker.future.attend() for worker in workers]  # they end when this process does
    with dmrpc_cxl.Forwarder(host, "balancer", names) as forwarder:
        desk = Desk(forwarder)
        with host.serve(desk, name="desk"):
            desk.over.wait()
    for future in attending:
        future.cancel()
    return 0

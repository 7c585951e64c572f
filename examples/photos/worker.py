"""The worker: maps what a Ref denotes, counts it, edits a band of it, and sends a Ref to the result back."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import numpy as np

import dmrpc_cxl

from . import wire
from .messages import Answer, Failure, Request
from .picture import histogram


def serve(host: dmrpc_cxl.Host, request: Request) -> Answer:
    """Answer one request."""
    buffer = host.map_ref(request.ref)
    pixels = buffer.numpy(np.dtype(request.dtype), request.shape)
    counts = histogram(pixels)  # reading costs nothing: no fault, no copy
    request.edit.apply(pixels)  # the first store to each page of the band copies that page
    del pixels  # a buffer that is given away must not have views
    ref = host.create_ref(buffer, move=True)
    return Answer(request.number, ref.to_bytes(), counts.tobytes(), host.name)


def work(host: dmrpc_cxl.Host, balancer: wire.Channel, die_at: int | None) -> int:
    """Serve requests until the balancer has no more. Returns how many there were.

    Raises:
        PeerGone: the balancer ended without saying so.
    """
    served = 0
    while isinstance(message := balancer.receive(None), Request):
        served += 1
        if served == die_at:
            kept = host.map_ref(message.ref)
            print(f"dying with {kept.nbytes} bytes mapped")
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            answer: Answer | Failure = serve(host, message)
        except (dmrpc_cxl.DmError, ValueError, TypeError, KeyError) as error:
            answer = Failure(message.number, f"{host.name}: {type(error).__name__}: {error}")
        balancer.send(answer)
    return served


def main(host: dmrpc_cxl.Host) -> int:
    """Serve the balancer until it says that it is over."""
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument(
        "--die-at", type=int, metavar="N", help="SIGKILL itself with the Nth picture mapped"
    )
    options = parser.parse_args()
    with wire.listening(host, host.name) as listener:
        balancer = wire.accept(listener, "balancer")
    try:
        served = work(host, balancer, options.die_at)
    except wire.PeerGone as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{served} pictures served")
    return 0

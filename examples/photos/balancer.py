"""The load balancer: passes each request on to the worker that has the fewest bytes to do.

It passes the 40 bytes of a Ref on and never maps one: its counters stay at zero.
"""

from __future__ import annotations

import contextlib
import sys

import dmrpc_cxl

from . import wire
from .messages import Failure, Finish, Message, Request


class Worker:
    """A worker, and the requests that it has not answered yet."""

    def __init__(self, channel: wire.Channel) -> None:
        self.channel = channel
        self.waiting: dict[int, int] = {}  # number of the request -> bytes of the picture
        self.bytes_given = 0

    @property
    def load(self) -> tuple[int, int]:
        """Bytes to do; among the idle, bytes done."""
        return sum(self.waiting.values()), self.bytes_given


class Balancer:
    """One client and its workers."""

    def __init__(self, client: wire.Channel, workers: list[Worker]) -> None:
        self._client = client
        self._workers = {worker.channel: worker for worker in workers}

    def run(self) -> None:
        """Pass messages on until the client has finished.

        Raises:
            PeerGone: the client ended without saying so.
        """
        while True:
            for channel in wire.ready([self._client, *self._workers]):
                if channel is self._client:
                    message = channel.receive()
                    if isinstance(message, Finish):
                        self._finish()
                        return
                    self._forward(message)
                elif channel in self._workers:
                    self._answer(self._workers[channel])

    def _forward(self, message: Message) -> None:
        assert isinstance(message, Request)
        while self._workers:
            worker = min(self._workers.values(), key=lambda worker: worker.load)
            try:
                worker.channel.send(message)
            except wire.PeerGone:
                self._bury(worker)
                continue
            worker.waiting[message.number] = message.nbytes
            worker.bytes_given += message.nbytes
            return
        self._client.send(Failure(message.number, "no worker is left"))

    def _answer(self, worker: Worker) -> None:
        try:
            message = worker.channel.receive()
        except wire.PeerGone:
            self._bury(worker)
            return
        assert not isinstance(message, Finish)
        del worker.waiting[message.number]
        self._client.send(message)

    def _bury(self, worker: Worker) -> None:
        del self._workers[worker.channel]
        for number in worker.waiting:
            self._client.send(Failure(number, f"{worker.channel.peer} has died"))

    def _finish(self) -> None:
        """Let every worker finish; a client that gives up does not wait for what they still answer."""
        for channel in self._workers:
            with contextlib.suppress(wire.PeerGone):
                channel.send(Finish())
        for channel in self._workers:
            with contextlib.suppress(wire.PeerGone):
                while True:
                    channel.receive(None)


def main(host: dmrpc_cxl.Host) -> int:
    """Balance between the workers named on the command line."""
    workers = [Worker(wire.connect(host, name)) for name in sys.argv[1:]]
    with wire.listening(host, "balancer") as listener:
        client = wire.accept(listener, "client")
    try:
        Balancer(client, workers).run()
    except wire.PeerGone as error:
        print(error, file=sys.stderr)
        return 1
    return 0

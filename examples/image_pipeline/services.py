"""The services. Each is an ordinary class; hosts.py has each served by a process of its own.

              ┌▶ processor-1 ┐ ┌▶ transcoder
    firewall ─▶ balancer     ├─┤
              └▶ processor-2 ┘ └▶ compressor

A service that passes a request on reads its header, never the picture, and answers its caller with what it is answered. The
balancer has no class of its own: it is a Forwarder, strictly in turn.

What goes wrong on the way comes back as a reply with a status, from wherever it went wrong. A picture that is not passed on
is freed when the method returns, also the one that came by reference.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.errors import Overloaded, PeerLost, RefConsumed, ServiceNotFound
from dmrpc_cxl.rpc.endpoint import Transport

from .bmp import NotABitmap
from .messages import Pipeline, Reply, Request, Status
from .users import UserTable
from .variants import Ways
from .work import Op, compute

MAX_IMAGE_BYTES = 1 << 28
# What a caller is told when the next service is gone. RefConsumed: it died with the picture, so the call that was
# sent again by a service in between found it gone.
_GONE = (PeerLost, ServiceNotFound, Overloaded, RefConsumed)


class Next:
    """A service that requests are passed on to."""

    def __init__(self, host: dmrpc_cxl.Host, name: str, transport: Transport = "auto") -> None:
        self._client: Any = host.connect(name, Pipeline, transport=transport)
        self._by_transfer = {
            transfer: self._client.using(transfer=transfer)
            for transfer in ("auto", "value")
        }

    def call(self, method: str, request: Request, ways: Ways) -> Reply:
        """Pass a request on, the way it came."""
        way = ways[request.variant]
        client = self._by_transfer[way.transfer]
        req_id = request.req_id
        try:
            reply: Reply = getattr(client, method)(way.pass_on(request))
        except _GONE as error:
            return Reply(req_id, Status.NO_WORKER, why=str(error))
        return reply

    def close(self) -> None:
        """End the connection."""
        self._client.close()


class _Service(Pipeline):
    """What all services have: the three methods come down to one."""

    def __init__(self, host: dmrpc_cxl.Host) -> None:
        self._ways = Ways(host)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def process(self, request: Request) -> Reply:
        """See Pipeline."""
        return self._handle("process", request)

    def keep(self, request: Request) -> Reply:
        """See Pipeline."""
        return self._handle("keep", request)

    def forget(self, request: Request) -> Reply:
        """See Pipeline."""
        return self._handle("forget", request)

    def _handle(self, method: str, request: Request) -> Reply:
        raise NotImplementedError

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


class Firewall(_Service):
    """Lets requests through whose user is known and has signed them."""

    def __init__(self, host: dmrpc_cxl.Host, users: UserTable, behind: Next) -> None:
        super().__init__(host)
        self._users = users
        self._behind = behind

    def _handle(self, method: str, request: Request) -> Reply:
        if not self._users.admits(request.user_id, request.req_id, request.token):
            self._count("blocked")
            why = f"user {request.user_id} did not sign this"
            return Reply(request.req_id, Status.BLOCKED, why=why)
        self._count("admitted")
        return self._behind.call(method, request, self._ways)


class ImageProcessor(_Service):
    """Reads the header of a request, and passes it on to the service for what is asked."""

    def __init__(self, host: dmrpc_cxl.Host, workers: Mapping[Op, Next]) -> None:
        super().__init__(host)
        self._workers = dict(workers)

    def _handle(self, method: str, request: Request) -> Reply:
        there = request.image.nbytes
        if not 0 < request.image_bytes <= MAX_IMAGE_BYTES or there not in (0, request.image_bytes):
            self._count("malformed")
            why = f"a picture of {request.image_bytes} bytes, of which {there} are here"
            return Reply(request.req_id, Status.UNSUPPORTED, why=why)
        self._count(request.op.name.lower())
        return self._workers[request.op].call(method, request, self._ways)


class Worker(_Service):
    """Looks at pictures: transcodes them, or compresses them."""

    def __init__(self, host: dmrpc_cxl.Host, op: Op) -> None:
        super().__init__(host)
        self._op = op

    def _handle(self, method: str, request: Request) -> Reply:
        way = self._ways[request.variant]
        reply = Reply(request.req_id, Status.OK)
        if method == "keep":
            way.keep(request.handle, request.image)
            return reply
        if method == "forget":
            way.forget(request.handle)
            return reply
        self._count("pictures")
        try:
            with way.opened(request) as file:
                outcome = compute(self._op, request.work, file)
                del file
        except (NotABitmap, KeyError) as error:
            return Reply(request.req_id, Status.UNSUPPORTED, why=str(error))
        reply.result_bytes = outcome.result.nbytes
        reply.checksum = outcome.checksum
        if outcome.result.nbytes:
            way.give(reply, outcome.result)
        return reply

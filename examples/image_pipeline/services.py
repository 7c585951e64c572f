"""The services. Each is an ordinary class; roles.py starts it, in a process of its own.

              ┌▶ processor-1 ┐ ┌▶ transcoder
    firewall ─▶ balancer     ├─┤
              └▶ processor-2 ┘ └▶ compressor

Firewall, balancer and image processors pass requests on. They are Forwarders of the library: the message stays as it is, and
what is written here is called with its header, to say where it goes. So they never see a picture, and a picture that came by
reference has one owner from the client to the worker; a request that is refused leaves it to the client.

Transcoder and compressor are services with typed methods. They do not know how a picture came.
"""

from __future__ import annotations

import os
import signal

import dmrpc_cxl
from dmrpc_cxl.rpc import Passing

from ..serving.running import Counting
from .bmp import NotABitmap
from .messages import Blocked, Header, Pipeline, Reply, Request, UnsupportedImage
from .users import UserTable
from .variants import VARIANTS, Ways
from .work import Op, compute

MAX_IMAGE_BYTES = 1 << 28


class Firewall(Counting):
    """Lets requests through whose user is known and has signed them: the route of a Forwarder."""

    def __init__(self, users: UserTable) -> None:
        super().__init__()
        self._users = users

    def __call__(self, passing: Passing) -> None:
        """Look at a request.

        Raises:
            Blocked: nobody may send it.
        """
        header = passing.first(Header)
        if not self._users.admits(header.user_id, header.req_id, header.token):
            self.count("blocked")
            raise Blocked(f"403 request {header.req_id}: user {header.user_id} did not sign it")
        self.count("admitted")


class ImageProcessor(Counting):
    """Reads the header of a request, and says which service does what it asks for: the route of a Forwarder."""

    def __init__(self, services: dict[Op, str]) -> None:
        super().__init__()
        self._services = dict(services)

    def __call__(self, passing: Passing) -> str:
        """Return the name of the service for a request.

        Raises:
            UnsupportedImage: there is none, or the header makes no sense.
        """
        header = passing.first(Header)
        service = self._services.get(header.op)
        if (
            service is None
            or header.variant not in VARIANTS
            or not 0 < header.image_bytes <= MAX_IMAGE_BYTES
        ):
            self.count("refused")
            raise UnsupportedImage(
                f"415 request {header.req_id}: {header.image_bytes} bytes as {header.variant!r}"
            )
        self.count(service)
        return service


class Worker(Counting, Pipeline):
    """Looks at pictures: transcodes them, or compresses them.

    Args:
        op: which of the two.
        die_at: for tests: the number of the picture with which in hand this process kills itself.
    """

    def __init__(self, host: dmrpc_cxl.Host, op: Op, die_at: int | None = None) -> None:
        super().__init__()
        self._op = op
        self._ways = Ways(host)
        self._die_at = die_at

    def process(self, request: Request) -> Reply:
        """Do to a picture what was asked for.

        Raises:
            UnsupportedImage: it is none that is understood.
        """
        nr = self.count("pictures")
        way = self._ways[request.variant]
        try:
            file = way.open(request)
            if nr == self._die_at:
                print(f"dying with {file.nbytes} bytes in hand", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                outcome = compute(self._op, request.work, file)
            finally:
                del file
                way.done(request)
        except NotABitmap as error:
            raise UnsupportedImage(f"415 request {request.req_id}: {error}") from None
        reply = Reply(request.req_id, outcome.result.nbytes, outcome.checksum)
        if outcome.result.nbytes:
            way.give(reply, outcome.result)
        return reply

    def keep(self, request: Request) -> None:
        """See Pipeline."""
        if request.image is None:
            raise UnsupportedImage(f"415 request {request.req_id}: nothing to keep")
        self._ways[request.variant].keep(request.handle, request.image)

    def forget(self, request: Request) -> None:
        """See Pipeline."""
        self._ways[request.variant].forget(request.handle)

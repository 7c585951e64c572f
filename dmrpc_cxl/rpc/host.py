"""The host that users attach: Table II, and services on top."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar, cast, overload

from .._native import Ref
from ..errors import MisuseError
from ..host import Host as MemoryHost
from . import objects
from .client import Client, ClientInterceptor, Options
from .endpoint import RING_BYTES, Transport
from .forwarder import Forwarder, published_once
from .frames import MAX_FRAME_BYTES
from .interface import Interface
from .link import Link
from .marshal import Marshaller, Serializer, Transfer
from .places import Place, Pool
from .server import Interceptor, Server
from .threshold import measured

__all__ = ["Host"]

ServiceType = TypeVar("ServiceType")


class Services:
    """What every host can do with services, wherever its memory is."""

    _threshold: int | None
    _ends: weakref.WeakSet[Server | Client | Forwarder]
    _errands: weakref.WeakSet[threading.Thread]
    """Threads that connect for an event loop; the call they do it for may have been given up."""

    def _begin(self) -> None:
        self._threshold = None
        self._ends = weakref.WeakSet()
        self._errands = weakref.WeakSet()

    @property
    def threshold(self) -> int:
        """Bytes from which ``transfer="auto"`` goes by Ref; measured when first asked for, may be set."""
        if self._threshold is None:
            self._threshold = self._measured()
        return self._threshold

    @threshold.setter
    def threshold(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a threshold of {nbytes} bytes")
        self._threshold = nbytes

    def _measured(self) -> int:
        me: Any = self
        return measured(me)

    def serve(
        self,
        service: object,
        *,
        name: str,
        threads: int = 8,
        queue: int = 128,
        tcp: str | tuple[str, int] | None = "127.0.0.1",
        ring_bytes: int = RING_BYTES,
        max_frame: int = MAX_FRAME_BYTES,
        max_connections: int = 1024,
        interceptors: Sequence[Interceptor] = (),
        loop: asyncio.AbstractEventLoop | None = None,
        pickle: bool = False,
        threshold: int | None = None,
        tracebacks: bool = True,
    ) -> Server:
        """Serve an object's public methods under a name, until stop() or the end of a ``with`` block.

        Args:
            service: annotations of its methods are checked; methods may be ``async def``.
            name: unique in the fabric.
            threads: calls that run at once.
            queue: calls that wait for a thread; more are refused as Overloaded.
            tcp: address, or (address, port), for clients that share no kernel with this one; None: rings only.
            ring_bytes: per connection and direction, a power of two.
            max_frame: largest message; more has to go by Ref.
            max_connections: clients at once.
            interceptors: ``f(call, proceed)``, outermost first; each returns what proceed() does, or something else.
            loop: where ``async def`` methods run; default a loop of the server's own.
            pickle: also take pickled arguments, which run code of the caller's choice.
            threshold: bytes from which results go by Ref; default the host's.
            tracebacks: send the traceback of what a method raises along.

        Raises:
            ServiceExists: the name is taken.
            TypeError: the object has no methods that can be served.

        Paper: IV.
        """
        me: Any = self
        published_once(me, name)
        marshaller = Marshaller(me, threshold or self.threshold)
        server = Server(
            me,
            service,
            name,
            marshaller,
            threads=threads,
            queue=queue,
            tcp=tcp,
            ring_bytes=ring_bytes,
            max_frame=max_frame,
            max_connections=max_connections,
            interceptors=interceptors,
            loop=loop,
            pickle=pickle,
            tracebacks=tracebacks,
        )
        self._ends.add(server)
        return server

    @overload
    def connect(self, name: str, service: None = None, **options: Any) -> Any: ...
    @overload
    def connect(self, name: str, service: type[ServiceType], **options: Any) -> ServiceType: ...

    def connect(  # type: ignore[misc]
        self,
        name: str,
        service: type[Any] | None = None,
        *,
        transport: Transport = "auto",
        transfer: Transfer = "auto",
        serializer: Serializer = "msgpack",
        timeout: float | None = 30.0,
        threshold: int | None = None,
        metadata: dict[str, str] | None = None,
        interceptors: Sequence[ClientInterceptor] = (),
        connect_timeout: float = 5.0,
    ) -> Any:
        """Return a client of a service.

        Args:
            name: under which it is published.
            service: its class, or any class with the same methods: checked against what the server has, results are read
                as annotated, and the client has its type.
            transport: "ring" (shared memory), "tcp", or "auto": rings where they reach.
            transfer: "auto", "value", "ref" or "copy".
            serializer: "pickle" for services that allow it.
            timeout: seconds per call; None: as long as it takes. Calls made while serving a call never outlast that one.
            threshold: bytes from which "auto" goes by Ref; default the host's.
            metadata: sent along with every call.
            interceptors: ``f(outbound, proceed)``, for synchronous calls, outermost first.
            connect_timeout: seconds to go on trying to reach the service again once it was lost.

        Raises:
            ServiceNotFound, PeerLost, AccessDenied, InterfaceMismatch, DeadlineExceeded.

        Paper: IV.
        """
        options = Options(timeout, transfer, serializer, dict(metadata or {}), interceptors)
        interface = Interface(service) if service is not None else None
        me: Any = self
        marshaller = Marshaller(me, threshold or self.threshold)
        link = Link(me, name, transport, interface, marshaller, connect_timeout)
        link.get(None)
        client = Client(link, options)
        self._ends.add(client)
        return client

    def put(self, value: Any) -> Any:
        """Place any picklable object in DM, its buffers out of band; return a Ref to it.

        Raises:
            CannotSend: it cannot be pickled.
            OutOfFrames: there is no room.
        """
        return objects.put(cast("Any", self), value)

    def get(self, ref: Any) -> Any:
        """Return the object that put() made a Ref to; the Ref is used up (clone() makes more).

        Buffers are not copied: arrays inside lie in DM, are writable, and what is stored to them is seen by nobody else.
        Unpickling runs code: only for objects of one's own fabric.

        Raises:
            BadRef: no Ref, or not to an object.
            RefConsumed: used before.
        """
        return objects.get(cast("Any", self), ref)

    def _stop_ends(self) -> None:
        for end in list(self._ends):
            with contextlib.suppress(MisuseError):
                if isinstance(end, Client):
                    end.close()
                else:
                    end.stop()
        for thread in list(self._errands):
            thread.join()  # it has a deadline of its own


class Host(Services, MemoryHost):
    """A process attached to a fabric: memory, services, clients. Made by :func:`dmrpc_cxl.attach`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._begin()

    def find_places(self) -> dict[type, Place]:
        """Return where this host's large data may go; see :mod:`dmrpc_cxl.rpc.places`."""
        return {Ref: Pool(self)}

    def take_ref(self, data: bytes) -> Any:
        """Take over a Ref that came in a message, from its bytes."""
        # Anew: its sender, which drops what was not accepted, may be this host as well.
        return Ref.from_bytes(data, self).accept(anew=True)

    def detach(self) -> None:
        """Stop services, close clients, leave the fabric; see :meth:`dmrpc_cxl.host.Host.detach`.

        A connection that is being made in the background has until its ``connect_timeout`` to notice.
        """
        if not self.detached:
            self._stop_ends()
        super().detach()

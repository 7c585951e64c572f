"""Hosts that use memory servers: instead of the pool, or beside it.

``NetHost`` maps no device. Its names are those of the fabric, whose coordinator it asks; its arrays are memory of its own,
and go to memory servers when they are sent. ``MixedHost`` has the pool, and reaches hosts that have none through memory
servers. Which of the two is used in a call is decided by what both ends reach: see :mod:`dmrpc_cxl.rpc.places`.

Paper: IV, V-A.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from dmrpc_cxl._native import Ref
from dmrpc_cxl.coordinator.client import Client as Coordinator
from dmrpc_cxl.coordinator.messages import MsgType
from dmrpc_cxl.errors import (
    BadAddress,
    BadRef,
    BadSize,
    CoordinatorLost,
    DeadlineExceeded,
    ForkedError,
    HostClosed,
)
from dmrpc_cxl.fabric.device import open as open_device
from dmrpc_cxl.host import Arrays, Names
from dmrpc_cxl.rpc.frames import REF_BYTES
from dmrpc_cxl.rpc.host import Host, Services
from dmrpc_cxl.rpc.ownership import Buffers
from dmrpc_cxl.rpc.places import Place, Pool, Servers
from dmrpc_cxl.rpc.threshold import DEFAULT

from ._native import Buffer as NetBuffer
from ._native import Ref as NetRef
from .memory import TOKEN_BYTES, Memory, is_token

__all__ = ["MixedHost", "NetHost"]

assert TOKEN_BYTES == REF_BYTES
Buffers.classes = (*Buffers.classes, NetBuffer)
Buffers.refs = (*Buffers.refs, NetRef)
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5


def _each(data: Any) -> list[bytes]:
    raw = bytes(data)
    if len(raw) % REF_BYTES:
        raise BadRef(f"drop_refs: Refs have {REF_BYTES} bytes each, not {len(raw)} together")
    return [raw[at : at + REF_BYTES] for at in range(0, len(raw), REF_BYTES)]


class _Registration:
    """A host as the coordinator knows it: a slot in its table, and a connection that is made anew when it is lost."""

    def __init__(self, fabric: str, name: str, *, tcp: bool, deadline: float) -> None:
        self._open: Callable[[], Coordinator] = lambda: Coordinator.to(
            fabric, tcp=tcp, timeout=deadline
        )
        self._deadline = deadline
        self._lock = threading.Lock()
        self._client: Coordinator | None = self._open()
        try:
            answer = self._client.register(name)
        except BaseException:
            self._client.close()
            raise
        self.id: int = answer.host
        self._incarnation: int = answer.incarnation

    def request(self, kind: str, question: dict[str, Any]) -> dict[str, Any]:
        """Ask the coordinator; when it was lost, the next one, until the time is over."""
        give_up, pause = time.monotonic() + self._deadline, FIRST_PAUSE
        with self._lock:
            while True:
                try:
                    if self._client is None:
                        self._client = self._open()
                        self._client.rejoin(self.id, self._incarnation)
                    answer: dict[str, Any] = self._client.request(MsgType[kind], question)
                    return answer
                except (CoordinatorLost, DeadlineExceeded):
                    self._drop()
                    if time.monotonic() + pause >= give_up:
                        raise
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None

    def leave(self) -> None:
        """Give the slot back, as far as anybody is there to take it."""
        with self._lock:
            if self._client is not None:
                with contextlib.suppress(CoordinatorLost, DeadlineExceeded):
                    self._client.leave()
            self._drop()


class NetHost(Services, Arrays, Names):
    """A process attached to a fabric whose memory is at memory servers: ``dmrpc_cxl.attach(fabric, dm="net")``.

    It has the methods of a Host; buffers are memory of this process, Refs those of :mod:`dmrpc_net`.

    Attributes:
        memory: what it has at the servers, with its client and how received arrays are fetched.
        fabric, name, id: as those of other hosts.
    """

    emulates_latency = False

    def __init__(
        self, fabric: str, name: str, memory: Memory, *, transport: str, deadline: float
    ) -> None:
        """Register with a fabric's coordinator; see :func:`dmrpc_cxl.attach`."""
        self._begin()
        self.fabric, self.name, self.memory = fabric, name, memory
        with open_device(fabric, writable=False) as device:  # for what proves that we may
            found = device.superblock
        self.fabric_id: int = found["fabric_id"]
        self.secret: bytes = found["secret"]
        self._registration = _Registration(fabric, name, tcp=transport == "tcp", deadline=deadline)
        self._detached = False

    # ---------------------------------------------------------------- a host

    def _check(self, operation: str) -> None:
        if self.memory.owner != os.getpid():
            raise ForkedError(f"{operation}: this host is the parent's of this forked child")
        if self._detached:
            raise HostClosed(f"{operation}: this host has detached")

    @property
    def id(self) -> int:
        """Host id, 1 and up."""
        return self._registration.id

    @property
    def page_size(self) -> int:
        """Bytes of a page at the servers."""
        return self.memory.client.page_size

    @property
    def detached(self) -> bool:
        """Whether detach() was called."""
        return self._detached

    def stats(self) -> dict[str, int]:
        """Return what was fetched, in which faults, and how many stores were noticed."""
        self._check("stats")
        return self.memory.stats()

    def _ask(self, kind: str, question: dict[str, Any]) -> dict[str, Any]:
        self._check(kind.lower())
        return self._registration.request(kind, question)

    def _measured(self) -> int:
        return DEFAULT

    def detach(self) -> None:
        """Stop services, close clients, leave the servers and the fabric. Idempotent.

        Raises:
            BufferInUse: arrays are alive whose bytes are still at the servers; services are stopped.
        """
        if self._detached:
            return
        self._check("detach")
        self._stop_ends()
        self.memory.close()
        self._detached = True
        self._registration.leave()

    def __enter__(self) -> NetHost:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<NetHost {self.id} ({self.name}) of {self.fabric}>"

    # ---------------------------------------------------------------- memory

    def ralloc(self, size: int, *, zero: bool = True) -> NetBuffer:
        """Return memory of this process that can be sent by Ref. Nothing is taken at the servers yet.

        Args:
            size: in bytes.
            zero: all zeros; else what freed buffers of this host may have left.
        """
        self._check("ralloc")
        if size < 1:
            raise BadSize(f"ralloc: {size} bytes")
        return self.memory.buffer(size, zero=zero)

    def rfree(self, buffer: NetBuffer) -> None:
        """Release a Buffer now; see Buffer.free."""
        buffer.free()

    def create_ref(self, target: Any, *, move: bool = False) -> NetRef:
        """Return a Ref to what a Buffer, an array or a view of one holds now; the bytes go to a server if they are not there.

        Args:
            target: what to share.
            move: give the Buffer up.
        """
        self._check("create_ref")
        return self.memory.create_ref(target, move=move)

    def map_ref(self, ref: Any, *, copy: bool = False) -> NetBuffer:
        """Return a Buffer that shows what a Ref has; the Ref is used up. copy: fetch it now."""
        buffer = self.view_ref(ref)
        if copy:
            self.memory.complete(buffer)
        return buffer

    def view_ref(self, ref: Any) -> NetBuffer:
        """Return a Buffer that shows what a Ref has; the Ref is used up. Its bytes come when they are looked at."""
        self._check("view_ref")
        return self.memory.view(self._token(ref))

    def fetch(self, target: Any) -> None:
        """Fetch all of a received array now, so that what goes wrong is raised here.

        Raises:
            ServerLost, DeadlineExceeded: its bytes cannot be had.
            BadAddress: it is no array that came by Ref.
        """
        self._check("fetch")
        buffer = target if isinstance(target, NetBuffer) else self.memory.buffer_of(target)
        if buffer is None:
            raise BadAddress("fetch: this array does not lie in a buffer of this host")
        self.memory.complete(buffer)

    def _token(self, ref: Any) -> bytes:
        if isinstance(ref, NetRef):
            return self.memory.token_of(ref)
        raw = bytes(ref)
        return (
            raw
            if len(raw) == TOKEN_BYTES
            else self.memory.token_of(NetRef.from_bytes(raw, self.memory.client))
        )

    def contains(self, target: Any) -> bool:
        """Tell whether an array lies in a Buffer of this host."""
        self._check("contains")
        return self.memory.holds(target)

    def move_viewed(self, buffer: NetBuffer) -> NetRef:
        """Move a Buffer that has one view left, which the caller takes away right after."""
        return self.memory.move_viewed(buffer)

    # ---------------------------------------------------------------- Refs in messages

    def find_places(self) -> dict[type, Place]:
        """Return where this host's large data may go."""
        return {NetRef: Servers(self.memory)}

    def take_ref(self, data: bytes) -> Any:
        """Take over a Ref that came in a message, from its bytes."""
        return self.memory.take(data)

    def drop_refs(self, data: Any) -> int:
        """Drop the Refs of a message that nobody took over, whoever holds them; does not wait. Returns 0: nobody knows."""
        self.memory.forget(_each(data))
        return 0

    def ref_is_held(self, data: Any) -> bool:
        """Tell whether a Ref that was sent is still this process's."""
        return self.memory.is_held(bytes(data))


class MixedHost(Host):
    """A host with the pool that uses memory servers as well: ``dmrpc_cxl.attach(fabric, servers=[...])``."""

    memory: Memory

    def find_places(self) -> dict[type, Place]:
        """Return where this host's large data may go: the pool if the other end has it, else memory servers."""
        return {Ref: Pool(self), NetRef: Servers(self.memory)}

    def view_ref(self, ref: Any) -> Any:
        """Return a buffer that shows what a Ref of either kind has; the Ref is used up."""
        if isinstance(ref, NetRef):
            return self.memory.view(self.memory.token_of(ref))
        if not isinstance(ref, Ref) and is_token(ref):
            return self.memory.view(bytes(ref))
        return super().view_ref(ref)

    def take_ref(self, data: bytes) -> Any:
        """Take over a Ref of either kind that came in a message, from its bytes."""
        return self.memory.take(data) if is_token(data) else super().take_ref(data)

    def drop_refs(self, data: Any) -> int:
        """Drop the Refs of a message that nobody took over, whoever holds them; at memory servers without waiting."""
        every = _each(data)
        there = [raw for raw in every if is_token(raw)]
        if not there:
            return super().drop_refs(data)
        self.memory.forget(there)
        return super().drop_refs(b"".join(raw for raw in every if not is_token(raw)))

    def ref_is_held(self, data: Any) -> bool:
        """Tell whether a Ref that was sent is still held under its bytes."""
        raw = bytes(data)
        return self.memory.is_held(raw) if is_token(raw) else super().ref_is_held(raw)

    def detach(self) -> None:
        """Stop services, close clients, leave the fabric and the servers; see Host.detach."""
        if not self.detached:
            self._stop_ends()
            self.memory.close()
        super().detach()

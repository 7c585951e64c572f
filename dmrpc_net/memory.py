"""Memory servers as the memory of a host: arrays go there as Refs, and come as Buffers that are fetched when looked at.

A host of :mod:`dmrpc_cxl` puts, shares, sends and receives through this; ``Client`` is for who wants ranges and addresses.

What is kept of a Buffer's Ref. A Buffer that came by a Ref holds that Ref until it ends: until nothing was stored to it, the
Ref has its bytes, and sending it once more sends a clone of the Ref, whether the bytes were fetched or not. A Buffer that was
made here and is sent for the second time is treated likewise from then on. Stores are noticed by write protection, so without
userfaultfd nothing is kept: bytes are fetched at once, and sent each time.

==========  ================================================================================
fetch       when the bytes of a received array come
==========  ================================================================================
whole       all of them when the first of them is looked at
touched     page by page, as they are looked at; more at a time while that goes on in order
now         when the message is read. The only way without permission to use userfaultfd
==========  ================================================================================

A Ref in a message is a *token* of 40 bytes: a mark, the group of servers, the 24 bytes of the Ref.

Paper: IV, V-A.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
import weakref
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from dmrpc_cxl.errors import BadAddress, BadRef, BufferInUse, DmError, MisuseError

from ._native import Arena, Buffer, Pager, Ref
from .client import Client, attach
from .errors import ServerLost

__all__ = ["TOKEN_BYTES", "Fetch", "Memory", "is_token"]

Fetch: TypeAlias = Literal["whole", "touched", "now"]

MARK = b"\0DmRNet\1"  # no fabric has this id
TOKEN = struct.Struct("<8s8s24s")
TOKEN_BYTES = TOKEN.size
_QUICK_SECONDS = 1.0  # for what is only tidying up
_ROUTE_PAUSE = 1.0  # seconds until a way for the pager is looked for again


def is_token(raw: bytes) -> bool:
    """Tell whether the bytes of a Ref are those of a Ref at memory servers."""
    return raw[:8] == MARK


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


class Memory:
    """The memory servers that a host uses. Thread-safe; not usable in forked children.

    Attributes:
        client: of these servers.
        fetch: when the bytes of received arrays come; what was asked for, or "now" where nothing else can be had.
        group: eight bytes that all clients of these servers agree on.
        owner: process id.
    """

    def __init__(self, client: Client, secret: bytes, fetch: Fetch = "whole") -> None:
        """Use a client's servers, with their secret; the client is closed with this."""
        if fetch not in get_args(Fetch):
            raise ValueError(f"fetch: one of {', '.join(get_args(Fetch))}, not {fetch!r}")
        self.client = client
        self.owner = os.getpid()
        self.group = hashlib.blake2b(secret, digest_size=8, person=b"dmrpc-net-group").digest()
        self.fetch: Fetch = fetch
        self.closed = False
        self._head = MARK + self.group
        self._buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._reader: Client | None = None  # the pager's process at the servers
        self._routes: set[tuple[int, int, int]] = set()
        self._route_again: dict[
            int, float
        ] = {}  # when to look for a way to a server again; monotonic
        self._sent_once: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._arena = Arena()
        self._pager: Pager | None = None
        self._secret = secret
        with contextlib.suppress(OSError):  # no permission, or a kernel without
            self._pager = Pager(client.patience)
        if self._pager is None:
            self.fetch = "now"

    @classmethod
    def attach(
        cls,
        servers: Any = None,
        *,
        secret: Any = None,
        deadline: float = 10.0,
        fetch: Fetch = "whole",
    ) -> Memory:
        """Become a process of memory servers; arguments as those of :func:`dmrpc_net.attach`."""
        client = attach(servers, secret=secret, deadline=deadline)
        try:
            return cls(client, client.secret, fetch)
        except BaseException:
            client.close()
            raise

    # ---------------------------------------------------------------- tokens

    def token_of(self, ref: Ref) -> bytes:
        """Return the 40 bytes that stand for a Ref in a message; whoever reads them takes it over."""
        return self._head + ref.to_bytes()

    def wire_of(self, token: bytes) -> bytes:
        """Return the 24 bytes of the Ref in a token.

        Raises:
            BadRef: not a token, or one of other servers.
        """
        if len(token) != TOKEN_BYTES or token[:8] != MARK:
            raise BadRef("these bytes are no Ref at memory servers")
        if token[8:16] != self.group:
            raise BadRef("a Ref at other memory servers than those of this host")
        return token[16:]

    def take(self, token: bytes) -> Ref:
        """Take over the Ref in a token: from now on it is this process's, and the token of no use to anybody.

        Raises:
            BadRef, RefConsumed: it is not to be had.
        """
        ref: Ref = self.client.accept_ref(self.wire_of(token), anew=True)
        return ref

    def forget(self, tokens: Iterable[bytes]) -> None:
        """Drop the Refs in tokens that nobody has taken over, whoever holds them. Does not wait, raises nothing."""
        wires = [token[16:] for token in tokens if token[:16] == self._head]
        if not wires or self.client.is_closed or self.client.owner != os.getpid():
            return
        for wire in self.client.forget_refs(wires):  # at shards that this process never spoke to
            with contextlib.suppress(DmError, OSError):
                self.client.drop_ref(wire, anybodys=True, timeout=_QUICK_SECONDS)

    def is_held(self, token: bytes) -> bool:
        """Tell whether the Ref in a token is still this process's, and nobody took it over."""
        try:
            return self.client.ref_is_held(self.wire_of(token))
        except (DmError, OSError):
            return False

    # ---------------------------------------------------------------- buffers

    def buffer(self, nbytes: int, *, zero: bool = True) -> Buffer:
        """Return memory of this process. zero: all zeros, else what it held before."""
        if self.closed:
            raise MisuseError("this host has left its memory servers")
        buffer = Buffer(self, self._arena, nbytes, zero=zero)
        self._buffers.add(buffer)
        return buffer

    def view(self, token: bytes) -> Buffer:
        """Take over the Ref in a token and return a Buffer that shows its bytes.

        Raises:
            BadRef, RefConsumed: it is not to be had.
            ServerLost, DeadlineExceeded: nor is an answer.
        """
        if self._pager is None or not self._way_to(
            Ref.from_bytes(self.wire_of(token), self.client)
        ):
            return self._got(token)
        return self.show(self.take(token))

    def _got(self, token: bytes) -> Buffer:
        wire = self.wire_of(token)
        buffer = self.buffer(Ref.from_bytes(wire, self.client).nbytes, zero=False)
        with memoryview(buffer) as view:
            self.client.get(wire, into=view)
        return buffer

    def show(self, ref: Ref) -> Buffer:
        """Return a Buffer that shows what a Ref of this process has; the Ref is the Buffer's."""
        if self._pager is None or not self._way_to(ref):
            return self._got(self.token_of(ref))
        buffer = self.buffer(ref.nbytes, zero=False)
        try:
            buffer.show(self._pager, ref, whole=self.fetch != "touched")
        except OSError:  # no memory to note it in
            with memoryview(buffer) as view:
                self.client.get(ref, into=view)
            return buffer
        if self.fetch == "now":
            self.complete(buffer)
        return buffer

    def complete(self, buffer: Buffer) -> None:
        """Fetch what was not fetched yet, in the calling thread: what goes wrong is raised, not a signal."""
        if not buffer.complete:
            buffer.supply(self.client.get(buffer.ref, keep=True))

    def _way_to(self, ref: Ref) -> bool:
        """See to it that the pager can reach a Ref's shard. False: it cannot now, so bytes have to be fetched at once."""
        server = ref.server
        where = server, ref.shard, self.client.session_of(server)
        reader = self._reader
        if reader is not None and where in self._routes and reader.is_joined(server):
            return True
        if time.monotonic() < self._route_again.get(server, 0.0):
            return False
        assert self._pager is not None
        try:
            if reader is None:
                reader = self._reader = attach(
                    self.client.addresses, secret=self._secret, deadline=self.client.patience
                )
            address, hello = reader.introduction(server, ref.shard)
            self._pager.route(server, address, hello)
        except (
            DmError,
            OSError,
        ):  # the server takes no more clients, or has just gone: the Ref is whole
            self._route_again[server] = time.monotonic() + _ROUTE_PAUSE
            return False
        self._routes = {one for one in self._routes if one[0] != server or one[2] == where[2]}
        self._routes.add(where)
        return True

    # ---------------------------------------------------------------- sending

    @staticmethod
    def buffer_of(target: Any) -> Buffer | None:
        """Return the Buffer that an array or a memoryview shows, or a part of it."""
        while isinstance(target, np.ndarray):
            target = target.base
        while isinstance(target, memoryview):
            target = target.obj
            while isinstance(target, np.ndarray):
                target = target.base
        return target if isinstance(target, Buffer) else None

    def holds(self, target: Any) -> bool:
        """Tell whether an array lies in a Buffer of this host, so that its Ref may serve."""
        buffer = self.buffer_of(target)
        return buffer is not None and buffer.host is self

    def place(self, array: np.ndarray[Any, Any]) -> Ref:
        """Put a copy of an array's bytes at a server."""
        return self.client.put(_bytes_of(np.ascontiguousarray(array)))

    def share(self, target: memoryview) -> Ref:
        """Return a Ref to the bytes that a view of a Buffer has now; without sending them, if a Ref has them already."""
        buffer = self.buffer_of(target)
        if buffer is None or target.nbytes != buffer.nbytes:
            return self.client.put(target)
        if not buffer.changed:
            with contextlib.suppress(ServerLost, BadRef):
                return self.client.clone_ref(buffer.ref)
            self.complete(buffer)
        if buffer in self._sent_once and self._pager is not None and buffer.complete:
            return self._share_and_keep(buffer, target)
        self._sent_once.add(buffer)
        return self.client.put(target)

    def _share_and_keep(self, buffer: Buffer, target: memoryview) -> Ref:
        assert self._pager is not None
        if not buffer.watch(self._pager):
            return self.client.put(target)
        ref = self.client.put(target)
        buffer.remember(ref)  # stores since watch() have made it one that was changed
        return self.client.clone_ref(ref)

    def create_ref(self, target: Any, *, move: bool = False) -> Ref:
        """Return a Ref to the bytes of a Buffer, or of an array or view of one.

        Raises:
            BufferInUse: move, and views are alive.
            BadAddress: neither.
        """
        if isinstance(target, Buffer):
            if not move:
                with memoryview(target) as view:
                    return self.share(view)
            if target.views:
                raise BufferInUse(f"create_ref: {target.views} views on this buffer are alive")
            return self._move(target)
        if move:
            raise BadAddress("create_ref: only a whole Buffer can be moved")
        with memoryview(target) as view, view.cast("B") as flat:
            return self.share(flat)

    def move_viewed(self, buffer: Buffer) -> Ref:
        """Move a Buffer that has one view left, which the caller takes away right after."""
        return self._move(buffer)

    def _move(self, buffer: Buffer) -> Ref:
        if buffer.freed:
            raise BadAddress("create_ref: this buffer was freed or moved")
        if buffer.changed:
            with memoryview(buffer) as view:
                ref = self.client.put(view)
        else:
            ref = buffer.ref
        buffer.retire()
        return ref

    # ---------------------------------------------------------------- the end

    def stats(self) -> dict[str, int]:
        """Count what was fetched, what came of stores, and the bytes of freed buffers that are kept for the next."""
        kept = {"bytes_kept": self._arena.kept()}
        return kept if self._pager is None else self._pager.stats() | kept

    def close(self) -> None:
        """Leave the servers. Idempotent.

        Raises:
            BufferInUse: views of Buffers are alive whose bytes were not fetched; nothing was changed.
        """
        if self.closed:
            return
        if self.owner == os.getpid():
            for buffer in list(self._buffers):
                buffer.settle()
            waiting = [b for b in list(self._buffers) if b.views and not (b.complete or b.failed)]
            if waiting:
                raise BufferInUse(
                    f"{len(waiting)} arrays are alive whose bytes are still at memory servers"
                )
        self.closed = True
        for buffer in list(self._buffers):
            if not buffer.views and not buffer.freed:
                buffer.free()
        if self._reader is not None:
            self._reader.close()
        self.client.close()

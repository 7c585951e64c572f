"""One accepted connection: a raw socket, its end of the protocol, its time limits, and the
descriptors it was sent.

Facts that shape this file:
  - asyncio's transports read with recv(2), which throws descriptors in flight away. So the socket
    is read here, with recvmsg(2), by a reader callback of the event loop.
  - The callback runs also while a request is being served. So the end of the peer is noticed at
    once, and whoever waits on its behalf can wait for `gone` as well.
  - A connection closed by the peer says nothing about the peer's life; that is watched elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dmrpc_cxl.errors import DmError

from .messages import HEADER, MAX_PAYLOAD, MsgType, Status
from .protocol import CoordinatorSide, Malformed, Request, State
from .refusals import status_of

log = logging.getLogger(__name__)

READ_BYTES = 65536
MAX_DESCRIPTORS = 4
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True)
class TimeLimits:
    """How long a peer may take, in seconds."""

    hello: float = 5.0
    """From the connection to a complete HELLO."""
    message: float = 30.0
    """From the first byte of a message to its last one."""
    send: float = 10.0
    """To read an answer."""


class Connection:
    """The coordinator's end of one connection."""

    def __init__(
        self,
        sock: socket.socket,
        limits: TimeLimits,
        serve: Callable[[Connection, Request], Awaitable[Any]],
        on_close: Callable[[Connection], None],
    ) -> None:
        """Begin to read a connected socket; must be called in the event loop."""
        self.protocol = CoordinatorSide()
        self.gone = asyncio.Event()
        self.host: int | None = None
        self.incarnation = 0
        self.peer_pid: int | None = None  # None: the kernel does not say, as on TCP
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.peer_pid = _CREDENTIALS.unpack(credentials)[0]
        self._sock = sock
        self._limits = limits
        self._serve = serve
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._descriptors: list[int] = []
        self._sending = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(
            limits.hello, self._too_slow, "did not introduce itself in time"
        )
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def __str__(self) -> str:
        peer = "over TCP" if self.peer_pid is None else f"of process {self.peer_pid}"
        return f"connection {peer}" + (f", host {self.host}" if self.host else "")

    @property
    def is_unix(self) -> bool:
        """Tell whether descriptors and credentials can come over this connection."""
        return self.peer_pid is not None

    def peer_closed(self) -> bool:
        """Ask the kernel whether the peer has closed its end: sooner than the event loop knows."""
        if self.gone.is_set():
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def take_descriptors(self) -> list[int]:
        """Hand over what descriptors have arrived; the caller closes them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def notify(self, kind: MsgType, body: Any = None) -> bool:
        """Say something to a guard without waiting. False: the peer is gone or does not read."""
        if self.gone.is_set() or self.protocol.state is not State.GUARD:
            return False
        data = self.protocol.notify(kind, body)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        if sent < len(data):
            self.close()
        return sent == len(data)

    def close(self) -> None:
        """End the connection; does nothing the second time."""
        if self.gone.is_set():
            return
        self.gone.set()
        self._stop_timer()
        self._loop.remove_reader(self._sock)
        for descriptor in self.take_descriptors():
            os.close(descriptor)
        if self._sending:  # sock_sendall uses the socket: make it fail, _send closes
            self._sock.shutdown(socket.SHUT_RDWR)
        else:
            self._sock.close()
        self._on_close(self)

    async def finish(self) -> None:
        """Wait until the request that is being served, if any, has been answered."""
        if self._task is not None:
            await asyncio.wait({self._task})

    # ---------------------------------------------------------------- reading

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                READ_BYTES,
                socket.CMSG_SPACE(MAX_DESCRIPTORS * struct.calcsize("i")),
                socket.MSG_CMSG_CLOEXEC,
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(payload) - len(payload) % struct.calcsize("i")
                self._descriptors += [fd for (fd,) in struct.iter_unpack("i", payload[:whole])]
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
            self._complain(Malformed("too many descriptors"))
        elif not data:
            self.close()
        else:
            self.protocol.feed(data)
            if self._sending and self.protocol.buffered > HEADER.size + MAX_PAYLOAD:
                self._complain(Malformed("requests come, but their answers are not read"))
            else:
                self._advance()

    def _advance(self) -> None:
        """Serve the next request if it is complete and none is being served."""
        try:
            # While an answer is on its way out the next request may come in already, and waits.
            while not self._sending and not self.gone.is_set():
                request = self.protocol.next_message()
                if request is None:
                    break
                self._task = self._loop.create_task(self._answer(request))
        except Malformed as error:
            self._complain(error)
        else:
            self._watch_pace()

    def _watch_pace(self) -> None:
        if self.gone.is_set() or self.protocol.state is State.STRANGER:
            return  # the limit for HELLO goes on
        if self.protocol.in_message != (self._timer is not None):
            self._stop_timer()
            if self.protocol.in_message:
                self._timer = self._loop.call_later(
                    self._limits.message, self._too_slow, "did not complete a message in time"
                )

    def _too_slow(self, what: str) -> None:
        log.warning("%s %s; closed", self, what)
        self.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _complain(self, error: Malformed) -> None:
        log.warning("%s broke the protocol: %s; closed", self, error)
        if not self._sending:
            try:
                self._sock.send(self.protocol.complain(error))
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        self.close()

    # ---------------------------------------------------------------- answering

    async def _answer(self, request: Request) -> None:
        try:
            body = await self._serve(self, request)
            data = self.protocol.reply(request, body)
        except DmError as error:
            log.debug("%s: %s refused: %s", self, request.type.name, error)
            data = self.protocol.refuse(request, status_of(error), str(error))
        except Exception:
            log.exception("%s: %s failed", self, request.type.name)
            text = "internal error; the coordinator's log says more"
            data = self.protocol.refuse(request, Status.INTERNAL, text)
        finally:
            for descriptor in self.take_descriptors():
                os.close(descriptor)
        if self.protocol.state is State.STRANGER:  # HELLO was refused
            await self._send(data)
            self.close()
            return
        if request.type is MsgType.HELLO:
            self._stop_timer()
        await self._send(data)
        self._advance()

    async def _send(self, data: bytes) -> None:
        if self.gone.is_set():
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent == len(data):
            return
        self._sending = True
        try:
            rest = self._loop.sock_sendall(self._sock, memoryview(data)[sent:])
            await asyncio.wait_for(rest, self._limits.send)
        except (OSError, asyncio.TimeoutError):
            log.warning("%s does not read its answer; closed", self)
            self.close()
        finally:
            self._sending = False
            if self.gone.is_set():
                self._sock.close()

"""A TCP proxy between clients and a memory server, that can do to connections what networks do."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator

CHUNK = 1 << 16


class _Pair:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.to_server = self.to_client = 0

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens at `address`, and passes on what comes.

    The first connection is a client's control connection and is left alone by what is done to the others.
    """

    def __init__(self, server: str) -> None:
        host, port = server.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._wake, self._woken = socket.socketpair()
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self.swallow = False  # answers do not arrive
        self.refuse = False  # new connections are closed at once
        self.cut_after: int | None = None  # bytes of answers, then every data connection breaks
        self.garble = False  # what comes next from the server on a data connection is changed
        self.nr_accepted = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break every data connection."""
        with self._lock:
            for pair in self._pairs[1:]:
                for end in (pair.client, pair.server):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def cut_control(self) -> None:
        """Break the control connection."""
        with self._lock:
            for end in (self._pairs[0].client, self._pairs[0].server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ended = True
        self._wake.send(b"x")
        self._thread.join(60)
        assert not self._thread.is_alive()
        for pair in self._pairs:
            pair.close()
        for end in (self._wake, self._woken, self._listener):
            end.close()

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                ends = [end for pair in self._pairs for end in (pair.client, pair.server)]
            readable, _, _ = select.select(
                [self._listener, self._woken, *(end for end in ends if end.fileno() >= 0)], [], []
            )
            if self._listener in readable:
                self._accept()
            for pair in list(self._pairs):
                if pair.client in readable:
                    self._pass_on(pair, pair.client, pair.server)
                if pair.server in readable and pair.server.fileno() >= 0:
                    self._pass_on(pair, pair.server, pair.client)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.nr_accepted += 1
        if self.refuse:
            client.close()
            return
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._pairs.append(_Pair(client, server))

    def _pass_on(self, pair: _Pair, source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(CHUNK)
            if not data:
                raise ConnectionResetError
            if source is pair.client:
                sink.sendall(data)
                pair.to_server += len(data)
                return
            is_control = pair is self._pairs[0]
            if self.swallow and not is_control:
                return
            if self.garble and not is_control:
                self.garble = False
                data = bytes(byte ^ 0x5A for byte in data)
            if self.cut_after is not None and not is_control:
                data = data[: self.cut_after]
                self.cut_after -= len(data)
            sink.sendall(data)
            pair.to_client += len(data)
            if self.cut_after == 0 and not is_control:
                self.cut_after = None
                raise ConnectionResetError
        except OSError:
            pair.close()
            with self._lock:
                if pair is not self._pairs[0]:  # the control connection keeps its place
                    self._pairs.remove(pair)


@contextlib.contextmanager
def between(server: str) -> Iterator[Proxy]:
    """Give a proxy to one server."""
    proxy = Proxy(server)
    try:
        yield proxy
    finally:
        proxy.close()

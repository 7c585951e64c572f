"""What people do today on one machine: an immutable object store, and shared memory by hand.

Both give the receiver a private, writable copy, as the RPC layer does.

`store`. A process that hands out room in one shared segment, like the stores of Ray and Arrow: create, seal, get, release,
delete over a Unix socket. The producer copies in, the consumer copies out. What names the object goes through our RPC layer.

`shm`. What an expert writes: a segment made in advance, 8-byte messages over a Unix socket, no allocation, no store, no library.
"""

from __future__ import annotations

import collections
import os
import selectors
import socket
import struct
import threading
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from ...rpc_stage import client_of, serve
from ..blocks import Block, one_by_one, windowed
from ..runner import Runner
from .base import Parties, Writing
from .rpc import CLIENT
from .work import Bytes, Requests, overwrite

STORE, STORE_WRITER = "store", "store-writer"
SEGMENT_BYTES = 64 << 20
CREATE, SEAL, GET, RELEASE, DELETE = range(1, 6)
_ASK = struct.Struct("<QQ")  # what << 56 | object, size
_ANSWER = struct.Struct("<QQ")  # object, offset


# ---------------------------------------------------------------- the store


class _Store(threading.Thread):
    """Hands out room, knows who looks at it, takes it back."""

    def __init__(self, path: str) -> None:
        super().__init__(name="store", daemon=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._objects: dict[int, list[int]] = {}  # offset, size, readers, sealed, deleted
        self._free: dict[int, list[int]] = collections.defaultdict(list)  # by size
        self._end = 0
        self._next = 1

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            for key, _ in self._selector.select():
                sock: Any = key.fileobj
                if sock is self._listener:
                    self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                    continue
                asked = sock.recv(_ASK.size)
                if not asked:
                    self._selector.unregister(sock)
                    sock.close()
                else:
                    self._serve(sock, *_ASK.unpack(asked))

    def _serve(self, sock: socket.socket, what: int, size: int) -> None:
        number, what = what & (1 << 56) - 1, what >> 56
        if what == CREATE:
            number, self._next = self._next, self._next + 1
            room = self._free[size]
            if room:
                offset = room.pop()
            else:
                offset, self._end = self._end, self._end + size
                if self._end > SEGMENT_BYTES:
                    raise MemoryError("the store is full")
            self._objects[number] = [offset, size, 0, 0, 0]
            sock.send(_ANSWER.pack(number, offset))
            return
        found = self._objects[number]
        if what == SEAL:
            found[3] = 1
        elif what == GET:
            assert found[3], "an object is read that was not sealed"
            found[2] += 1
            sock.send(_ANSWER.pack(number, found[0]))
            return
        elif what == RELEASE:
            found[2] -= 1
        else:
            found[4] = 1
        if found[4] and not found[2]:
            self._free[found[1]].append(found[0])
            del self._objects[number]


_kept: list[Any] = []


def _run_store(host: Any, name: str, path: str, segment: str) -> None:
    np.memmap(segment, "u1", "w+", shape=SEGMENT_BYTES)[:] = 0  # every page is there
    store = _Store(path)
    store.start()
    _kept.extend((store, segment))


def _end_store(host: Any) -> None:
    store, segment = _kept
    _kept.clear()
    os.unlink(segment)
    os.unlink(store._listener.getsockname())


class StoreClient:
    """A connection to the store."""

    def __init__(self, path: str, segment: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._bytes: Bytes = np.asarray(np.memmap(segment, "u1", "r+"))

    def _ask(self, what: int, number: int, size: int) -> tuple[int, int]:
        self._socket.send(_ASK.pack(what << 56 | number, size))
        found: tuple[int, int] = _ANSWER.unpack(self._socket.recv(_ANSWER.size))
        return found

    def put(self, block: Bytes) -> int:
        """Copy a block in; return the number of the object."""
        number, offset = self._ask(CREATE, 0, block.size)
        self._bytes[offset : offset + block.size] = block
        self._socket.send(_ASK.pack(SEAL << 56 | number, 0))
        return number

    def copy_out(self, number: int, into: Bytes) -> None:
        """Copy an object out."""
        offset = self._ask(GET, number, 0)[1]
        into[:] = self._bytes[offset : offset + into.size]
        self._socket.send(_ASK.pack(RELEASE << 56 | number, 0))

    def delete(self, number: int) -> None:
        """Have the store take its room back once nobody reads it."""
        self._socket.send(_ASK.pack(DELETE << 56 | number, 0))

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()


class StoredWriter:
    """Stores to a share of its own copy of objects."""

    def __init__(self, path: str, segment: str) -> None:
        self._store = StoreClient(path, segment)
        self._copies: dict[int, Bytes] = {}

    def write(self, number: int, size: int, pages: int, nbytes: int, value: int) -> int:
        copy = self._copies.get(size)
        if copy is None:
            copy = self._copies[size] = np.zeros(size, "u1")
        self._store.copy_out(number, copy)
        return overwrite(copy, pages, nbytes, value)


def stored_block(
    host: Any,
    service: str,
    transport: str,
    path: str,
    segment: str,
    mode: str,
    size: int,
    pages: int,
    nbytes: int,
    window: int = 1,
) -> Block:
    """Return a block of requests to a StoredWriter."""
    if window != 1:
        raise ValueError("one request at a time")
    method = client_of(host, service, transport).using(transfer="value").write
    store = StoreClient(path, segment)
    requests = Requests(size, pages, same=mode == "pre-shared")
    prepared = store.put(requests.sources[0]) if mode == "pre-shared" else 0

    def fresh() -> Any:
        block, value = requests.next()
        number = store.put(block)
        result = method(number, size, pages, nbytes, value)
        store.delete(number)
        return result

    def pre_shared() -> Any:
        return method(prepared, size, pages, nbytes, requests.next()[1])

    made = one_by_one(fresh if mode == "fresh" else pre_shared, requests.expected)

    def close() -> None:
        if prepared:
            store.delete(prepared)
        store.close()

    made.close = close
    return made


class ObjectStore(Writing):
    """A stand-in for the object stores of data-processing systems."""

    name = "store"
    says = "object store, copy in, copy out"
    colour = "#b8860b"
    marker = "h"

    def start(self, runner: Runner) -> Parties:
        on = runner.on
        path = f"/tmp/dmrpc-figures-store-{os.getpid()}.sock"
        segment = f"/dev/shm/dmrpc-figures-store-{os.getpid()}"
        if CLIENT not in on.peers:
            on.start(CLIENT)
        if STORE not in on.peers:
            on.start(STORE, _run_store, path, segment, attached=False)
            on.start(STORE_WRITER, serve, StoredWriter, path, segment)
        return Parties(
            CLIENT,
            (STORE_WRITER, STORE, "coordinator"),
            stored_block,
            {
                "service": STORE_WRITER,
                "path": path,
                "segment": segment,
            },
            stop=lambda: on.peers[STORE].call(_end_store),
        )


# ---------------------------------------------------------------- by hand

HAND_CLIENT, HAND_WRITER = "shm-client", "shm-writer"
HAND_BYTES = 32 << 20
_MESSAGE = struct.Struct("<HHHH")  # slot, pages, bytes in each, value
_RESULT = struct.Struct("<Q")
_hand: list[Any] = []


def _bytes(segment: SharedMemory) -> Bytes:
    assert segment.buf is not None
    return np.frombuffer(segment.buf, "u1")


def _serve_by_hand(host: Any, name: str, path: str) -> str:
    segment = SharedMemory(create=True, size=HAND_BYTES)
    _bytes(segment)[:] = 0
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    _hand.extend((segment, listener, path))
    threading.Thread(target=_accept_by_hand, args=(listener, segment), daemon=True).start()
    return segment.name


def _accept_by_hand(listener: socket.socket, segment: SharedMemory) -> None:
    while True:
        try:
            sock = listener.accept()[0]
        except OSError:
            return
        _loop_by_hand(sock, segment)


def _loop_by_hand(sock: socket.socket, segment: SharedMemory) -> None:
    size = int.from_bytes(sock.recv(8), "little")  # of a slot
    slots = _bytes(segment)
    copy = np.zeros(size, "u1")
    recv, send = sock.recv, sock.send
    while len(message := recv(8)) == 8:
        slot, pages, nbytes, value = _MESSAGE.unpack(message)
        np.copyto(copy, slots[slot * size : (slot + 1) * size])
        send(_RESULT.pack(overwrite(copy, pages, nbytes, value)))
    sock.close()


def _end_by_hand(host: Any) -> None:
    segment, listener, path = _hand
    _hand.clear()
    listener.close()
    os.unlink(path)
    segment.unlink()


class _Result:
    """The answer to one message; answers come in order."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def result(self) -> int:
        """Wait for it."""
        return int.from_bytes(self._socket.recv(8, socket.MSG_WAITALL), "little")


def hand_block(
    host: Any,
    path: str,
    segment: str,
    mode: str,
    size: int,
    pages: int,
    nbytes: int,
    window: int = 1,
) -> Block:
    """Return a block of requests by hand."""
    shared = SharedMemory(segment)
    bytes_ = _bytes(shared)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    slots = [bytes_[i * size : (i + 1) * size] for i in range(window)]
    turn = 0
    requests = Requests(size, pages, same=mode == "pre-shared")
    send, recv = sock.send, sock.recv
    first = _Result(sock)

    def connect(n: int) -> None:
        # Blocks take turns, and the writer serves one connection: each time a new one.
        nonlocal sock, send, recv, first
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        sock.send(size.to_bytes(8, "little"))
        send, recv, first = sock.send, sock.recv, _Result(sock)
        if mode == "pre-shared":
            for slot in slots:
                slot[:] = requests.sources[0]
        for _ in range(window):  # the loop is there, and its copy
            send(_MESSAGE.pack(0, 0, 0, 0))
            first.result()

    def start() -> None:
        nonlocal turn
        block, value = requests.next()
        if mode == "fresh":
            np.copyto(slots[turn], block)
        send(_MESSAGE.pack(turn, pages, nbytes, value))
        turn = (turn + 1) % window

    def request() -> int:
        start()
        return int.from_bytes(recv(8), "little")

    def submit() -> _Result:
        start()
        return first

    if window == 1:
        made = one_by_one(request, requests.expected)
    else:
        made = windowed(submit, requests.expected, window)
    run = made.run

    def run_and_hang_up(n: int) -> Any:
        found = run(n)
        sock.close()
        return found

    def close() -> None:
        nonlocal bytes_
        slots.clear()
        del bytes_
        shared.close()

    made.run, made.before, made.close = run_and_hang_up, connect, close
    return made


class ByHand(Writing):
    """What an expert writes by hand."""

    name = "shm"
    says = "shared memory by hand"
    colour = "#7b3294"
    marker = "P"

    def start(self, runner: Runner) -> Parties:
        on = runner.on
        path = f"/tmp/dmrpc-figures-hand-{os.getpid()}.sock"
        if HAND_CLIENT not in on.peers:
            on.start(HAND_CLIENT, attached=False)
            self._segment = on.start(HAND_WRITER, attached=False).call(
                _serve_by_hand, HAND_WRITER, path
            )
        return Parties(
            HAND_CLIENT,
            (HAND_WRITER,),
            hand_block,
            {"path": path, "segment": self._segment},
            stop=lambda: on.peers[HAND_WRITER].call(_end_by_hand),
            over_rpc=False,
        )

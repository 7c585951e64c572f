"""One connection of the coordinator over a socket pair, with peers that are slow, silent or rude."""

import asyncio
import os
import socket
from typing import Any

import pytest

from dmrpc_cxl.coordinator.connection import Connection, TimeLimits
from dmrpc_cxl.coordinator.messages import (
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    VERSION,
    Hello,
    HelloReply,
    MsgType,
    Recall,
    Rejoin,
    Status,
)
from dmrpc_cxl.coordinator.protocol import PeerSide, Reply, Request
from dmrpc_cxl.errors import OutOfFrames

SECONDS = 30
SHORT = 0.05


class Peer:
    """The other end: an asyncio stream with the peer's half of the protocol."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.protocol = PeerSide()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> Any:
        while (message := self.protocol.next_message()) is None:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            if not data:
                return None
            self.protocol.feed(data)
        return message

    async def ask(self, kind: MsgType, body: Any = None) -> Any:
        await self.send(self.protocol.request(kind, body))
        return await self.receive()

    async def hello(self) -> None:
        assert (await self.ask(MsgType.HELLO, Hello(1, bytes(32)))).body == HelloReply(1)

    async def closed(self) -> bool:
        loop = asyncio.get_running_loop()
        try:
            while await loop.sock_recv(self.sock, 1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True


async def answer(connection: Connection, request: Request) -> Any:
    """Serve requests as the tests need them."""
    if request.type is MsgType.HELLO:
        return HelloReply(1)
    if request.type is MsgType.LOOKUP:
        raise OutOfFrames("none left")
    if request.type is MsgType.WITHDRAW:
        raise ZeroDivisionError("a bug")
    if request.type is MsgType.LIST:
        return {"long": "x" * request.body["length"]}
    if request.type is MsgType.WAIT:
        await connection.gone.wait()
    return None if request.type is MsgType.GUARD else {}


def run(scenario, limits: TimeLimits | None = None) -> Connection:
    """Run scenario(peer, connection) on the two ends of a connection, which is closed at the end."""

    async def main() -> Connection:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        closed: list[Connection] = []
        connection = Connection(ours, limits or TimeLimits(), answer, closed.append)
        with theirs:
            await asyncio.wait_for(scenario(Peer(theirs), connection), SECONDS)
        await asyncio.wait_for(connection.gone.wait(), SECONDS)
        await connection.finish()
        assert closed == [connection]
        assert ours.fileno() == -1
        return connection

    return asyncio.run(main())


def test_requests_are_answered_one_after_the_other():
    async def scenario(peer, connection):
        await peer.hello()
        for _ in range(3):
            assert (await peer.ask(MsgType.STATS, {})).body == {}

    run(scenario)


def test_a_refusal_and_a_bug_are_answered_and_the_connection_goes_on(caplog):
    async def scenario(peer, connection):
        await peer.hello()
        refused = await peer.ask(MsgType.LOOKUP, {})
        assert (refused.status, refused.text) == (Status.NO_FRAMES, "none left")
        broken = await peer.ask(MsgType.WITHDRAW, {})
        assert broken.status is Status.INTERNAL
        assert "a bug" not in broken.text
        assert (await peer.ask(MsgType.STATS, {})).status is Status.OK

    run(scenario)
    assert "a bug" in caplog.text


def test_an_answer_that_does_not_fit_into_a_message_is_refused():
    async def scenario(peer, connection):
        await peer.hello()
        reply = await peer.ask(MsgType.LIST, {"length": MAX_PAYLOAD})
        assert reply.status is Status.INTERNAL
        assert "do not fit" in reply.text

    run(scenario)


def test_a_long_answer_reaches_a_slow_reader_whole_and_the_next_request_is_served():
    async def scenario(peer, connection):
        await peer.hello()
        for _ in range(3):
            reply = await peer.ask(MsgType.LIST, {"length": 900_000})
            assert len(reply.body["long"]) == 900_000

    run(scenario)


def test_who_does_not_read_the_answer_is_cut_off():
    async def scenario(peer, connection):
        await peer.hello()
        await peer.send(peer.protocol.request(MsgType.LIST, {"length": 900_000}))
        await connection.gone.wait()

    run(scenario, TimeLimits(send=SHORT))


def test_who_sends_without_end_and_reads_nothing_is_cut_off():
    async def scenario(peer, connection):
        await peer.hello()
        await peer.send(peer.protocol.request(MsgType.LIST, {"length": 900_000}))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await flood(peer)

    async def flood(peer):
        while True:
            await peer.send(bytes(1 << 16))

    run(scenario)


def test_who_says_nothing_is_cut_off():
    async def scenario(peer, connection):
        assert await peer.closed()

    run(scenario, TimeLimits(hello=SHORT))


def test_who_does_not_complete_a_message_is_cut_off():
    async def scenario(peer, connection):
        await peer.hello()
        await peer.send(HEADER.pack(MAGIC, VERSION, MsgType.STATS, 0, 2, 1) + b"{")
        assert await peer.closed()

    run(scenario, TimeLimits(message=SHORT))


def test_who_has_introduced_himself_may_be_silent_and_slow_between_messages():
    async def scenario(peer, connection):
        await peer.hello()
        for byte in peer.protocol.request(MsgType.STATS, {}):
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await peer.receive()).status is Status.OK
        assert connection._timer is None  # no limit runs

    run(scenario)


def test_a_request_before_the_last_answer_ends_the_connection():
    async def scenario(peer, connection):
        await peer.hello()
        await peer.send(2 * peer.protocol.request(MsgType.WAIT, {}))
        assert await peer.closed()

    run(scenario)


def test_the_end_of_the_peer_is_noticed_while_its_request_is_served():
    async def scenario(peer, connection):
        await peer.hello()
        await peer.send(peer.protocol.request(MsgType.WAIT, {}))
        assert not connection.peer_closed()
        peer.sock.shutdown(socket.SHUT_RDWR)
        assert connection.peer_closed()
        await connection.gone.wait()
        assert connection.peer_closed()

    run(scenario)


def test_notices_go_to_guards_only_and_are_dropped_when_nobody_reads_them():
    async def scenario(peer, connection):
        await peer.hello()
        assert not connection.notify(MsgType.NOTIFY_RECALL, Recall(1))
        assert isinstance(await peer.ask(MsgType.GUARD, Rejoin(1, 1)), Reply)
        assert connection.notify(MsgType.NOTIFY_RECALL, Recall(7))
        assert (await peer.receive()).body == Recall(7)
        while connection.notify(MsgType.NOTIFY_RECALL, Recall(1)):
            pass
        connection.close()
        assert not connection.notify(MsgType.NOTIFY_RECALL, Recall(1))

    run(scenario)


def test_descriptors_that_nobody_takes_are_closed():
    async def scenario(peer, connection):
        await peer.hello()
        reader, writer = os.pipe()
        data = peer.protocol.request(MsgType.STATS, {})
        socket.send_fds(peer.sock, [data], [writer])
        os.close(writer)
        assert (await peer.receive()).status is Status.OK
        assert os.read(reader, 1) == b""  # the last writer is gone
        os.close(reader)

    run(scenario)


def test_more_descriptors_than_a_request_can_need_end_the_connection():
    async def scenario(peer, connection):
        await peer.hello()
        reader, writer = os.pipe()
        socket.send_fds(peer.sock, [peer.protocol.request(MsgType.STATS, {})], [writer] * 9)
        os.close(writer)
        assert await peer.closed()
        assert os.read(reader, 1) == b""
        os.close(reader)

    run(scenario)

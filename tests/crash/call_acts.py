"""Acts of those who call, who forward calls, and who are called. Each has the keeper as its peer.

The keeper serves a `Desk`, and a forwarder to it. It notices that its peer has died by an error or by an answer that came
before, and its own Refs come back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import RemoteError
from dmrpc_cxl.rpc import Forwarder
from tests.crash.acts import Act
from tests.crash.keeper import PAGE, PAGES, filled, moved, pattern
from tests.crash.stage import Stage
from tests.fabrics import At
from tests.standing import until

N = PAGES * PAGE  # bytes of an argument


class Desk:
    """What is served."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def total(self, values: np.ndarray) -> int:
        return int(values.sum())

    def swallow(self, values: np.ndarray) -> int:
        """Free what came, without regard to what this host has given away: the frames go home."""
        self._host._forget_given()
        return int(values.sum())

    def store(self, values: np.ndarray) -> int:
        """Store to the first page, which is copied."""
        values[:16] = 1
        return int(values[:16].sum())

    def make(self, n: int) -> np.ndarray:
        made = self._host.empty(n, "u1")
        made[:] = 1
        return made

    def echo(self, values: np.ndarray) -> np.ndarray:
        return values

    def weigh(self, ref: Ref) -> int:
        """Hold the Ref as long as the call takes."""
        return ref.nbytes

    def give(self, n: int) -> Ref:
        return self._host.create_ref(self._host.ralloc(n), move=True)

    def refuse(self, values: np.ndarray) -> None:
        raise KeyError("no")

    async def later(self, values: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0)
        return values


# ---------------------------------------------------------------- in the keeper


def open_desk(at: At) -> None:
    at.desk = at.host.serve(Desk(at.host), name="desk", threads=2, threshold=PAGE)
    at.front = Forwarder(at.host, "front", ["desk"])


def close_desk(at: At) -> None:
    """Stop serving, once all Refs of lost clients are back."""
    at.front.stop()
    until(lambda: not at.desk._busy())
    at.desk.stop(0)
    del at.front, at.desk


@contextlib.contextmanager
def desk_of_the_keeper(stage: Stage) -> Iterator[None]:
    stage.keeper.call(open_desk)
    yield
    stage.keeper.call(close_desk)


def call_everything(at: At, name: str, transport: str) -> bool:
    """Call with an array that stays, with one that is copied, get one, pass a Ref, get a Ref, fail."""
    array = filled(at, PAGES, 50).numpy()
    want = pattern(N, 50)
    try:
        with contextlib.closing(_client(at, name, transport)) as desk:
            assert desk.total(array) == int(want.sum())
            assert desk.swallow(np.full(N, 2, "u1")) == 2 * N
            assert desk.store(array) == 16
            assert desk.make(N).sum() == N
            assert (desk.echo(np.full(N, 3, "u1")) == 3).all()
            assert desk.weigh(moved(at, filled(at, 2, 51))) == 2 * PAGE
            desk.give(N).drop()
            assert (desk.later(np.full(N, 4, "u1")) == 4).all()
            with contextlib.suppress(RemoteError):
                desk.refuse(array)
    finally:  # the traceback, if there is one, has the array: it goes with it
        assert (array == want).all()
    return True


def _client(at: At, name: str, transport: str = "auto") -> Any:
    # Who has lost a service is told at once, and not after it has been looked for.
    return at.host.connect(name, Desk, transport=transport, threshold=PAGE, connect_timeout=0.1)


def call_the_victim(at: At) -> bool:
    return call_everything(at, "victim", "ring")


def call_the_victim_over_tcp(at: At) -> bool:
    return call_everything(at, "victim", "tcp")


def get_what_nobody_takes(at: At) -> bool:
    """Leave a reply unread that a forwarder has delivered: it says so to the victim, and what comes next is read after it."""
    with Forwarder(at.host, "front", ["victim"], connect_timeout=0.1) as front:
        desk = _client(at, "front")
        try:
            desk.make(N)  # makes the connection, and shows how many bytes a call and its reply are
            before = front.bytes_forwarded
            desk.make(N)
            each = front.bytes_forwarded - before
            unread = desk.future.make(N)  # noqa: F841 - to ask whether it is done would read it
            until(
                lambda: front.bytes_forwarded >= before + 2 * each or not at.host.services("victim")
            )
        finally:
            desk.close()
        with contextlib.closing(_client(at, "front")) as desk:
            desk.make(1)
    return True


# ---------------------------------------------------------------- in the victim


def call_over_rings(at: At) -> None:
    call_everything(at, "desk", "ring")


def call_over_tcp(at: At) -> None:
    call_everything(at, "desk", "tcp")


def call_the_forwarder(at: At) -> None:
    call_everything(at, "front", "ring")


def call_with_asyncio(at: At) -> None:
    async def calls() -> None:
        desk = client.aio
        assert await desk.total(mine.numpy()) == int(mine.numpy().sum())
        assert await desk.swallow(np.full(N, 2, "u1")) == 2 * N
        assert (await desk.make(N)).sum() == N
        assert (await desk.echo(np.full(N, 3, "u1")) == 3).all()
        await desk.close()

    mine = filled(at, PAGES, 53)
    with contextlib.closing(_client(at, "desk")) as client:
        asyncio.run(calls())


def serve_desk(at: At) -> None:
    at.desk = at.host.serve(Desk(at.host), name="victim", threads=2, threshold=PAGE)


def forward(at: At) -> None:
    at.front = Forwarder(at.host, "victim", ["desk"])


# ---------------------------------------------------------------- acts

_TO_THE_KEEPER = {"occasion": desk_of_the_keeper}

ACTS = [
    Act("caller", "calls over rings", call_over_rings, **_TO_THE_KEEPER),
    Act("caller", "calls over TCP", call_over_tcp, **_TO_THE_KEEPER),
    Act("caller", "calls a forwarder", call_the_forwarder, **_TO_THE_KEEPER),
    Act("caller", "calls with asyncio", call_with_asyncio, **_TO_THE_KEEPER),
    Act("forwarder", "forwards", prepare=forward, trigger=call_the_victim, last=("relay_ended",), **_TO_THE_KEEPER),
    Act("forwarder", "forwards over TCP", prepare=forward, trigger=call_the_victim_over_tcp, last=("relay_ended",),
        **_TO_THE_KEEPER),
    Act("callee", "is called", prepare=serve_desk, trigger=call_the_victim, last=("refs_taken_back",)),
    Act("callee", "is called over TCP", prepare=serve_desk, trigger=call_the_victim_over_tcp, last=("refs_taken_back",)),
    Act("callee", "replies in vain", prepare=serve_desk, trigger=get_what_nobody_takes, last=("reply_discarded", "refs_taken_back")),
]  # fmt: skip

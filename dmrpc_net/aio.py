"""The calls of a client for asyncio: ``await client.aio.rread(address, buffer)``.

They go over the same connections as the others, so they are ordered with them and mean the same addresses. The event loop
reads when nobody else does; when a thread that waits reads, it rings a bell for answers that are ours.

The loop watches a duplicate of each socket: the socket itself may be closed and replaced by a thread at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dmrpc_cxl.errors import DeadlineExceeded, DmError, MisuseError

from ._native import OUTCOME_BROKEN, Call, Deferred, Link, NotOpen

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Aio"]


@dataclass
class _Lane:
    """A link, as the event loop sees it."""

    link: Link
    bell: int
    watched: int = -1  # our duplicate of its socket
    generation: int = -1  # of the socket that it duplicates
    writing: bool = False
    mending: asyncio.Task[None] | None = None
    waiting: dict[Call[Any], asyncio.Future[Any]] = field(default_factory=dict)  # in order


class _Awaitable:
    """A call that is sent when it is awaited, or with :meth:`start`."""

    def __init__(self, aio: Aio, call: Call[Any]) -> None:
        self._aio, self._call = aio, call

    def __await__(self) -> Generator[Any, None, Any]:
        return self._aio.launch(self._call).__await__()

    def start(self) -> asyncio.Future[Any]:
        """Send it now; return what to await."""
        return self._aio.launch(self._call)


class _Known:
    """A result that needs no call."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, None, Any]:
        return self.start().__await__()

    def start(self) -> asyncio.Future[Any]:
        """Return what to await."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(self._value)
        return future


class _Opening:
    """A call to a shard that there is no connection to yet: a thread opens one, and then the call is made.

    Calls to that shard that are made meanwhile wait behind it, so all are sent in the order in which they were made.
    """

    def __init__(self, aio: Aio, make: Callable[[dict[str, Any]], Any], why: NotOpen) -> None:
        self._aio, self._make = aio, make
        self._place, self._deadline_ns = why.args
        self._waiting = False

    def _wait_at(self, place: tuple[int, int]) -> None:
        queued = self._aio.queued
        queued[place] = queued.get(place, 0) + 1
        self._place, self._waiting = place, True

    def _leave(self) -> None:
        queued, place = self._aio.queued, self._place
        if self._waiting:
            self._waiting = False
            queued[place] -= 1
            if not queued[place]:
                del queued[place]

    def __await__(self) -> Generator[Any, None, Any]:
        return self.start().__await__()

    def start(self) -> asyncio.Future[Any]:
        """See to it that it is sent; return what to await."""
        self._wait_at(self._place)
        task = self._aio.loop.create_task(self._go())
        task.add_done_callback(lambda _: self._leave())  # it may be cancelled before it begins
        return task

    async def _go(self) -> Any:
        failed: dict[tuple[int, int], BaseException | None] = {}
        while True:
            failed[self._place] = error = await self._aio.open(self._place, self._deadline_ns)
            left = self._deadline_ns / 1e9 - time.monotonic()
            if isinstance(error, DeadlineExceeded) and left > 0:
                continue  # it was another call's deadline
            self._aio.failed = failed
            try:
                sent: asyncio.Future[Any] = self._make({"timeout": max(left, 0.0)}).start()
            except NotOpen as why:
                self._leave()
                self._wait_at(why.args[0])
                continue
            finally:
                self._aio.failed = None
            self._leave()  # those behind it may be sent
            return await sent


_CALLS = (
    "ralloc", "rfree", "rread", "read", "rwrite", "create_ref", "map_ref", "accept_ref", "clone_ref", "drop_ref", "ref_is_held",
    "put", "get", "ping", "shard_stats", "shard_audit",
)  # fmt: skip


def _never_waiting(name: str) -> Callable[..., Any]:
    """Return a method like that of Deferred which returns an awaitable also when there is no connection yet."""
    plain = getattr(Deferred, name)

    @functools.wraps(plain)
    def call(self: Aio, *arguments: Any, **keywords: Any) -> Any:
        try:
            return plain(self, *arguments, **keywords)
        except NotOpen as why:
            return _Opening(self, lambda more: plain(self, *arguments, **{**keywords, **more}), why)

    return call


class Aio(Deferred):
    """A client's calls as awaitables, in one event loop. None of them waits before it is awaited."""

    def __init__(self, client: Client) -> None:
        """Tie them to the event loop that runs."""
        super().__init__(client, self._prepared)
        self._loop = self.loop = asyncio.get_running_loop()
        self._lanes: dict[Link, _Lane] = {}
        self._openings: dict[tuple[int, int], asyncio.Task[BaseException | None]] = {}

    def _prepared(self, call: Call[Any]) -> _Awaitable:
        return _Awaitable(self, call)

    def known(self, value: object) -> _Known:
        """Return a value in the way in which results are returned."""
        return _Known(value)

    # ---------------------------------------------------------------- calls

    async def open(self, place: tuple[int, int], deadline_ns: int) -> BaseException | None:
        """Have a thread connect to a shard; return what went wrong. None: nothing, or there is no such shard."""
        task = self._openings.get(place)
        if task is None or task.done():
            task = self._openings[place] = self._loop.create_task(self._open(place, deadline_ns))
        return await asyncio.shield(task)

    async def _open(self, place: tuple[int, int], deadline_ns: int) -> BaseException | None:
        try:
            await self._loop.run_in_executor(None, self.client.open_link, *place, deadline_ns)
        except (DmError, OSError) as error:
            return error
        return None

    def launch(self, call: Call[Any]) -> asyncio.Future[Any]:
        """Send a call; return a future of its result."""
        if asyncio.get_running_loop() is not self._loop:
            raise MisuseError(
                "aio belongs to the event loop that was running when it was first used"
            )
        lane = self._lane_of(call.lane)
        future: asyncio.Future[Any] = self._loop.create_future()
        lane.waiting[call] = future
        try:
            status = call.begin()
        except BaseException:
            del lane.waiting[call]
            raise
        left = call.deadline_ns / 1e9 - time.monotonic()
        timer = self._loop.call_later(max(left, 0), self._too_late, lane, call)
        future.add_done_callback(lambda _: self._forget(lane, call, timer))
        if status or lane.generation != lane.link.generation:
            self._go_on(lane)
        return future

    def _forget(self, lane: _Lane, call: Call[Any], timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        if lane.waiting.pop(call, None) is not None:
            call.give_up()  # cancelled by whoever waited

    def _too_late(self, lane: _Lane, call: Call[Any]) -> None:
        self._hand_out(lane)
        future = lane.waiting.get(call)
        if future is not None and not future.done():
            del lane.waiting[call]
            try:
                future.set_result(call.result(0))  # it may have come at the last moment
            except BaseException as error:
                future.set_exception(error)

    # ---------------------------------------------------------------- answers

    def _lane_of(self, link: Link) -> _Lane:
        lane = self._lanes.get(link)
        if lane is None:
            lane = self._lanes[link] = _Lane(link, link.open_bell())
            self._loop.add_reader(lane.bell, self._rung, lane)
        return lane

    def _watch(self, lane: _Lane) -> None:
        """Watch the socket that the link has now."""
        if lane.link.generation == lane.generation:
            return
        self._unwatch(lane)
        lane.watched, lane.generation = lane.link.duplicate()
        if lane.watched < 0:
            raise OSError("no descriptor to watch a memory server's answers with")
        self._loop.add_reader(lane.watched, self._go_on, lane)

    def _unwatch(self, lane: _Lane) -> None:
        if lane.watched >= 0:
            self._loop.remove_reader(lane.watched)
            self._loop.remove_writer(lane.watched)
            os.close(lane.watched)
        lane.watched = lane.generation = -1
        lane.writing = False

    def _rung(self, lane: _Lane) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(lane.bell, 8)
        self._go_on(lane)

    def _go_on(self, lane: _Lane) -> None:
        """Send and receive what can be, and hand results out."""
        status = lane.link.pump()
        self._hand_out(lane)
        if status == OUTCOME_BROKEN:
            self._unwatch(lane)
            if lane.mending is None and lane.waiting:
                lane.mending = self._loop.create_task(self._mend(lane))
            return
        if status < 0:
            self._unwatch(lane)
            self._lanes.pop(lane.link, None)
            self._loop.remove_reader(lane.bell)
            return
        self._watch(lane)
        if bool(status) != lane.writing and lane.watched >= 0:
            lane.writing = bool(status)
            if lane.writing:
                self._loop.add_writer(lane.watched, self._go_on, lane)
            else:
                self._loop.remove_writer(lane.watched)

    def _hand_out(self, lane: _Lane) -> None:
        while lane.waiting:
            call, future = next(iter(lane.waiting.items()))
            if not call.done():
                break
            del lane.waiting[call]
            if future.done():  # cancelled, and not yet forgotten
                call.give_up()
                continue
            try:
                future.set_result(call.result(0))
            except Exception as error:
                future.set_exception(error)

    async def _mend(self, lane: _Lane) -> None:
        """Have a thread open the connection again, until the last of those that wait gives up."""
        try:
            while lane.waiting and not lane.link.healthy:
                until = max(call.deadline_ns for call in lane.waiting)
                try:
                    await self._loop.run_in_executor(None, lane.link.reopen, lane.link, until)
                except DeadlineExceeded:
                    break  # each is told by its own timer
                self._hand_out(lane)
        finally:
            lane.mending = None
        if lane.link.healthy:
            self._go_on(lane)

    @property
    def usable(self) -> bool:
        """Whether its event loop still is."""
        return not self._loop.is_closed()

    def close(self) -> None:
        """Let go of the event loop; calls under way have been ended already. From any thread."""
        if self._loop.is_closed():
            for lane in self._lanes.values():
                if lane.watched >= 0:
                    os.close(lane.watched)
            self._lanes.clear()
            return
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._let_go()
        else:
            self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        for lane in list(self._lanes.values()):
            self._unwatch(lane)
            self._loop.remove_reader(lane.bell)
            self._hand_out(lane)
        self._lanes.clear()


for _name in _CALLS:
    setattr(Aio, _name, _never_waiting(_name))

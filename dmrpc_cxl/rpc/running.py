"""Running calls: arguments read, a method called, its result or its failure answered.

A method's result is referred to by one box alone, so that arrays in it may change hands rather than be shared.
``async def`` methods run as tasks on a loop, the server's own unless it was given one.

Refs. Those of a call stay the caller's until its arguments are read. Those of a reply are remembered until somebody has
accepted them, and dropped when the connection ends or the reply is discarded.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from .._native import crash_point
from ..errors import (
    AccessDenied,
    BadRef,
    CallCancelled,
    CannotSend,
    DeadlineExceeded,
    DmError,
    LocalProtocolError,
    RefConsumed,
    RemoteProtocolError,
    WrongArguments,
)
from . import frames
from .attended import Attended
from .calls import Call, _current
from .endpoint import error_frame
from .frames import PICKLED, REPLY, TRANSFER_MASK, Code, Frame, Kind, Welcome
from .interface import MISSING, Bound
from .marshal import TRANSFER_OF, Marshaller, Serializer
from .places import reach_of

__all__ = ["Interceptor", "Runner"]

Interceptor: TypeAlias = Callable[[Call, Callable[[], Any]], Any]

NO_ARGUMENTS = b"\x90"  # an empty list
_astuple = msgspec.structs.astuple
_head = frames.head


class Runner:
    """Runs the calls of one service.

    Args:
        name: of the service, for messages.
        methods: of the service, by number.
        welcome: what clients were told of it.
        marshaller: writes its results; its host reads the arguments.
        interceptors: called around each method, the first one outermost.
        pickle: take pickled arguments.
        tracebacks: tell callers the text of tracebacks.
        loop: where ``async def`` methods run; None: on one of its own.
        counts: where failures are counted.
        settled: told of each call that was answered.
    """

    def __init__(
        self,
        name: str,
        methods: list[Bound],
        welcome: Welcome,
        marshaller: Marshaller,
        *,
        interceptors: Sequence[Interceptor],
        pickle: bool,
        tracebacks: bool,
        loop: asyncio.AbstractEventLoop | None,
        counts: collections.Counter[str],
        settled: Callable[[Attended, int], None],
    ) -> None:
        self._name = name
        self._methods = methods
        self._welcome = welcome
        self._max_plain = welcome.max_frame - frames.HEADER_BYTES
        self._marshaller = marshaller
        self._host = marshaller.host
        self._interceptors = tuple(interceptors)
        self._pickle = pickle
        self._tracebacks = tracebacks
        self._counts = counts
        self._settled = settled
        self._lock = threading.Lock()  # over the loop
        self._given_loop = loop
        self._loop = loop
        self._loop_thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # a loop holds its tasks only weakly

    def run(self, connection: Attended, frame: Frame, call: Call, waited: bool = False) -> None:
        """Run a call and answer it. Never raises."""
        bound = self._methods[frame.method]
        call_id = frame.call_id
        token = _current.set(call)
        phase = Code.BAD_ARGUMENTS
        try:
            if waited or call.cancelled:
                call.check()
            if bound.takes_none and frame.body == NO_ARGUMENTS:
                box: list[Any] = [()]
            else:
                box = [self._arguments(bound, frame)]
            phase = Code.REMOTE
            if bound.is_async:
                self._start_async(connection, frame, call, bound, box)
                return
            if self._interceptors:
                self._invoke(call, bound.function, box)
            else:
                # Whatever it returns is referred to by the box alone: see may_move.
                box.append(bound.function(*box.pop()))
            if call.cancelled:  # Refs in the reply would lie there until the client reads again
                call.check()
            if frame.nr_refs:
                crash_point("method_returned")
            phase = Code.BAD_RESULT
            self._reply(connection, call_id, frame.flags, box)
        except BaseException as error:  # whatever a method raises is the caller's
            self.failed(connection, call_id, error, phase)
        finally:
            _current.reset(token)
        self._settled(connection, call_id)

    def _invoke(self, call: Call, function: Callable[..., Any], box: list[Any]) -> None:
        """Put the result of a function where its arguments were; whatever it returns is referred to by the box alone."""
        if not self._interceptors:
            box.append(function(*box.pop()))
            return

        arguments = box.pop()

        def proceed() -> Any:
            return function(*arguments)

        for interceptor in reversed(self._interceptors):
            proceed = _Step(interceptor, call, proceed)
        box.append(proceed())

    def _arguments(self, bound: Bound, frame: Frame) -> Sequence[Any]:
        if frame.flags & PICKLED:
            if not self._pickle:
                raise AccessDenied(
                    f"{self._name} takes no pickled arguments: serve(..., pickle=True) would"
                )
            arguments = bound.reader.read(self._host, frame)
            if (
                not isinstance(arguments, (tuple, list))
                or not bound.nr_required <= len(arguments) <= bound.nr_max
            ):
                raise WrongArguments(
                    f"{bound.name} takes {bound.nr_required} to {bound.nr_max} arguments"
                )
            return arguments
        try:
            values = _astuple(bound.reader.read(self._host, frame))
        except msgspec.ValidationError as error:
            raise WrongArguments(
                f"{bound.name}: {_named(str(error), bound, self._welcome)}"
            ) from None
        while values and values[-1] is MISSING:
            values = values[:-1]
        return values

    def _reply(self, connection: Attended, call_id: int, flags: int, box: list[Any]) -> None:
        """Send box[0]; afterwards the box is empty."""
        if not flags & PICKLED:
            body = self._marshaller.plain(box, TRANSFER_OF[flags & TRANSFER_MASK])
            if body is not None and len(body) < self._max_plain:
                connection.send(_head(REPLY, call_id, 0, b"", b"", body))
                return
        serializer: Serializer = "pickle" if flags & PICKLED else "msgpack"
        try:
            encoded = self._marshaller.write(
                box,
                TRANSFER_OF[flags & TRANSFER_MASK],
                serializer,
                may_move=True,
                reach=reach_of(flags),
            )
        finally:
            box.clear()
        refs = bytes(encoded.refs)
        if refs:
            crash_point("reply_written")
        try:
            head = frames.head(
                Kind.REPLY,
                call_id,
                flags=encoded.flags,
                refs=refs,
                body=encoded.body,
                inline_bytes=encoded.inline_bytes,
            )
            nbytes = len(head) + encoded.inline_bytes
            if nbytes > self._welcome.max_frame:
                raise LocalProtocolError(
                    f"a result of {nbytes} bytes in a message; {self._name} sends at most {self._welcome.max_frame}: "
                    "return large data by Ref"
                )
            if refs:
                connection.remember(call_id, refs)
                crash_point("reply_remembered")
            connection.send((head, *encoded.inline))
            if refs:
                crash_point("reply_sent")
        except BaseException:
            if refs:
                self._host.drop_refs(refs)
            raise
        if refs and connection.closed:  # it may have been closed before they were remembered
            self._host.drop_refs(refs)

    def failed(self, connection: Attended, call_id: int, error: BaseException, phase: Code) -> None:
        """Tell the caller why its call failed. Never raises."""
        code = self._diagnosis(error, phase)
        self._counts["failed"] += 1
        try:
            text = ""
            if code == Code.REMOTE and self._tracebacks:
                text = _plain("".join(traceback.format_exception(error)))
            told = error_frame(call_id, code, error, text)
        except Exception as odd:  # its __str__ raises, or gives what is no text
            told = error_frame(call_id, code, _stand_in(error, odd))
        with contextlib.suppress(DmError, ValueError, OSError):
            connection.send(told)

    @staticmethod
    def _diagnosis(error: BaseException, phase: Code) -> Code:
        if isinstance(error, (CallCancelled, asyncio.CancelledError)):
            return Code.CANCELLED
        if isinstance(error, DeadlineExceeded):
            return Code.DEADLINE
        if phase == Code.BAD_ARGUMENTS:
            if isinstance(error, AccessDenied):
                return Code.NOT_ALLOWED
            if isinstance(error, (RefConsumed, BadRef)):
                return Code.BAD_REF
            return (
                phase if isinstance(error, (WrongArguments, RemoteProtocolError)) else Code.REMOTE
            )
        if phase == Code.BAD_RESULT and isinstance(error, (CannotSend, LocalProtocolError)):
            return phase
        return Code.REMOTE

    # ------------------------------------------------------------ async methods

    def _start_async(
        self, connection: Attended, frame: Frame, call: Call, bound: Bound, box: list[Any]
    ) -> None:
        loop = self._running_loop()
        call_id, flags = frame.call_id, frame.flags

        async def run() -> None:
            token = _current.set(call)
            me = asyncio.current_task()
            assert me is not None
            forget = call.when_cancelled(lambda: loop.call_soon_threadsafe(me.cancel))
            phase = Code.REMOTE
            try:
                call.about_to_block = None
                self._invoke(call, bound.function, box)
                if inspect.isawaitable(box[0]):  # an interceptor may have answered itself
                    box.append(await box.pop())
                if call.cancelled:
                    call.check()
                if frame.nr_refs:
                    crash_point("method_returned")
                phase = Code.BAD_RESULT
                self._reply(connection, call_id, flags, box)
            except BaseException as error:
                self.failed(connection, call_id, error, phase)
            finally:
                forget()
                _current.reset(token)
                self._settled(connection, call_id)

        def begin() -> None:
            task = loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        loop.call_soon_threadsafe(begin)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop_thread = threading.Thread(
                    target=_run_loop, args=(self._loop,), name=f"{self._name}-loop", daemon=True
                )
                self._loop_thread.start()
            return self._loop

    def stop(self, give_up: Callable[[], float]) -> None:
        """End the loop, if it is the runner's own; give_up() says how many seconds there are left for it."""
        if self._loop is None or self._given_loop is not None:
            return
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        thread = self._loop_thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.1, give_up()))


class _Step:
    """An interceptor and what comes behind it."""

    __slots__ = ("call", "interceptor", "proceed")

    def __init__(self, interceptor: Interceptor, call: Call, proceed: Callable[[], Any]) -> None:
        self.interceptor = interceptor
        self.call = call
        self.proceed = proceed

    def __call__(self) -> Any:
        return self.interceptor(self.call, self.proceed)


def _named(text: str, bound: Bound, welcome: Welcome) -> str:
    """Say parameter names where msgspec counts."""
    method = next(method for method in welcome.methods if method.name == bound.name)
    for i in reversed(range(len(method.parameters))):
        text = text.replace(f"$[{i}]", method.parameters[i])
    return text


def _plain(text: str) -> str:
    """Return a text that UTF-8 can hold: file names may bring lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _stand_in(error: BaseException, odd: Exception) -> Exception:
    """Return something that can be told instead of an exception that cannot."""
    kind = type(error)
    try:
        text = _plain(str(error))
    except Exception:
        text = f"a text that cannot be made: {type(odd).__name__}"
    return RuntimeError(_plain(f"{kind.__module__}.{kind.__qualname__}: {text}"))


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then end what is left on it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            loop.run_until_complete(asyncio.wait_for(_all(tasks), 1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)

"""Host processes that stand for many tests, and the acts that most tests are made of.

A fabric of each kind is started when a test first asks for it, and stands until the run ends: so
tests meet free lists and page
tables that others have used before. After every test all hosts let go of what they kept, and the
device is audited: nothing
in use, no Ref alive, no violation. A test may kill hosts; the next one gets new ones.

    def test_something(crew: Crew) -> None:
        creator, mapper = crew[:2]
        creator.ralloc("page", crew.page_size)
        wire = creator.create_ref("page")
        mapper.map_ref("mine", wire)
        assert crew.counts(mapper.frames("mine")) == [2]

    @in_host
    def test_something_in_one_host(at: At) -> None:     # the body runs in a host process
        assert len(at.host.ralloc(5)) == 5
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from dmrpc_cxl.fabric import device
from tests.fabrics import WATCHDOG_SECONDS, At, Fabric, HostProcess
from tests.standing import end, forget

MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """What the fabric and the hosts of a crew are like; options are attach()'s."""

    page_size: int = 4096
    coordinator: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    size: int = 32 * MIB

    @classmethod
    def of(cls, name: str) -> Kind:
        return KINDS[name]


SCARCE = ("--batch", "1", "--batch-max", "1", "--low", "0", "--recall-timeout", "0.2",
          "--log-level", "warning")  # fmt: skip
# copy_around=1: a fault serves the one page that was stored to, so that every count is known.
_ONE_PAGE = (("copy_around", 1),)
KINDS = {
    "4K": Kind(options=_ONE_PAGE),
    "16K": Kind(16384, options=_ONE_PAGE),
    "64K": Kind(65536, ("--batch", "32", "--low", "8", "--high", "64"), _ONE_PAGE, 64 * MIB),
    "old-kernel": Kind(options=(*_ONE_PAGE, ("reads_allocate", True))),
    # 256 frames, handed out one by one; a host that is asked for free frames keeps none.
    "scarce": Kind(coordinator=SCARCE, options=_ONE_PAGE, size=MIB),
    "tcp": Kind(4096, ("--tcp", "127.0.0.1:0"), (*_ONE_PAGE, ("transport", "tcp"))),
}


# ---------------------------------------------------------------- acts, run in the host processes


def _act(at: At, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function, and say of a failed assertion what pytest says in its own process only."""
    try:
        return function(at, *args, **kwargs)
    except pytest.fail.Exception as error:  # of pytest.raises; cannot be sent as it is
        raise AssertionError(str(error)) from error
    except AssertionError as error:
        if error.args:
            raise
        last, line = [*traceback.walk_tb(error.__traceback__)][-1]
        seen = {key: repr(value)[:200] for key, value in last.f_locals.items()}
        text = traceback.extract_tb(error.__traceback__)[-1].line
        del last
        raise AssertionError(f"line {line}: {text}\n    where {seen}") from None


def _rest(at: At) -> int:
    """Let go of everything, and wind the watchdog down: hosts may wait for their next test for long."""
    forget(at)
    faulthandler.cancel_dump_traceback_later()
    return at.host.stats()["mappings"]


def _wake(at: At) -> None:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)


def _ralloc(at: At, name: str, size: int, how: dict[str, Any]) -> None:
    setattr(at, name, at.host.ralloc(size, **how))


def _write(at: At, name: str, data: bytes, offset: int) -> None:
    memoryview(getattr(at, name))[offset : offset + len(data)] = data


def _read(at: At, name: str, length: int | None, offset: int) -> bytes:
    stop = None if length is None else offset + length
    return bytes(memoryview(getattr(at, name))[offset:stop])


def _rfree(at: At, name: str) -> None:
    at.host.rfree(getattr(at, name))
    delattr(at, name)


def _create_ref(at: At, name: str, offset: int, size: int | None, move: bool) -> bytes:
    buffer = getattr(at, name)
    if offset or size is not None:
        size = len(buffer) - offset if size is None else size
        return at.host.create_ref(buffer.address + offset, size).to_bytes()
    return at.host.create_ref(buffer, move=move).to_bytes()


def _map_ref(at: At, name: str, wire: bytes, how: dict[str, Any]) -> None:
    setattr(at, name, at.host.map_ref(wire, **how))


def _view_ref(at: At, name: str, wire: bytes) -> None:
    setattr(at, name, at.host.view_ref(wire))


def _accept(at: At, wire: bytes) -> bytes:
    return Ref.from_bytes(wire, at.host).accept().to_bytes()


def _clone(at: At, wire: bytes) -> tuple[bytes, bytes]:
    ref = Ref.from_bytes(wire, at.host)
    copy = ref.clone()
    return ref.to_bytes(), copy.to_bytes()


def _drop(at: At, wire: bytes) -> bool:
    return Ref.from_bytes(wire, at.host).drop()


def _stats(at: At) -> dict[str, int]:
    return at.host.stats()


def frames_shown(at: At, name: str) -> list[int | None]:
    """Return the frame that the kernel shows at each page of a buffer, None for a hole.

    What /proc/self/maps says, not what the DM layer believes.
    """
    buffer, page_size = getattr(at, name), at.host.page_size
    path = f"/dev/shm/{at.host.fabric}"
    with device.open(at.host.fabric, writable=False) as opened:
        data_off = opened.superblock["data_off"]
    areas: list[tuple[int, int, int | None]] = []
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            of_device = len(fields) > 5 and fields[5].strip() == path
            areas.append((start, stop, int(fields[2], 16) - data_off if of_device else None))
    shown: list[int | None] = []
    first = buffer.address // page_size * page_size
    for at_page in range(first, buffer.address + len(buffer), page_size):
        start, _, offset = next(area for area in areas if area[0] <= at_page < area[1])
        shown.append(None if offset is None else (offset + at_page - start) // page_size)
    return shown


def frame_words(fabric: str, frames: Iterable[int | None]) -> list[tuple[int, int, int]]:
    """Return (refcount, owner, sequence) of each frame, read from the device; holes are left out."""
    with device.open(fabric, writable=False) as opened:
        return [opened.frame(frame) for frame in frames if frame is not None]


# ---------------------------------------------------------------- hosts


class Member:
    """A host process, with an act for each call of the paper's Table II."""

    def __init__(self, process: HostProcess) -> None:
        self.process = process
        self.id = process.id
        self.pid = process.pid
        self.pending = False

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Begin a call; result() waits for it."""
        self.pending = True
        self.process.start(_act, function, args, kwargs)

    def result(self) -> Any:
        """Return what the call that was begun returned, or raise what it raised."""
        try:
            value = self.process.result()
        finally:
            self.pending = False
        return value

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run function(at, *args, **kwargs) in the host process."""
        self.start(function, *args, **kwargs)
        return self.result()

    def ralloc(self, name: str, size: int, **how: Any) -> None:
        """Allocate, and keep the buffer under a name."""
        self.call(_ralloc, name, size, how)

    def write(self, name: str, data: bytes, offset: int = 0) -> None:
        """Store bytes into a buffer."""
        self.call(_write, name, data, offset)

    def read(self, name: str, length: int | None = None, offset: int = 0) -> bytes:
        """Load bytes from a buffer, by default all."""
        return bytes(self.call(_read, name, length, offset))

    def frames(self, name: str) -> list[Any]:
        """Return the frame that each page of a buffer shows, None for a hole."""
        return list(self.call(frames_shown, name))

    def rfree(self, name: str) -> None:
        """Free a buffer."""
        self.call(_rfree, name)

    def create_ref(
        self, name: str, offset: int = 0, size: int | None = None, *, move: bool = False
    ) -> bytes:
        """Share a buffer or a part of it; return the bytes of the Ref."""
        return bytes(self.call(_create_ref, name, offset, size, move))

    def map_ref(self, name: str, wire: bytes, **how: Any) -> None:
        """Map a Ref, and keep the buffer under a name."""
        self.call(_map_ref, name, wire, how)

    def view_ref(self, name: str, wire: bytes) -> None:
        """View a Ref, and keep the buffer under a name."""
        self.call(_view_ref, name, wire)

    def accept(self, wire: bytes) -> bytes:
        """Become the holder; return the bytes that the Ref has now."""
        return bytes(self.call(_accept, wire))

    def clone(self, wire: bytes) -> tuple[bytes, bytes]:
        """Accept and clone; return the bytes of both."""
        ref, copy = self.call(_clone, wire)
        return ref, copy

    def drop(self, wire: bytes) -> bool:
        """Drop a Ref; return whether that released it."""
        return bool(self.call(_drop, wire))

    def stats(self) -> dict[str, int]:
        """Return the host's counters and gauges."""
        return dict(self.call(_stats))

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Give a dict that, when the block ends, holds what was added to each counter."""
        added: dict[str, int] = {}
        before = self.stats()
        yield added
        for name, value in self.stats().items():
            added[name] = value - before[name]

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. The coordinator may still be reclaiming."""
        self.process.kill()

    @property
    def alive(self) -> bool:
        return not self.process.left and self.process.process.is_alive()


class Crew:
    """A fabric and its hosts, numbered from 0; each is started when it is first asked for."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.page_size = kind.page_size
        self.fabric = Fabric(
            size=kind.size,
            page_size=kind.page_size,
            coordinator=(*kind.coordinator, "--log-level", "warning"),
        )
        self.members: list[Member] = []

    @overload
    def __getitem__(self, which: int) -> Member: ...
    @overload
    def __getitem__(self, which: slice) -> list[Member]: ...
    def __getitem__(self, which: int | slice) -> Member | list[Member]:
        last = which if isinstance(which, int) else which.stop - 1
        for number in range(last + 1):
            if number == len(self.members):
                self.members.append(self._new_member())
            elif not self.members[number].alive:
                self.members[number] = self._new_member()
        return self.members[which]

    def _new_member(self) -> Member:
        return Member(self.fabric.host(**dict(self.kind.options)))

    # ------------------------------------------------------------ the device

    def counts(self, frames: Iterable[int | None]) -> list[int]:
        """Return the refcount of each frame, read from the device."""
        return [word[0] for word in frame_words(self.fabric.name, frames)]

    def refs(self) -> list[dict[str, Any]]:
        """Return the Ref entries that are not free."""
        with device.open(self.fabric.name, writable=False) as opened:
            return list(opened.refs())

    def sound(self, **expected: int) -> dict[str, Any]:
        """Assert that the device adds up, and that the audit says what is expected; return it."""
        audit = self.fabric.assert_sound()
        assert {name: audit[name] for name in expected} == expected
        return audit

    def wait_until_reclaimed(self, *members: Member) -> None:
        """Wait until the coordinator has taken back what dead hosts held."""
        gone = {member.pid for member in members}
        self.fabric.wait_until(
            lambda _: not any(host["pid"] in gone for host in self.fabric.host_states())
        )

    # ------------------------------------------------------------ from test to test

    def wake(self) -> None:
        """Begin a test."""
        for member in self.members:
            if member.alive:
                member.call(_wake)

    def rest(self) -> None:
        """End a test: nothing may be left."""
        dead = [member for member in self.members if not member.alive]
        living = [member for member in self.members if member.alive]
        assert not any(member.pending for member in living), "a call was begun and not waited for"
        mappings = {member.id: member.call(_rest) for member in living}
        self.wait_until_reclaimed(*dead)
        assert not any(mappings.values()), f"buffers left behind, by host: {mappings}"
        self.sound(in_use=0, hole_pages=0, live_refs=0, in_flight=0)

    def close(self) -> None:
        """Let every host leave, and audit the device for the last time."""
        self.wake()
        self.fabric.close()


@dataclass
class Crews:
    """Every crew of a run."""

    standing: dict[str, Crew] = field(default_factory=dict)

    @contextlib.contextmanager
    def use(self, name: str, failed: Callable[[], bool]) -> Iterator[Crew]:
        """Give a crew to a test. After a failure it is thrown away: who knows what its hosts are doing."""
        if name not in self.standing:
            self.standing[name] = Crew(Kind.of(name))
        crew = self.standing[name]
        crew.wake()
        yield crew
        try:
            if not failed():
                crew.rest()
                return
        except BaseException:
            self._discard(name)
            raise
        self._discard(name)

    def _discard(self, name: str) -> None:
        end(self.standing.pop(name).fabric)

    def close(self) -> None:
        """Close all."""
        with contextlib.ExitStack() as stack:
            for crew in self.standing.values():
                stack.callback(crew.close)
            self.standing.clear()


# ---------------------------------------------------------------- tests whose body runs in a host


def _run(at: At, module: str, name: str, kwargs: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(at, **kwargs)


def in_host(body: Callable[..., None]) -> Callable[..., None]:
    """Make a test of a function that runs in a host process: its first parameter is `at`, the others are the test's."""

    @functools.wraps(body)
    def test(crew: Crew, **kwargs: Any) -> None:
        crew[0].call(_run, body.__module__, body.__qualname__, kwargs)

    crew = inspect.Parameter("crew", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = list(inspect.signature(body).parameters.values())[1:]
    test.__signature__ = inspect.Signature([crew, *others])  # type: ignore[attr-defined]
    return test


# ---------------------------------------------------------------- processes of their own


def _apart(connection: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    try:
        answer: tuple[bool, Any, str] = (True, function(*args), "")
    except BaseException as error:
        answer = (False, error, traceback.format_exc())
    try:
        connection.send(answer)
    except Exception as error:
        connection.send((False, AssertionError(repr(error)), answer[2]))


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
    """Run a module-level function in a new process that may have children; return or raise what it does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_apart, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        fine, value, text = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with {process.exitcode}") from None
    process.join()
    if fine:
        return value
    value.__cause__ = AssertionError(text)
    raise value


def attach(at: At, **options: Any) -> dmrpc_cxl.Host:
    """Attach the process of `at` to its fabric once more."""
    return dmrpc_cxl.attach(at.host.fabric, **options)

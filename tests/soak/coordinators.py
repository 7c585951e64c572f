"""The coordinator, and what is done to it: killed, killed again while it recovers, stopped, replaced while it is stopped."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from dmrpc_cxl.coordinator import __main__ as program

from .children import Child
from .holdings import Violation
from .loop import Loop

KILLED, STOPPED, REPLACED = -int(signal.SIGKILL), 0, 1


def _run(fabric: str, ready: Connection, options: tuple[str, ...]) -> None:
    program.main(["--ready-fd", str(os.dup(ready.fileno())), *options, fabric])


class Coordinators:
    """The one that serves, and those that did."""

    def __init__(self, loop: Loop, fabric: str, folder: Path) -> None:
        self.options: tuple[str, ...] = ()
        self.tally: Counter[str] = Counter()
        self.current: Child | None = None
        self.ready = False
        self.busy = False
        """Something is being done to it."""
        self._loop = loop
        self._fabric = fabric
        self._log = folder / "coordinator.log"
        self._stopped: Child | None = None  # replaced, and not continued yet
        self._allowed: dict[Child, int] = {}  # exit codes of those that are to end

    # ---------------------------------------------------------------- processes

    def start(self, then: Callable[[], None] = lambda: None) -> None:
        """Start one; then() is called when it serves."""
        ours, theirs = multiprocessing.Pipe(duplex=False)
        options = (*self.options, *(("--take-over",) if self._stopped else ()))
        child = Child(self._log, (theirs.fileno(),), _run, self._fabric, theirs, options)
        theirs.close()
        self.current, self.ready = child, False

        def said() -> None:
            self._loop.forget(ours)
            line = os.read(ours.fileno(), 4096)
            ours.close()
            if line and child is self.current:
                self.ready = True
                then()

        self._loop.watch(ours, said)
        self._loop.watch(child, lambda: self._ended(child))

    def _ended(self, child: Child) -> None:
        self._loop.forget(child)
        code = child.wait()
        if code != self._allowed.pop(child, None):
            raise Violation(f"coordinator {child.pid} ended with {code}; see {self._log}")
        if child is self.current:
            self.current, self.ready = None, False

    def _end(
        self, child: Child, number: signal.Signals, code: int, then: Callable[[], None]
    ) -> None:
        """Make one end, and wait for that without waiting."""
        self._allowed[child] = code
        child.send(number)
        if child.stopped:
            child.send(signal.SIGCONT)

        def look() -> None:
            if child.exit_code is None:
                self._loop.after(0.001, look)
            else:
                then()

        look()

    def _kill(self, child: Child | None, then: Callable[[], None]) -> None:
        if child is None:
            then()
        else:
            self.tally["coordinators killed"] += 1
            self._end(child, signal.SIGKILL, KILLED, then)

    def all_children(self) -> list[Child]:
        """Return all that may still be there."""
        found = [self.current, self._stopped, *self._allowed]
        return [child for child in found if child is not None]

    def _idle(self) -> None:
        self.busy = False

    # ---------------------------------------------------------------- what is done to them

    def disturb(self, rng: random.Random) -> None:
        """Do something to the one that serves, unless something is being done."""
        if self.busy or not self.ready:
            return
        self.busy = True
        kinds = {self._killed: 4, self._killed_twice: 3, self._paused: 3, self._left: 2}
        kinds |= {self._replaced: 3, self._replaced_twice: 1}
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        self.tally[kind.__name__.strip("_").replace("_", " ")] += 1
        kind(rng)

    def _killed(self, rng: random.Random) -> None:
        gap = rng.choice((0.0, 0.0, rng.uniform(0, 0.1)))
        self._kill(self.current, lambda: self._loop.after(gap, lambda: self.start(self._idle)))

    def _killed_twice(self, rng: random.Random) -> None:
        delay = rng.uniform(0, 0.1)

        def again() -> None:
            self._kill(self.current, lambda: self.start(self._idle))

        def once_more() -> None:
            self.start()
            self._loop.after(delay, again)

        self._kill(self.current, once_more)

    def _paused(self, rng: random.Random) -> None:
        child = self.current
        assert child is not None

        def go_on() -> None:
            child.send(signal.SIGCONT)
            self._idle()

        child.send(signal.SIGSTOP)
        self._loop.after(10 ** rng.uniform(-3, -0.5), go_on)

    def _left(self, rng: random.Random) -> None:
        assert self.current is not None
        self._end(self.current, signal.SIGTERM, STOPPED, lambda: self.start(self._idle))

    def _replaced(self, rng: random.Random) -> None:
        delay, killed = rng.uniform(0, 0.2), rng.random() < 0.3
        self._pause_and_replace(lambda: self._loop.after(delay, lambda: self._let_go_on(killed)))

    def _replaced_twice(self, rng: random.Random) -> None:
        delay = rng.uniform(0, 0.1)

        def again() -> None:
            self._kill(self.current, lambda: self.start(lambda: self._let_go_on(False)))

        self._pause_and_replace(lambda: self._loop.after(delay, again))

    def _pause_and_replace(self, then: Callable[[], None]) -> None:
        assert self.current is not None
        self._stopped = self.current
        self._stopped.send(signal.SIGSTOP)
        self.start(then)

    def _let_go_on(self, killed: bool) -> None:
        """Let the one that was replaced go on: it must notice, and end."""
        old, self._stopped = self._stopped, None
        assert old is not None
        if killed:
            self._kill(old, self._idle)
        else:
            self._end(old, signal.SIGCONT, REPLACED, self._idle)

    def stop(self, then: Callable[[], None]) -> None:
        """Stop the one that serves, in order."""
        assert self.current is not None
        assert not self.busy
        self.ready = False
        self._end(self.current, signal.SIGTERM, STOPPED, then)

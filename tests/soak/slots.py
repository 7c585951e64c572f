"""The places of hosts, and what is done to their processes: whoever ends is replaced at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from dmrpc_cxl._native import LAYOUT, Device

from . import program
from .aim import Aim
from .board import REST, WORK, Board
from .children import Child
from .holdings import Violation
from .loop import Loop
from .plan import SLOTS, life

KILLED = -int(signal.SIGKILL)
AIMED = 0.8  # of the driver's kills
OPERATIONS = {
    number: name[len("INTENT_") :].lower()
    for name, number in LAYOUT.items()
    if name.startswith("INTENT_")
}


class Place:
    """One slot, and the process that is there now."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.life = -1
        self.host = 0  # its id in the fabric, once it is attached
        self.state = "gone"
        self.doomed = False  # the driver has killed it
        self.child: Child
        self.pipe: Any
        self.answer: Any = None


class Slots:
    """All of them."""

    def __init__(self, loop: Loop, device: Device, fabric: str, folder: Path) -> None:
        self.operations: Counter[str] = Counter()
        """In which processes were when they were killed."""
        self._device = device
        self._aim = Aim(device)
        self.board = Board(folder / "board")
        self.kills = 0
        self.tally: Counter[str] = Counter()
        self.places = [Place(slot) for slot in range(SLOTS)]
        self._seed = 0
        self._loop = loop
        self._fabric = fabric
        self._folder = folder
        self._ending = False

    # ---------------------------------------------------------------- processes

    def begin(self, seed: int) -> None:
        """Begin a round: whoever is there goes on as life 0."""
        self._seed = seed
        for place in self.places:
            if place.state == "resting":
                place.life = 0
                self.board.set_life(place.slot, 0)
        self.board.phase = WORK
        for place in self.places:
            if place.state == "resting":
                place.state = "working"
                place.pipe.send(("begin", seed))
            else:
                self._start(place, 0)

    def _start(self, place: Place, number: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        place.life, place.state, place.doomed, place.host = number, "starting", False, 0
        self.board.set_life(place.slot, number)
        place.pipe = ours
        place.child = child = Child(
            self._folder / "hosts.log", (theirs.fileno(),), program.main,
            self._fabric, self._folder, theirs, self._seed, place.slot, number,
        )  # fmt: skip
        theirs.close()
        self._loop.watch(ours, lambda: self._said(place))
        self._loop.watch(child, lambda: self._ended(place))

    def _said(self, place: Place) -> None:
        try:
            what, value = place.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._loop.forget(place.pipe)  # its end is seen at the pidfd
            return
        if what == "violation":
            raise Violation(value)
        if what == "ready":
            place.host = value
            place.state = "working"
        elif what == "done":
            place.answer, place.state = value, "resting"
        else:
            place.state = what  # "resting", "left"

    def _ended(self, place: Place) -> None:
        while place.pipe.poll():  # what it said last
            try:
                what, value = place.pipe.recv()
            except (EOFError, ConnectionResetError):
                break
            if what == "violation":
                raise Violation(value)
            place.state = what
        self._loop.forget(place.child)
        code = place.child.wait()
        with contextlib.suppress(KeyError):
            self._loop.forget(place.pipe)
        place.pipe.close()
        planned = place.doomed or life(self._seed, place.slot, place.life).delay_ns is not None
        if code == KILLED and planned:
            self.kills += 1
            self.tally["killed while " + place.state] += 1
            self._note_operation(place)
        elif code != 0 or place.state != "left":
            raise Violation(
                f"slot {place.slot}, life {place.life}: process {place.child.pid} ended with {code},"
                f" {place.state}; see {self._folder / 'hosts.log'}"
            )
        else:
            self.tally["left"] += 1
        self.board.disturb(place.slot)
        if not self._ending:
            self._start(place, place.life + 1)

    def _note_operation(self, place: Place) -> None:
        """Note what native code was doing when the process died, if its entry still says so."""
        if place.host:
            entry = self._device.host(place.host)
            if entry["pid"] == place.child.pid and entry["activity"] % 2:
                intent = entry["intent"]
                number = intent["op"] or intent["died_in"]
                self.operations[OPERATIONS.get(number, f"operation {number}")] += 1

    # ---------------------------------------------------------------- what is done to them

    def kill(self, rng: random.Random) -> None:
        """Kill one: mostly one that is inside an operation, otherwise whatever it is doing."""
        if rng.random() < AIMED:
            living = {
                place.host: place
                for place in self.places
                if place.state == "working" and not place.doomed and not place.child.stopped
            }
            found = self._aim.find(list(living), rng)
            if found is not None:
                self._kill(living[found])
                return
        self._kill(rng.choice(self.places))

    def _kill(self, place: Place) -> None:
        if not place.doomed:
            place.doomed = True
            self.board.disturb(place.slot)
            place.child.send(signal.SIGKILL)

    def stop(self, rng: random.Random) -> None:
        """Stop one for a while; some die before they go on."""
        place, seconds, dies = (
            rng.choice(self.places),
            10 ** rng.uniform(-3, -0.5),
            rng.random() < 0.2,
        )
        child = place.child
        if place.doomed or child.stopped:
            return
        self.tally["stopped"] += 1
        self.board.disturb(place.slot)
        child.send(signal.SIGSTOP)

        def go_on() -> None:
            if child is place.child and dies:
                self._kill(place)
            else:
                child.send(signal.SIGCONT)

        self._loop.after(seconds, go_on)

    # ---------------------------------------------------------------- at rest

    def rest(self) -> None:
        """Have all hosts rest; those that die before are replaced."""
        self.board.phase = REST
        self._loop.until(
            lambda: all(place.state == "resting" for place in self.places), "all hosts rest"
        )
        self._aim.check(self.places[0].host)

    def ask(self, question: str, argument: Any = None) -> list[Any]:
        """Ask every host at rest, all at once; return what each says."""
        for place in self.places:
            place.state = "asked"
            place.pipe.send((question, argument))
        self._loop.until(
            lambda: all(place.state == "resting" for place in self.places),
            f"all hosts answer {question!r}",
        )
        return [place.answer for place in self.places]

    def leave(self) -> None:
        """Have all hosts leave."""
        self._ending = True
        for place in self.places:
            place.pipe.send(("leave", None))
        self._loop.until(
            lambda: all(place.child.exit_code is not None for place in self.places),
            "all hosts leave",
        )

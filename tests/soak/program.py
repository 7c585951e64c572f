"""A host process: acts until it is told to rest, or until its plan says that it dies, or until it is killed.

With the driver it talks over a pipe, in turns. It speaks first: "ready"; when it sees on the board that it shall rest,
"resting"; then it is asked:

    settle      empty the mailbox; what nobody took of the letters is dropped once all others have done so, too
    report      check every byte, and say what is held
    let go      free everything
    begin       go on, as another life, in another round
    leave       detach, end

A violation is told whenever it happens, and ends the process.
"""

from __future__ import annotations

import faulthandler
import gc
import random
import sys
import threading
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.errors import NoHostSlot

from .acts import Acts
from .board import WORK, Board
from .calls import THRESHOLD, Calls, Services
from .children import KillTimer
from .holdings import Holdings, Violation
from .mail import Mail
from .plan import Life, life
from .rush import Rush

WATCHDOG_SECONDS = 150  # for one act; a call may take a minute
SHARE_OF_CALLS = 0.25
VIOLATION_STATUS = 3


class Program:
    """The process."""

    def __init__(self, fabric: str, folder: Path, pipe: Connection, plan: Life) -> None:
        self.pipe = pipe
        self.plan = plan
        self.folder = folder
        self.board = Board(folder / "board")
        self.timer = KillTimer()
        self.mail = Mail(folder, plan.slot)
        self.host = self._attach(fabric)
        self.host.threshold = THRESHOLD
        self.holdings = Holdings(self.host, self.timer.strike)
        self.services = Services(plan, self.holdings, lambda: self.board.phase != WORK)
        self._begin(plan)

    def _attach(self, fabric: str) -> dmrpc_cxl.Host:
        give_up = time.monotonic() + 60
        while True:
            try:
                return dmrpc_cxl.attach(
                    fabric, name=f"{self.plan.slot}.{self.plan.number}", **self.plan.options
                )
            except NoHostSlot:  # the dead are still being reclaimed
                if time.monotonic() > give_up:
                    raise
                threading.Event().wait(0.01)

    def _begin(self, plan: Life) -> None:
        self.plan = plan
        self.acts = Acts(plan, self.board, self.mail, self.holdings)
        self.calls = Calls(plan, self.board, self.holdings)

    def run(self) -> None:
        """Act, rest, and act again; until told to leave."""
        self.pipe.send(("ready", self.host.id))
        while self._work():
            self.timer.stop()
            if not self._rest():
                return

    # ---------------------------------------------------------------- at work

    def _work(self) -> bool:
        """Act. False: the plan says that this process leaves."""
        plan, number = self.plan, 0
        while self.board.phase == WORK:
            faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
            number += 1
            if number == plan.last_act:
                if plan.delay_ns is None:
                    self._leave()
                    return False
                self.timer.arm(plan.delay_ns)
                if plan.rushes:
                    Rush(self.acts, self.calls).until_killed(plan.chance(number))
            self._act(plan.chance(number))
            self.board.count_act(plan.slot)
        return True

    def _act(self, rng: random.Random) -> None:
        if rng.random() < 0.02:
            self.services.balance()
        if rng.random() < SHARE_OF_CALLS:
            self.calls.act(rng)
        else:
            self.acts.act(rng)

    # ---------------------------------------------------------------- at rest

    def _rest(self) -> bool:
        """Answer questions, until the next round begins. False: until the end."""
        self.calls.close_clients()
        self.services.close_clients()
        gc.collect()
        self.pipe.send(("resting", None))
        while True:
            faulthandler.cancel_dump_traceback_later()
            question, argument = self.pipe.recv()
            faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
            if question == "begin":
                self._begin(life(argument, self.plan.slot, 0))
                return True
            if question == "leave":
                self._leave()
                return False
            answer: Any = None
            if question == "settle":
                self._settle(final=argument)
            elif question == "report":
                answer = self._report()
            elif question == "let go":
                self.holdings.let_go()
            self.pipe.send(("done", answer))

    def _settle(self, *, final: bool) -> None:
        rng = self.plan.chance(0)
        while self.acts.receive(rng):
            pass
        self.holdings.take_from_shelf()
        if final:
            for letter, claim in self.holdings.sent:
                if self.host.ref_is_held(letter.wire):
                    claim.ref.drop()
            self.holdings.sent.clear()

    def _report(self) -> dict[str, Any]:
        holdings = self.holdings
        holdings.take_from_shelf()
        holdings.check(f"slot {self.plan.slot}, life {self.plan.number}, at rest")
        gc.collect()
        tally, self.acts.tally = self.acts.tally + self.calls.tally, Counter()
        self.calls.tally = Counter()
        lost, self.acts.lost = self.acts.lost, []
        peers_lost, self.calls.lost = self.calls.lost, []
        return {
            "entries": len(holdings.held) + len(holdings.claims),
            "pages": holdings.pages(),
            "senders lost": lost,
            "servers lost": peers_lost,
            "tally": tally,
        }

    def _leave(self) -> None:
        self.calls.close_clients()
        self.services.stop()
        self.holdings.held.clear()
        self.holdings.claims.clear()
        self.holdings.shelf.clear()
        self.holdings.sent.clear()
        gc.collect()
        self.host.detach()
        self.pipe.send(("left", None))


def main(fabric: str, folder: Path, pipe: Connection, seed: int, slot: int, number: int) -> None:
    """Be a host process."""
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    try:
        Program(fabric, folder, pipe, life(seed, slot, number)).run()
    except EOFError:  # the driver is gone
        return
    except Violation as violation:
        traceback.print_exc()
        pipe.send(("violation", str(violation)))
        sys.exit(VIOLATION_STATUS)
    except BaseException:
        traceback.print_exc()
        pipe.send(("violation", f"slot {slot}, life {number}: {traceback.format_exc()}"))
        sys.exit(VIOLATION_STATUS)

"""A coordinator stops behind any of its steps, another one takes over, and the first goes on: it must change nothing more.

Of each label the first act in which a coordinator passes it is tried always, `make crash` tries all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.crash import coordinator_acts, reach
from tests.crash.coordinator_acts import CoordinatorAct
from tests.crash.processes import wait_until_stopped
from tests.crash.stage import Stage

REACH = reach.load()


def pauses() -> Iterator[Any]:
    seen = set()
    for act in coordinator_acts.ACTS:
        for label in () if act.ends else REACH[act.key]:
            mark = pytest.mark.crash if label in seen else ()
            seen.add(label)
            yield pytest.param(act, label, id=f"{act.name}-{label}".replace(" ", "_"), marks=mark)


@pytest.mark.parametrize(("act", "label"), [*pauses()])
def test_who_was_replaced_behind_any_step_changes_nothing_more(
    stage: Stage, act: CoordinatorAct, label: str
) -> None:
    # Its next store, before it notices, may be one that its successor makes as well: a count dropped twice is one that
    # recovery takes for dropped.
    with stage.deaths(act.host_deaths + 1):
        steps = act.steps(stage)
        next(steps)
        paused = stage.fabric.coordinator
        paused.arm("none")
        paused.stop_at(label)
        next(steps)
        wait_until_stopped(paused.pid)
        assert stage.fabric.launch("--take-over").serves()
        os.kill(paused.pid, signal.SIGCONT)
        assert paused.wait() == 1
        next(steps)
        assert next(steps, "end") == "end"

"""A frame goes home, and home dies meanwhile: it takes three hosts, of which one stands still at the right moment."""

from __future__ import annotations

import os
import signal

from tests.crash.host_acts import free, map_it, send_one_away
from tests.crash.processes import arm, disarm, stop_at, wait_until_stopped
from tests.crash.stage import Stage


def run(stage: Stage, label: str = "none", n: int = 1) -> dict[str, int]:
    """Free what a host has made that dies when its frames are about to go home; die of it at a label that comes after."""
    dies = label != "none"
    stage.record.clear()
    with stage.deaths(1 + int(dies)):
        maker, victim = stage.fabric.host(), stage.fabric.host(deadline=30.0)
        victim.call(map_it, maker.call(send_one_away))
        victim.call(arm, label, n, stage.record.path)
        victim.call(stop_at, "home_begun")
        victim.start(free)
        wait_until_stopped(victim.pid)
        before = stage.record.passes()
        maker.kill()
        stage.wait_until_gone(maker)
        os.kill(victim.pid, signal.SIGCONT)
        if dies:
            assert victim.expect_death() == -signal.SIGKILL
            passes = stage.record.passes()
            assert stage.record.deaths() == {label: 1}
        else:
            victim.result()
            passes = stage.record.passes()
            victim.call(disarm)
            victim.leave()
    return {passed: times for passed, times in passes.items() if passed not in before}

"""What a coordinator finds when it starts, and is killed over: dead hosts, a paused predecessor, a reclaim half done.

As in coordinator_acts.py an act is a generator. At its first yield no coordinator serves; the one that is then started is
told by its environment where to die. When the act goes on, one serves that has no such order; at the second yield what
there was to do has come about.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable

from tests.crash import coordinator_acts, damage, keeper
from tests.crash.coordinator_acts import (
    ENDPOINT,
    NOBODY,
    Steps,
    publish,
    rich_host,
    services,
    spoil,
    withdraw,
)
from tests.crash.host_acts import hold_everything
from tests.crash.processes import NurseryFabric, repair
from tests.crash.stage import SMALL, Stage
from tests.standing import end


def kill(stage: Stage) -> None:
    stage.fabric.coordinator.kill()
    stage.fabric.coordinator.wait()


def finds_the_dead(stage: Stage) -> Steps:
    """A host has died with everything that it held, a service among it; the keeper's service stays."""
    stage.keeper.call(publish, ENDPOINT)
    host = rich_host(stage)
    host.call(publish, ENDPOINT, "other")
    kill(stage)
    host.kill()
    yield
    stage.wait_until_gone(host)
    yield
    assert services(stage) == {"name": ENDPOINT}
    stage.keeper.call(withdraw)


def takes_over(stage: Stage) -> Steps:
    """The coordinator stands still, and a host has died."""
    host = rich_host(stage)
    paused = stage.fabric.coordinator
    os.kill(paused.pid, signal.SIGSTOP)
    host.kill()
    yield
    os.kill(paused.pid, signal.SIGCONT)
    assert paused.wait() == 1
    stage.wait_until_gone(host)
    yield


@dataclasses.dataclass(frozen=True)
class StartAct:
    """See the head of this file."""

    role: str
    name: str
    steps: Callable[[Stage], Steps]
    args: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.role}: {self.name}"


def run_start(stage: Stage, act: StartAct, label: str = "none", n: int = 1) -> dict[str, int]:
    """Start a coordinator that dies at the n-th pass of a label, and another one. Returns what it has passed."""
    dies = label != "none"
    stage.record.clear()
    with stage.deaths(2 + int(dies)):
        steps = act.steps(stage)
        next(steps)
        coordinator = stage.fabric.launch(*act.args, environment=stage.record.environment(label, n))
        if dies:
            code = coordinator.wait()
            assert code == -signal.SIGKILL, f"it ended with {code}"
            passes = stage.record.passes()
            assert stage.record.deaths() == {label: 1}
            stage.keeper.call(keeper.go_on)
            assert stage.fabric.launch(*act.args).serves()
        else:
            assert coordinator.serves()
        next(steps)
        if not dies:
            with stage.client() as client:
                client.stats()
            passes = stage.record.passes()
            coordinator.arm("none")
        assert next(steps, "end") == "end"
    return passes


# ---------------------------------------------------------------- fsck, where no coordinator is


def run_repair(stage: Stage, label: str = "none", n: int = 1) -> dict[str, int]:
    """Let `dmrpc fsck --repair` die at a label, and repeat it; then start a coordinator."""
    dies = label != "none"
    stage.record.clear()
    with stage.deaths(2 + int(dies)):
        spoil(stage, service=True)
        code = repair(stage.name, stage.fabric.log_path, stage.record.environment(label, n))
        passes = stage.record.passes()
        if dies:
            assert code == -signal.SIGKILL, f"it ended with {code}"
            assert stage.record.deaths() == {label: 1}
            stage.keeper.call(keeper.go_on)
            code = repair(stage.name, stage.fabric.log_path)
        assert code == 0
        stage.fabric.assert_sound()
        stage.restart_coordinator()
        assert services(stage) == {}
    return passes


def run_repair_of_the_deserted(stage: Stage, label: str = "none", n: int = 1) -> dict[str, int]:
    """The same on a fabric whose processes are all gone, which is made for it: nothing is in use afterwards."""
    dies = label != "none"
    stage.record.clear()
    fabric = NurseryFabric(stage.folder, **SMALL)
    try:
        maker, taker = fabric.host(), fabric.host()
        maker.call(keeper.settle_in)
        wires = maker.call(keeper.offer, ("shared", "exclusive", "long"))
        taker.call(hold_everything, *wires)
        taker.call(publish, ENDPOINT)
        fabric.coordinator.kill()
        fabric.coordinator.wait()
        refs = damage.refs_of(fabric.name, taker.id)
        for entry in refs[::2]:
            damage.set_holder(fabric.name, entry, NOBODY)
        for host in (maker, taker):
            host.kill()
        code = repair(fabric.name, fabric.log_path, stage.record.environment(label, n))
        passes = stage.record.passes()
        if dies:
            assert code == -signal.SIGKILL, f"it ended with {code}"
            assert stage.record.deaths() == {label: 1}
            code = repair(fabric.name, fabric.log_path)
        assert code == 0
        fabric.start_coordinator()
    except BaseException:
        end(fabric)
        raise
    fabric.close()
    return passes


# ---------------------------------------------------------------- a recovery of a recovery

# What the coordinator finds when it is killed for the first time: the act of coordinator_acts.py that it is at.
FOUND = {
    act.name: act.steps
    for act in coordinator_acts.ACTS
    if act.name.removeprefix("reclaims who died ")
    in ("reclaims", "sharing", "dropping", "handing over")
}


def run_again(
    stage: Stage, found: str, first: str, second: str = "none", n: int = 1
) -> dict[str, int]:
    """Kill the coordinator at its first pass of a label while it reclaims a host, and its successor at the n-th of another.

    Returns what the successor has passed, while it started, until it served or died.
    """
    dies = second != "none"
    stage.record.clear()
    with stage.deaths(2 + int(dies)):
        steps = FOUND[found](stage)
        next(steps)
        stage.fabric.coordinator.arm(first)
        next(steps)
        assert stage.fabric.coordinator.wait() == -signal.SIGKILL
        successor = stage.fabric.launch(environment=stage.record.environment(second, n))
        assert successor.serves() == (not dies)
        passes = stage.record.passes()
        if dies:
            assert successor.wait() == -signal.SIGKILL
            assert stage.record.deaths() == {second: 1}
            stage.keeper.call(keeper.go_on)
            stage.restart_coordinator()
        else:
            successor.arm("none")
        next(steps)
        assert next(steps, "end") == "end"
    return passes


ACTS = [
    StartAct("coordinator", "finds the dead", finds_the_dead),
    StartAct("coordinator", "takes over", takes_over, ("--take-over",)),
]

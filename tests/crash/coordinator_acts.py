"""Acts of coordinators, and of `dmrpc fsck --repair`, which does their work when there is none.

An act is a generator: it prepares, and yields; then the coordinator is armed. What comes up to the second yield makes it
act. Whether it dies of that or not, a coordinator serves when the act goes on, and up to the third yield sees that
what was asked for has come about. The rest clears up.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dmrpc_cxl.errors import PeerError
from tests.crash import damage, keeper
from tests.crash.host_acts import (
    allocate,
    clone,
    detach,
    drop,
    free_and_give_back,
    hold_everything,
    move,
    own_much,
    share,
)
from tests.crash.keeper import PAGE
from tests.crash.processes import Host, arm
from tests.crash.stage import Stage
from tests.fabrics import At

Steps = Iterator[None]
NOBODY = 7  # a host that is never attached
ENDPOINT = {"where": "x" * 1000}  # more than one slot


# ---------------------------------------------------------------- in hosts


def map_again(at: At) -> None:
    at.result = at.host.map_ref(at.moved)


def free_what_is_mine_alone(at: At) -> None:
    at.alone.free()


def give_up_what_the_keeper_made(at: At) -> None:
    at.host._forget_given()  # else they would stay, for those that it has given away
    at.viewed.free()


def store_to_mapped(at: At) -> None:
    ctypes.memset(at.mapped.address, 7, len(at.mapped))


def store_to_pieces(at: At) -> None:
    ctypes.memset(at.more.address + PAGE, 7, 1)


def publish(at: At, endpoint: Any, name: str = "name") -> None:
    at.host.publish(name, endpoint)


def withdraw(at: At) -> None:
    at.host.withdraw("name")


# ---------------------------------------------------------------- acts


def rich_host(stage: Stage) -> Host:
    """Return a host that holds one of each."""
    wires = stage.keeper.call(keeper.offer, ("shared", "exclusive", "long"))
    host = stage.fabric.host(deadline=30.0)
    host.call(hold_everything, *wires)
    return host


def admits(stage: Stage) -> Steps:
    yield
    host = stage.fabric.coming_host(deadline=30.0)
    yield
    host.attached()
    yield
    host.call(keeper.works)
    host.leave()


def lets_go(stage: Stage) -> Steps:
    host = rich_host(stage)
    yield
    host.start(detach)
    yield
    host.result()
    stage.wait_until_gone(host)
    yield
    host.leave()


def grants(stage: Stage) -> Steps:
    host = stage.fabric.host(deadline=30.0)
    yield
    host.start(allocate)
    yield
    host.result()
    yield
    host.leave()


def takes_back(stage: Stage) -> Steps:
    host = stage.fabric.host(high=8, batch=8, deadline=30.0)
    host.call(own_much)
    yield
    host.start(free_and_give_back)
    yield
    host.result()
    yield
    host.leave()


def publishes(stage: Stage) -> Steps:
    yield from _publishes(stage, None)


def publishes_anew(stage: Stage) -> Steps:
    yield from _publishes(stage, "before")


def _publishes(stage: Stage, before: Any) -> Steps:
    host = stage.fabric.host(deadline=30.0)
    if before:
        host.call(publish, before)
    yield
    host.start(publish, ENDPOINT)
    yield
    host.result()
    yield
    found = services(stage)
    assert found == {"name": ENDPOINT}, found
    host.leave()
    assert services(stage) == {}


def withdraws(stage: Stage) -> Steps:
    host = stage.fabric.host(deadline=30.0)
    host.call(publish, ENDPOINT)
    yield
    host.start(withdraw)
    yield
    host.result()  # not ServiceNotFound, although it was carried out the first time
    yield
    assert services(stage) == {}
    host.leave()


def services(stage: Stage) -> dict[str, Any]:
    with stage.client() as client:
        return {found["name"]: found["endpoint"] for found in client.services("")}


def reclaims(stage: Stage) -> Steps:
    host = rich_host(stage)
    host.call(publish, ENDPOINT)
    yield
    host.kill()
    yield
    stage.wait_until_gone(host)
    yield


def reclaims_who_died_inside(operate: Any, label: str, n: int) -> Callable[[Stage], Steps]:
    """Reclaim a host that was killed inside of an operation, and held one of each besides."""

    def act(stage: Stage) -> Steps:
        host = rich_host(stage)
        yield
        host.call(arm, label, n)
        host.start(operate)
        assert host.expect_death() == -signal.SIGKILL
        yield
        stage.wait_until_gone(host)
        yield

    return act


def scrubs(stage: Stage) -> Steps:
    spoil(stage)
    restart(stage)  # its books know nothing of what was spoiled
    yield
    asking = threading.Thread(target=_check, args=(stage,))
    asking.start()
    yield
    asking.join()
    yield
    with stage.client() as client:
        client.check(repair=True, timeout=30.0)


def _check(stage: Stage) -> None:
    with contextlib.suppress(PeerError), stage.client() as client:
        client.check(repair=True, timeout=30.0)


def spoil(stage: Stage, *, service: bool = False) -> None:
    """Leak counts, and give a frame and Refs to nobody; some have more runs than fit in an entry.

    Afterwards there is no coordinator.
    """
    host = rich_host(stage)
    if service:
        host.call(publish, ENDPOINT)
    stage.fabric.coordinator.kill()
    stage.fabric.coordinator.wait()
    leaked, also_leaked, lost = damage.frames_of_the_pool(stage.name, 3)
    damage.set_count(stage.name, leaked, 1)
    damage.set_count(stage.name, also_leaked, 2)
    damage.set_owner(stage.name, lost, NOBODY)
    for entry in damage.refs_of(stage.name, host.id)[::2]:
        damage.set_holder(stage.name, entry, NOBODY)
    host.kill()


def restart(stage: Stage) -> None:
    """Kill the coordinator, if it lives, and start another one."""
    if stage.fabric.coordinator.poll() is None:
        stage.fabric.coordinator.kill()
        stage.fabric.coordinator.wait()
    stage.fabric.start_coordinator()


def stops(stage: Stage) -> Steps:
    yield
    stage.fabric.coordinator.terminate()
    yield
    yield


@dataclasses.dataclass(frozen=True)
class CoordinatorAct:
    """See the head of this file."""

    role: str
    name: str
    steps: Callable[[Stage], Steps]
    host_deaths: int = 0
    ends: bool = False
    """The coordinator ends anyway."""

    @property
    def key(self) -> str:
        return f"{self.role}: {self.name}"


def run(stage: Stage, act: CoordinatorAct, label: str = "none", n: int = 1) -> dict[str, int]:
    """Let the coordinator act, and die at the n-th pass of a label. Returns what it has passed until then."""
    dies = label != "none"
    stage.record.clear()
    with stage.deaths(act.host_deaths + int(dies)):
        steps = act.steps(stage)
        next(steps)
        coordinator = stage.fabric.coordinator
        coordinator.arm(label, n, stage.record.path)
        next(steps)
        if dies:
            code = coordinator.wait()
            assert code == -signal.SIGKILL, f"it ended with {code}"
            passes = stage.record.passes()
            assert stage.record.deaths() == {label: 1}
            stage.keeper.call(keeper.go_on)
            stage.restart_coordinator()
        elif act.ends:
            assert coordinator.wait() == 0
            passes = stage.record.passes()
            stage.restart_coordinator()
        next(steps)
        if not dies and not act.ends:
            with stage.client() as client:  # whatever it was doing is done when it answers
                client.stats()
            passes = stage.record.passes()
            coordinator.arm("none")
        assert next(steps, "end") == "end"
    return passes


def _inside(name: str, operate: Any, label: str, n: int = 1) -> CoordinatorAct:
    return CoordinatorAct(
        "coordinator",
        f"reclaims who died {name}",
        reclaims_who_died_inside(operate, label, n),
        host_deaths=1,
    )


ACTS = [
    CoordinatorAct("coordinator", "admits", admits),
    CoordinatorAct("coordinator", "lets go", lets_go),
    CoordinatorAct("coordinator", "grants", grants),
    CoordinatorAct("coordinator", "takes back", takes_back),
    CoordinatorAct("coordinator", "publishes", publishes),
    CoordinatorAct("coordinator", "publishes anew", publishes_anew),
    CoordinatorAct("coordinator", "withdraws", withdraws),
    CoordinatorAct("coordinator", "scrubs", scrubs, host_deaths=1),
    CoordinatorAct("coordinator", "stops", stops, ends=True),
    CoordinatorAct("coordinator", "reclaims", reclaims, host_deaths=1),
    _inside("allocating", allocate, "frame_in_use", 3),
    _inside("sharing", share, "share_counted", 5),
    _inside("moving", move, "move_passed"),
    _inside("cloning", clone, "clone_progress", 5),
    _inside("dropping", drop, "drop_progress", 5),
    _inside("dropping, almost done", drop, "overflow_unlinked"),
    _inside("mapping", map_again, "map_shown"),
    _inside("mapping, almost done", map_again, "overflow_unlinked"),
    _inside("freeing", free_what_is_mine_alone, "frame_left_use", 3),
    _inside("storing", store_to_mapped, "cow_repointed", 3),
    _inside("storing, almost done", store_to_mapped, "cow_progress", 3),
    _inside("filling", store_to_pieces, "fill_shown"),
    _inside("handing over", give_up_what_the_keeper_made, "home_sent", 3),
    _inside("giving back", detach, "return_untold"),
]

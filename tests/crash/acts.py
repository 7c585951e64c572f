"""What somebody does who will not live to the end of it.

An act has a role, a name, and what is done in three processes: the keeper offers Refs, the victim prepares, is armed, and
operates; or, when it only reacts, the keeper triggers. `run` does all that, with a label at which the victim dies, or
with "none" to the end, to see which labels it passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dmrpc_cxl.errors import PeerError
from tests.crash import keeper
from tests.crash.processes import Host, arm, disarm
from tests.crash.stage import Stage
from tests.standing import until

Occasion = Callable[[Stage], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Act:
    """See the head of this file; functions get the At of their process first."""

    role: str
    name: str
    operate: Callable[..., Any] | None = None
    """In the victim."""
    prepare: Callable[..., Any] | None = None
    """In the victim, with the Refs that were offered."""
    answer: Callable[..., Any] | None = None
    """In the keeper, before the victim is armed, with what prepare has returned."""
    offers: tuple[str, ...] = ()
    trigger: Callable[..., Any] | None = None
    """In the keeper, instead of operate; what it returns is True, and it may raise PeerError if the victim dies."""
    afterwards: Callable[..., Any] | None = None
    """In the keeper."""
    occasion: Occasion = lambda stage: nullcontext()
    """What has to be so meanwhile."""
    meddle: Callable[[Stage, Host], AbstractContextManager[Any]] = lambda stage, victim: (
        nullcontext()
    )
    """What has to be so from the moment that the victim is prepared."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of attach, in the victim."""
    last: tuple[str, ...] = ()
    """Labels that are passed some time after operate or trigger has returned."""
    at_attach: bool = False
    """Attaching is the act."""

    @property
    def key(self) -> str:
        return f"{self.role}: {self.name}"


def run(stage: Stage, act: Act, label: str = "none", n: int = 1) -> dict[str, int]:
    """Let a host do it, and die at the n-th pass of a label. Returns what it has passed until then.

    With "none" it lives; either way the stage is as before.
    """
    dies = label != "none"
    stage.record.clear()
    with contextlib.ExitStack() as until_checked:
        until_checked.enter_context(stage.deaths(int(dies)))
        with act.occasion(stage):
            if act.at_attach:
                victim = stage.fabric.coming_host(
                    stage.record.environment(label, n), **dict(act.options)
                )
            else:
                victim = _prepared(stage, act)
                until_checked.enter_context(act.meddle(stage, victim))
                victim.call(arm, label, n, stage.record.path)
            if dies:
                _die(stage, act, victim)
                passes = stage.record.passes()
                assert stage.record.deaths() == {label: 1}
            else:
                passes = _live(stage, act, victim)
        if act.afterwards is not None:
            stage.keeper.call(act.afterwards)
    return passes


def _prepared(stage: Stage, act: Act) -> Host:
    wires = stage.keeper.call(keeper.offer, act.offers) if act.offers else []
    victim = stage.fabric.host(**dict(act.options))
    prepared = victim.call(act.prepare, *wires) if act.prepare is not None else None
    if act.answer is not None:
        stage.keeper.call(act.answer, prepared)
    return victim


def _die(stage: Stage, act: Act, victim: Host) -> None:
    if act.trigger is not None:
        stage.keeper.start(act.trigger)
    elif act.operate is not None:
        victim.start(act.operate)
    code = victim.expect_death()
    assert code == -signal.SIGKILL, f"it ended with {code}"
    if act.trigger is not None:
        # Who waited for the dead one is told so at once, or has got its answer before.
        with contextlib.suppress(PeerError):
            assert stage.keeper.result()


def _live(stage: Stage, act: Act, victim: Host) -> dict[str, int]:
    if act.at_attach:
        victim.attached()
    elif act.trigger is not None:
        assert stage.keeper.call(act.trigger)
    elif act.operate is not None:
        victim.call(act.operate)
    if act.last:
        until(lambda: set(act.last) <= set(stage.record.passes()))
    passes = stage.record.passes()
    victim.call(disarm)
    victim.leave()
    return passes

"""Which labels each act passes, and how often: reach.json, written by `python -m tests.crash.survey`.

The campaign is made of it: to kill at every label that an act passes, at its first, second and fifth pass. A test of its
own (test_labels.py) does every act to its end, and compares. What a role does not reach has a reason in excuses.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmrpc_cxl._native import CRASH_POINTS
from tests.crash import acts, call_acts, coordinator_acts, home_acts, host_acts, recovery_acts
from tests.crash.stage import Stage

PASSES = (1, 2, 5)
REACH = Path(__file__).with_name("reach.json")
# Behind the back of an act, now and then: hosts look for the next coordinator, and offer it their guard.
BY_CHANCE = {"guard_kept"}
AGAIN = "coordinator again"


def passes_tried(role: str) -> tuple[int, ...]:
    return PASSES if role != AGAIN else PASSES[:1]


@dataclasses.dataclass(frozen=True)
class Job:
    """An act, whoever does it."""

    role: str
    name: str
    run: Callable[..., dict[str, int]]
    """With a stage, a label and a number of passes; or with a stage alone, to the end."""
    by_chance: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        return f"{self.role}: {self.name}"

    def survey(self, stage: Stage) -> dict[str, int]:
        """Return how often the act passes each label, as far as that matters.

        How much is left for a second recovery depends on where Refs lie in their table: passes are not counted there.
        """
        most = passes_tried(self.role)[-1]
        return {
            label: min(passes, most)
            for label, passes in self.run(stage).items()
            if label not in self.by_chance
        }


def _jobs() -> Iterator[Job]:
    for act in (*host_acts.ACTS, *call_acts.ACTS):
        yield Job(act.role, act.name, functools.partial(_swapped, acts.run, act))
    yield Job("freeing host", "frees what the dead have made", home_acts.run)
    chance = frozenset(BY_CHANCE)
    for one in coordinator_acts.ACTS:
        run = functools.partial(_swapped, coordinator_acts.run, one)
        yield Job(one.role, one.name, run, frozenset() if one.name == "admits" else chance)
    for start in recovery_acts.ACTS:
        run = functools.partial(_swapped, recovery_acts.run_start, start)
        yield Job(start.role, start.name, run, chance)
    yield Job("repairer", "repairs", recovery_acts.run_repair)
    yield Job("repairer", "repairs what is deserted", recovery_acts.run_repair_of_the_deserted)


def _swapped(
    run: Callable[..., dict[str, int]], act: Any, stage: Stage, *where: Any
) -> dict[str, int]:
    return run(stage, act, *where)


def _jobs_again(reach: dict[str, dict[str, int]]) -> Iterator[Job]:
    """Yield the recoveries of recoveries: killed first at each label that reclaiming passes."""
    for found in recovery_acts.FOUND:
        for first in reach.get(f"coordinator: {found}", {}):
            run = functools.partial(_run_again, found, first)
            yield Job(AGAIN, f"{found}, killed at {first}", run, frozenset(BY_CHANCE))


def _run_again(found: str, first: str, stage: Stage, *where: Any) -> dict[str, int]:
    return recovery_acts.run_again(stage, found, first, *where)


JOBS: dict[str, Job] = {job.key: job for job in _jobs()}


def load() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(REACH.read_text()) if REACH.exists() else {}
    return found


def every_job(reach: dict[str, dict[str, int]]) -> dict[str, Job]:
    return {**JOBS, **{job.key: job for job in _jobs_again(reach)}}


def roles() -> list[str]:
    return [*dict.fromkeys(job.role for job in JOBS.values()), AGAIN]


def reached(reach: dict[str, dict[str, int]]) -> dict[str, set[str]]:
    """Return the labels that each role reaches."""
    found: dict[str, set[str]] = {role: set() for role in roles()}
    for key, labels in reach.items():
        found[key.partition(": ")[0]] |= set(labels)
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One death."""

    job: Job
    label: str
    n: int
    in_slice: bool
    """Of every role at every label the first one: what `make test` tries."""

    @property
    def id(self) -> str:
        return f"{self.job.role}-{self.label}-{self.n}-{self.job.name}".replace(" ", "_")


def cases() -> list[Case]:
    """Return the campaign: all there is, but of the recoveries of recoveries one pass, and of some hosts a sample."""
    reach = load()
    jobs = every_job(reach)
    seen: set[tuple[str, str]] = set()
    found = []
    for key, labels in reach.items():
        job = jobs[key]
        for label, passes in labels.items():
            pair = (job.role, label)
            for n in passes_tried(job.role):
                if n <= passes:
                    found.append(Case(job, label, n, n == 1 and pair not in seen))
                    seen.add(pair)
    again = [case for case in found if case.job.role == AGAIN and not case.in_slice]
    spared = {case.id for number, case in enumerate(again) if _is_sampled(case) and number % 4}
    return [case for case in found if case.id not in spared]


def _is_sampled(case: Case) -> bool:
    return not case.job.name.startswith("reclaims, ")


def unreached(reach: dict[str, dict[str, int]]) -> Iterator[tuple[str, str]]:
    """Yield role and label of what no act of a role passes."""
    found = reached(reach)
    for role in roles():
        for label in CRASH_POINTS:
            if label not in found[role]:
                yield role, label

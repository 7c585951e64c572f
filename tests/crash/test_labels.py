"""No label is forgotten: each is in the code, passed by some act, and reached by every role or excused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmrpc_cxl._native import CRASH_POINTS
from tests.crash import excuses, reach
from tests.crash.stage import Stage

ROOT = Path(__file__).parents[2]
CODE = [
    *ROOT.glob("dmrpc_cxl/csrc/*.[ch]"),
    *ROOT.glob("dmrpc_cxl/**/*.py"),
    *ROOT.glob("coordinator/*.py"),
    *ROOT.glob("fabric/*.py"),
]
REACH = reach.load()
JOBS = reach.every_job(REACH)


def test_every_label_stands_in_the_code() -> None:
    passed = set()
    for path in CODE:
        text = path.read_text()
        if path.name != "crash.h":
            passed |= set(re.findall(r'(?:DM_CRASH_POINT|crash_point)\("?([a-z0-9_]+)"?\)', text))
    assert passed == set(CRASH_POINTS)


def test_every_label_is_hit_by_some_role() -> None:
    """A new label: let an act pass it, then `make crash-survey`."""
    hit = {case.label for case in reach.cases() if case.in_slice}
    assert hit == set(CRASH_POINTS)


def test_every_role_reaches_every_label_or_has_a_reason_not_to() -> None:
    silent = [
        f"{role}: {label}"
        for role, label in reach.unreached(REACH)
        if not excuses.excuse(role, label)
    ]
    assert silent == []


def test_no_reason_is_out_of_date() -> None:
    used = {(role, excuses.excuse(role, label)) for role, label in reach.unreached(REACH)}
    assert set(excuses.EXCUSES) == set(reach.roles())
    stale = [
        f"{role}: {reason}"
        for role, lines in excuses.EXCUSES.items()
        for _, reason in lines
        if (role, reason) not in used
    ]
    assert stale == []


def test_the_survey_is_of_the_acts_that_there_are() -> None:
    """After a change of the acts: `make crash-survey`."""
    assert list(REACH) == list(JOBS)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=pytest.mark.crash if job.role == reach.AGAIN else ())
        for key, job in JOBS.items()
    ],
)
def test_an_act_passes_the_labels_that_the_survey_says(stage: Stage, key: str) -> None:
    """More passes than in the survey may come of chance, fewer or others may not: `make crash-survey`."""
    passed = JOBS[key].survey(stage)
    assert set(passed) == set(REACH[key])
    assert {label: n for label, n in REACH[key].items() if passed[label] < n} == {}

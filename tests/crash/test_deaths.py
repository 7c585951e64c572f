"""Kill somebody behind each step that others can see, and account for every frame.

A case is a role, a label, a pass, and the act in which it is passed. Of each role at each label one is tried here always;
`make crash` tries all. What must hold afterwards stands at the head of stage.py.
"""

from __future__ import annotations

import pytest

from tests.crash.reach import Case, cases
from tests.crash.stage import Stage
from tests.crash.tally import Tally

CASES = [
    pytest.param(case, id=case.id, marks=() if case.in_slice else pytest.mark.crash)
    for case in cases()
]


@pytest.mark.parametrize("case", CASES)
def test_a_death_behind_any_step_loses_no_frame_and_changes_nothing_of_others(
    stage: Stage, tally: Tally, case: Case
) -> None:
    case.job.run(stage, case.label, case.n)
    tally.died(case.job.role, case.label, stage.leaked)

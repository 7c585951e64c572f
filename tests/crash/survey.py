"""Do every act to its end, and write down which labels it passes: `make crash-survey`, after labels or acts have changed.

What is written is what was passed at the least in several rounds, so that the campaign waits for no death that chance
may spare.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.crash import reach
from tests.crash.stage import Stages

ROUNDS = 3


def least(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {label: min(n, other[label]) for label, n in one.items() if label in other}


def survey(stages: Stages, jobs: dict[str, reach.Job]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for _ in range(ROUNDS):
        for key, job in jobs.items():
            with stages.use() as stage:
                passed = job.survey(stage)
            found[key] = least(found[key], passed) if key in found else passed
    return found


def written(found: dict[str, dict[str, int]]) -> str:
    lines = [f"  {json.dumps(key)}: {json.dumps(labels)}" for key, labels in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(argv: list[str]) -> Any:
    stages = Stages()
    found = survey(stages, reach.JOBS)
    again = {key: job for key, job in reach.every_job(found).items() if key not in found}
    found |= survey(stages, again)
    stages.close()
    reach.REACH.write_text(written(found))
    print(f"{len(found)} acts, {sum(map(len, found.values()))} labels passed")


if __name__ == "__main__":
    main(sys.argv[1:])

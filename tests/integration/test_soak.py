"""A slice of the random campaign (tests/soak): some hundred deaths, with a seed that is printed and repeats what is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KILLS = 200  # of hosts, in rounds of 40; about as many seconds on a machine that does much else
SECONDS = 280  # pytest's own limit is 300


def test_hosts_and_coordinators_killed_and_stopped_at_random_lose_nothing_of_others() -> None:
    seed = 2026  # `make soak` takes another each time
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--seed", str(seed), "--kills", str(KILLS)],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    print(done.stdout)
    print(done.stderr)
    assert done.returncode == 0, f"seed {seed}: what to do to repeat it is printed above"

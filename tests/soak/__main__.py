"""``python -m tests.soak``: a random campaign."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .campaign import Campaign


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="host processes to kill in all")
    parser.add_argument("--seed", type=int, help="of the first round; the next one's is one more")
    parser.add_argument("--round", type=int, default=40, help="kills in a round", metavar="KILLS")
    parser.add_argument(
        "--keep", action="store_true", help="after a violation, leave device and logs"
    )
    parser.add_argument("--quiet", action="store_true", help="say what was found at the end only")
    return parser.parse_args()


def main() -> int:
    """Run rounds until so many hosts were killed; 1 if something was violated."""
    options = _arguments()
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # the driver forks, so it must have no threads
    from .campaign import Campaign

    seed = random.randrange(2**32) if options.seed is None else options.seed
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"python -m tests.soak --seed {seed} --kills {options.kills} --round {options.round}",
        end="",
    )
    print(f"  (commit {commit or 'unknown'})", flush=True)
    began = time.monotonic()
    campaign = Campaign()
    gc.collect()
    gc.freeze()
    faulthandler.enable()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    nr_rounds, code = 0, 0
    try:
        while campaign.slots.kills < options.kills:
            if not options.quiet:
                print(f"round of seed {seed}: {campaign.slots.kills} kills so far", flush=True)
            campaign.round(seed, options.round)
            nr_rounds += 1
            seed += 1
        campaign.finish()
    except KeyboardInterrupt:
        print(f"\ninterrupted in the round of seed {seed}")
        code = 130
    except BaseException as error:
        traceback.print_exc()
        campaign.show_logs()
        print(f"\nFAILED in the round of seed {seed}, after {campaign.slots.kills} kills: {error}")
        again = f"--seed {seed} --kills {options.round} --round {options.round}"
        print(f'again: make soak ARGS="{again}"')
        campaign.remove(keep=options.keep)
        return 1
    campaign.remove(keep=False)
    _tell(campaign, nr_rounds, time.monotonic() - began)
    return code


def _tell(campaign: Campaign, nr_rounds: int, took: float) -> None:
    """Print what was done, and found to be in order."""
    slots = campaign.slots
    print(f"{slots.kills} kills of hosts in {nr_rounds} rounds and {took:.0f} s: no violation")
    for what, counts in (
        ("done to processes", slots.tally + campaign.coordinators.tally),
        ("killed inside native code", slots.operations),
        ("operations", campaign.acts),
    ):
        print(
            f"{what}: {sum(counts.values())},",
            ", ".join(f"{n} {name}" for name, n in sorted(counts.items())),
        )
    print(f"frames that a crash left behind, and that were taken back: {campaign.left_behind}")


if __name__ == "__main__":
    sys.exit(main())

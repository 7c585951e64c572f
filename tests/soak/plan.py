"""Seeds, and what follows from them. Each act of each life of each slot has a generator of its own.

So an act draws the same numbers whatever became of the acts before it, which depends on scheduling.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

SLOTS = 8
SERVICES = tuple(f"service-{slot}" for slot in range(SLOTS))
BALANCERS = tuple(f"balancer-{slot}" for slot in range(SLOTS))

MEAN_ACTS = 60  # of a life that ends by itself
LONGEST_DELAY_NS = 500_000  # from the begin of an operation to the signal


def chance(*path: object) -> random.Random:
    """Return the generator that belongs to a place in the campaign."""
    return random.Random("/".join(map(str, path)))


@dataclasses.dataclass(frozen=True)
class Life:
    """What is settled about one process of one slot before it starts."""

    seed: int  # of the round
    slot: int
    number: int
    options: dict[str, Any]  # for attach
    serves: bool
    balances: tuple[str, ...]  # names of services, for a forwarder
    last_act: int  # none when negative
    delay_ns: (
        int | None
    )  # from the begin of an operation in that act to SIGKILL; None: it leaves in order
    rushes: bool  # the last act is one operation again and again

    def chance(self, act: int) -> random.Random:
        """Return the generator of one act."""
        return chance(self.seed, self.slot, self.number, act)


def life(seed: int, slot: int, number: int) -> Life:
    """Return the plan of a life."""
    rng = chance(seed, slot, number, "life")
    batch = rng.choice((2, 16, 64))
    options = {
        "low": rng.choice((0, 0, 1, 8)),
        "high": rng.choice((0, 4 * batch)),
        "batch": batch,
        "copy_around": rng.choice((1, 8, 512)),
        "strict": rng.random() < 0.2,
        "reads_allocate": rng.random() < 0.1,
        "deadline": 60.0,
    }
    others = [name for number, name in enumerate(SERVICES) if number != slot]
    ends = rng.random()
    return Life(
        seed=seed,
        slot=slot,
        number=number,
        options=options,
        serves=rng.random() < 0.8,
        balances=tuple(rng.sample(others, 3)) if rng.random() < 0.3 else (),
        last_act=int(rng.expovariate(1 / MEAN_ACTS)) if ends < 0.7 else -1,
        delay_ns=rng.randrange(1, LONGEST_DELAY_NS) if ends < 0.6 else None,
        rushes=rng.random() < 0.8,
    )

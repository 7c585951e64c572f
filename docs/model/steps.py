"""The table of steps. One step is one atomic store or compare-and-swap, or a look that decides.

A step marked local touches nothing but what its own process and, after that process has died, its
recovery look at: an intent record, a page table, registers. See explore.py for what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable

from .state import World

Step = Callable[[World, int], str]
"""Do it to this world for this host; the name of the next step, "" at the end of the operation."""

NAMES: list[str] = [""]
NUMBERS: dict[str, int] = {"": 0}
STEPS: list[Step] = [lambda _world, _host: ""]
TEXTS: list[str] = ["idle"]
LOCAL: list[bool] = [False]


def step(name: str, local: bool = False) -> Callable[[Step], Step]:
    """Enter a function in the table; its docstring is what a trace prints."""

    def enter(function: Step) -> Step:
        NUMBERS[name] = len(NAMES)
        NAMES.append(name)
        STEPS.append(function)
        TEXTS.append((function.__doc__ or name).strip().splitlines()[0].rstrip("."))
        LOCAL.append(local)
        return function

    return enter

"""What a campaign has come to: where how many died, and what that left for the scrubber."""

from __future__ import annotations

import collections

from dmrpc_cxl._native import CRASH_POINTS


class Tally:
    """Deaths of one run of the tests."""

    def __init__(self) -> None:
        self.deaths: collections.Counter[tuple[str, str]] = collections.Counter()
        self.leaks: collections.Counter[int] = collections.Counter()

    def died(self, role: str, label: str, leaks: int) -> None:
        self.deaths[role, label] += 1
        self.leaks[leaks] += 1

    def said(self) -> str:
        """Return the figures in a few lines."""
        labels = {label for _, label in self.deaths}
        roles = collections.Counter(role for role, _ in self.deaths.elements())
        lines = [f"{len(labels)} of {len(CRASH_POINTS)} labels, {self.deaths.total()} deaths"]
        lines += [f"  {role}: {number}" for role, number in roles.items()]
        left = ", ".join(f"{leaks} after {n}" for leaks, n in sorted(self.leaks.items()))
        lines.append(f"frames with a count too many that were left for the scrubber: {left}")
        return "\n".join(lines)

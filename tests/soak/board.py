"""Words in a file that the driver and all hosts have mapped: aligned, eight bytes, each with one writer.

phase           the driver's: at work or at rest
life            of a slot, the driver's: which of its processes this is
disturbed       of a slot, the driver's: how often a process there was killed, stopped, or went
acts            of a slot, its host's: how far it has come
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from .plan import SLOTS

WORK, REST = 0, 1
_LIFE, _DISTURBED, _ACTS = range(3)


class Board:
    """The words."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 4096)
            self._words = memoryview(mmap.mmap(fd, 4096)).cast("Q")
        finally:
            os.close(fd)

    @property
    def phase(self) -> int:
        return self._words[0]

    @phase.setter
    def phase(self, phase: int) -> None:
        self._words[0] = phase

    @staticmethod
    def _at(slot: int, field: int) -> int:
        assert 0 <= slot < SLOTS
        return 8 * (1 + slot) + field

    def life(self, slot: int) -> int:
        return self._words[self._at(slot, _LIFE)]

    def set_life(self, slot: int, number: int) -> None:
        self._words[self._at(slot, _LIFE)] = number

    def disturbed(self, slot: int) -> int:
        return self._words[self._at(slot, _DISTURBED)]

    def disturb(self, slot: int) -> None:
        self._words[self._at(slot, _DISTURBED)] += 1

    def acts(self, slot: int) -> int:
        return self._words[self._at(slot, _ACTS)]

    def count_act(self, slot: int) -> None:
        self._words[self._at(slot, _ACTS)] += 1

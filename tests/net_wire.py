"""Requests to a memory server by hand, and a shard that is spoken to without sockets."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from dmrpc_net._native import COUNTERS, WIRE, Shard

OPS: dict[str, int] = WIRE["ops"]
STATUS = {number: name for name, number in WIRE["status"].items()}
FLAGS: dict[str, int] = WIRE["flags"]
HELLO, WELCOME, REQUEST, ANSWER, AUDIT = (
    struct.Struct(WIRE["structs"][name][0])
    for name in ("hello", "welcome", "request", "answer", "audit")
)
_AUDIT_NAMES = WIRE["structs"]["audit"][1]
PAGE = 4096


class Answer(NamedTuple):
    status: str
    a: int
    b: int
    payload: bytes
    id: int


def request(
    op: str, id: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0,
    *, payload: bytes = b"", flags: int = 0, oldest: int | None = None,
) -> bytes:  # fmt: skip
    """Write a request; nothing before it is without answer, unless oldest says so."""
    head = REQUEST.pack(
        len(payload), OPS[op], flags, 0, id, id if oldest is None else oldest, a, b, c, d
    )
    return head + payload


def answers(data: bytes) -> list[Answer]:
    """Read all answers; the bytes must be whole ones."""
    found = []
    while data:
        length, status, _op, id, a, b = ANSWER.unpack_from(data)
        payload = data[ANSWER.size : ANSWER.size + length]
        assert len(payload) == length, "an answer is cut off"
        found.append(Answer(STATUS[status], a, b, payload, id))
        data = data[ANSWER.size + length :]
    return found


class Spoken:
    """A shard, and processes that ask it one thing after the other."""

    def __init__(self, pages: int = 64, **limits: Any) -> None:
        self.shard = Shard(pages, **limits)
        self.ids: dict[int, int] = {}

    def connect(self, pid: int) -> None:
        self.shard.connect(pid)
        self.ids.setdefault(pid, 0)

    def depart(self, pid: int) -> None:
        self.shard.depart(pid)
        self.ids.pop(pid, None)

    def next_id(self, pid: int) -> int:
        if pid not in self.ids:
            self.connect(pid)
        self.ids[pid] += 1
        return self.ids[pid]

    def ask(self, pid: int, op: str, *args: int, payload: bytes = b"", flags: int = 0) -> Answer:
        """Ask, and return the answer."""
        id = self.next_id(pid)
        data, broken = self.shard.feed(pid, request(op, id, *args, payload=payload, flags=flags))
        (answer,) = answers(data)
        assert not broken
        assert answer.id == id
        return answer

    def stats(self, pid: int) -> dict[str, int]:
        numbers = struct.unpack(f"<{len(COUNTERS)}Q", self.ask(pid, "STATS").payload)
        return {name: number for (name, _), number in zip(COUNTERS, numbers, strict=True)}

    def audit(self, pid: int) -> dict[str, int]:
        found = dict(zip(_AUDIT_NAMES, AUDIT.unpack(self.ask(pid, "AUDIT").payload), strict=True))
        assert found["nr_violations"] == 0, found
        assert found["nr_free"] + found["in_use"] == found["nr_pages"], found
        return found

    def finish(self) -> None:
        """End all processes; everything has to be free then."""
        for pid in list(self.ids):
            self.depart(pid)
        found = self.audit(999_999)
        assert found["nr_free"] == found["nr_pages"], found
        assert found["nr_refs"] == found["nr_ranges"] == 0, found
        self.depart(999_999)

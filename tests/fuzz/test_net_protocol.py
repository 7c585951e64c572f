"""Anything at all, sent to a shard of a memory server: it answers, waits or ends the connection, and loses no page."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.net_wire import OPS, PAGE, REQUEST, Spoken, answers, request

ids = st.integers(0, 12)
numbers = st.one_of(
    st.integers(0, 12),
    st.integers(0, 20 * PAGE),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**64 - 1, 2**63, 2**46, 1 << 41, PAGE, PAGE - 1]),
)
# What answers brought: addresses and keys that mean something.
learned = st.integers(-8, -1)
arguments = st.one_of(numbers, learned)


@st.composite
def requests(draw):
    """Mostly well-formed ones, about things that exist."""
    op = draw(st.sampled_from(sorted(OPS)))
    payload = draw(st.integers(1, 6 * PAGE)) if op in ("RWRITE", "PUT") else 0
    if draw(st.integers(0, 30)) == 0:
        payload = draw(st.integers(0, 2**32 - 1))
    return (
        payload,
        OPS[op] if draw(st.integers(0, 30)) else draw(st.integers(0, 255)),
        draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32])) if draw(st.booleans()) else 0,
        0 if draw(st.integers(0, 50)) else draw(st.integers(0, 65535)),
        draw(ids),
        draw(st.integers(0, 3)),
        *(draw(arguments) for _ in range(4)),
    )


streams = st.lists(
    st.tuples(st.sampled_from([1, 2, 3]), st.one_of(requests(), st.binary(max_size=200))),
    max_size=25,
)


@given(stream=streams, window=st.integers(1, 9000), connects=st.sets(st.integers(0, 24)))
@settings(max_examples=200)
def test_anything_a_client_sends_is_answered_or_ends_its_connection(stream, window, connects):
    spoken = Spoken(40, max_outstanding=16, max_count=4, max_pages=60, max_virtual=100)
    known = [0] * 8
    last = {1: 0, 2: 0, 3: 0}
    broken = dict.fromkeys(last, False)
    for pid in last:
        spoken.connect(pid)
    for turn, (pid, what) in enumerate(stream):
        if turn in connects or broken[pid]:
            spoken.connect(pid)
            broken[pid] = False
        if isinstance(what, bytes):
            data = what
        else:
            payload, op, flags, reserved, step, back, *args = what
            id = max(0, last[pid] + step - 3)
            last[pid] = max(last[pid], id)
            args = [known[-arg - 1] if arg < 0 else arg for arg in args]
            data = REQUEST.pack(payload, op, flags, reserved, id, max(0, id - back), *args)
            data += bytes([turn + 1]) * min(payload, 7 * PAGE)
        out, broken[pid] = spoken.shard.feed(pid, data, window)
        for answer in answers(out):
            if answer.status == "OK":
                known = [answer.a, answer.b, *known[:6]]
    check = Checker(spoken)
    check.audit()
    for pid in last:
        spoken.shard.depart(pid)
    check.all_free()


class Checker:
    """A process that has done nothing wrong."""

    def __init__(self, spoken: Spoken) -> None:
        self.spoken = spoken
        spoken.connect(77)

    def audit(self) -> dict[str, int]:
        return self.spoken.audit(77)

    def all_free(self) -> None:
        found = self.audit()
        assert found["nr_free"] == found["nr_pages"]
        assert found["nr_refs"] == found["nr_ranges"] == 0
        address = self.spoken.ask(77, "RALLOC", 30 * PAGE).a
        assert self.spoken.ask(77, "RREAD", address, 30 * PAGE).payload == bytes(30 * PAGE)


@given(data=st.binary(max_size=4000), cuts=st.lists(st.integers(1, 500), max_size=20))
@settings(max_examples=200)
def test_bytes_that_mean_nothing_end_a_connection_or_wait_for_more(data, cuts):
    spoken = Spoken(8)
    spoken.connect(1)
    broken = False
    for cut in cuts:
        out, broken = spoken.shard.feed(1, data[:cut])
        assert len(out) == 32 * len(answers(out)) or answers(out)
        data = data[cut:]
        if broken:
            break
    if not broken:
        spoken.shard.feed(1, data)
    Checker(spoken).audit()


@given(
    lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=8),
    windows=st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
)
@settings(max_examples=100)
def test_however_a_stream_is_cut_its_answers_are_the_same(lengths, windows):
    found = []
    for window in [1 << 30, *windows]:
        spoken = Spoken(200)
        spoken.connect(1)
        stream, id = request("RALLOC", 1, 64 * PAGE), 1
        address = answers(spoken.shard.feed(1, stream)[0])[0].a
        stream = b""
        for length in lengths:
            stream += request(
                "RWRITE",
                id + 1,
                address + length % 5000,
                payload=bytes([length % 255 + 1]) * length,
            )
            stream += request("RREAD", id + 2, address, 40_000)
            id += 2
        found.append(answers(spoken.shard.feed(1, stream, window)[0]))
    assert all(one == found[0] for one in found[1:])

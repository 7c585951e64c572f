"""The protocol of a memory server without sockets: what is carried out, what is not carried out twice, what ends a connection."""

from __future__ import annotations

import pytest

from tests.net_wire import ANSWER, FLAGS, OPS, PAGE, REQUEST, Spoken, answers, request


@pytest.fixture
def spoken():
    spoken = Spoken(64, keep_ms=1000, max_outstanding=16)
    spoken.connect(1)
    yield spoken
    spoken.finish()


def again(spoken: Spoken, pid: int, *requests: bytes):
    """Send requests on a new connection of the process."""
    spoken.shard.connect(pid)
    data, broken = spoken.shard.feed(pid, b"".join(requests))
    assert not broken
    return answers(data)


# ---------------------------------------------------------------- the same request again


@pytest.mark.parametrize(
    ("op", "args", "more"),
    [
        ("RALLOC", (PAGE,), {}),
        ("PUT", (), {"payload": b"x" * 5000}),
        ("PUT", (), {"payload": b"x" * 5000, "flags": FLAGS["KEEP"]}),
        ("RFREE", (0,), {}),
        ("RALLOC", (0,), {}),
    ],
)
def test_a_change_that_comes_again_is_answered_as_before_and_not_made_again(spoken, op, args, more):
    ask = request(op, 1, *args, **more)
    (first,) = answers(spoken.shard.feed(1, ask)[0])
    for _ in range(3):
        assert again(spoken, 1, ask) == [first]
    spoken.ids[1] = 1
    found = spoken.audit(2)
    assert found["nr_ranges"] + found["nr_refs"] == (first.a != 0) + (first.b != 0)


def test_a_ref_is_consumed_once_by_a_map_that_comes_again(spoken):
    key = spoken.ask(1, "PUT", payload=b"x" * 10).a
    ask = request("MAP_REF", 1, key, 10)
    spoken.connect(2)
    (first,) = answers(spoken.shard.feed(2, ask)[0])
    assert again(spoken, 2, ask) == [first]
    assert spoken.ask(1, "MAP_REF", key, 10).status == "REF_CONSUMED"


def test_what_was_got_is_there_until_its_arrival_is_confirmed(spoken):
    key = spoken.ask(1, "PUT", payload=b"x" * 100_000).a
    ask = request("GET", 1, key, 100_000, 0, 100_000)
    spoken.connect(2)
    (first,) = answers(spoken.shard.feed(2, ask)[0])
    assert first.payload == b"x" * 100_000
    assert again(spoken, 2, ask, ask) == [first, first]
    assert spoken.audit(3)["delivered_pages"] == 25
    assert spoken.ask(1, "GET", key, 100_000, 0, 10).status == "REF_CONSUMED"
    spoken.shard.feed(2, request("PING", 2, oldest=2))  # 1 is not without answer any more
    assert spoken.audit(3)["delivered_pages"] == 0
    assert again(spoken, 2, ask)[0].status == "ANSWER_LOST"


def test_what_was_got_is_not_kept_for_ever(spoken):
    key = spoken.ask(1, "PUT", payload=b"x" * 100_000).a
    ask = request("GET", 1, key, 100_000, 0, 100_000)
    spoken.connect(2)
    spoken.shard.feed(2, ask)
    spoken.shard.expire(0.5)
    assert spoken.audit(3)["delivered_pages"] == 25
    spoken.shard.expire(1.5)
    assert spoken.audit(3)["delivered_pages"] == 0
    assert again(spoken, 2, ask)[0].status == "ANSWER_LOST"


def test_what_is_being_sent_is_not_freed_whatever_others_do(spoken):
    """A large answer leaves in pieces; meanwhile the Ref's holder drops it, and others write to fresh pages."""
    key = spoken.ask(1, "PUT", payload=b"x" * 30 * PAGE).a
    for flags in (FLAGS["KEEP"], 0):
        spoken.connect(2)
        id = spoken.next_id(2)
        ask = request("GET", id, key, 30 * PAGE, 0, 30 * PAGE, flags=flags)
        (answer,) = answers(spoken.shard.feed(2, ask, 1000)[0])
        assert answer.payload == b"x" * 30 * PAGE


def test_a_read_is_repeated_unless_its_range_was_changed_since(spoken):
    mine, other = (spoken.ask(1, "RALLOC", PAGE).a for _ in range(2))
    read = request("RREAD", 10, mine, 4, oldest=3)
    (first,) = answers(spoken.shard.feed(1, read)[0])
    spoken.shard.feed(1, request("RWRITE", 11, other, payload=b"other", oldest=10))
    assert again(spoken, 1, read) == [first]
    write = request("RWRITE", 12, mine, payload=b"new!", oldest=10)
    spoken.shard.feed(1, write)
    assert again(spoken, 1, read)[0].status == "ANSWER_LOST"
    assert again(spoken, 1, write)[0].status == "OK"
    free = request("RFREE", 13, mine, oldest=12)
    read = request("RREAD", 12 + 2, other, 4, oldest=12)
    spoken.shard.feed(1, free + read)
    assert [answer.status for answer in again(spoken, 1, free, read)] == ["OK", "OK"]
    spoken.ids[1] = 20


def test_a_read_of_a_range_that_was_freed_since_is_not_repeated(spoken):
    mine = spoken.ask(1, "RALLOC", PAGE).a
    read, free = request("RREAD", 2, mine, 4), request("RFREE", 3, mine, oldest=2)
    spoken.shard.feed(1, read + free)
    assert [answer.status for answer in again(spoken, 1, read, free)] == ["ANSWER_LOST", "OK"]
    spoken.ids[1] = 20


def test_a_write_that_came_in_part_is_not_carried_out_and_can_come_again(spoken):
    mine = spoken.ask(1, "RALLOC", 10 * PAGE).a
    write = request("RWRITE", 2, mine + 5, payload=b"y" * 9 * PAGE)
    for cut in (10, REQUEST.size, REQUEST.size + 1, 3000, 5 * PAGE, len(write) - 1):
        spoken.shard.connect(1)
        assert spoken.shard.feed(1, write[:cut]) == (b"", False)
        spoken.shard.connect(1)
        found = answers(spoken.shard.feed(1, request("RREAD", 1, mine, 10 * PAGE))[0])
        assert found[0].payload == bytes(10 * PAGE)
    assert again(spoken, 1, write)[0].status == "OK"
    spoken.ids[1] = 2
    assert spoken.ask(1, "RREAD", mine, 10 * PAGE).payload == bytes(5) + b"y" * 9 * PAGE + bytes(
        PAGE - 5
    )


def test_bytes_may_come_in_any_pieces(spoken):
    mine = spoken.ask(1, "RALLOC", 10 * PAGE).a
    for window in (1, 7, 55, 56, 57, 4096, 20_000):
        id = spoken.next_id(1)
        data = bytes([window % 251]) * (7 * PAGE)
        stream = request("RWRITE", id, mine + 9, payload=data)
        stream += request("RREAD", id + 1, mine + 9, 7 * PAGE) + request("PING", id + 2)
        spoken.ids[1] += 2
        found = answers(spoken.shard.feed(1, stream, window)[0])
        assert [answer.status for answer in found] == ["OK"] * 3
        assert found[1].payload == data


# ---------------------------------------------------------------- giving back


def test_undo_gives_back_what_a_request_got_and_only_once(spoken):
    kept = spoken.ask(1, "RALLOC", PAGE).a
    for op, args, payload in (
        ("RALLOC", (PAGE,), b""),
        ("PUT", (), b"x"),
        ("CREATE_REF", (kept, 5), b""),
    ):
        id = spoken.next_id(1)
        spoken.shard.feed(1, request(op, id, *args, payload=payload, oldest=id))
        for _ in range(2):
            undo = request("UNDO", spoken.next_id(1), id, oldest=id)
            assert answers(spoken.shard.feed(1, undo)[0])[0].status == "OK"
    found = spoken.audit(2)
    assert (found["nr_ranges"], found["nr_refs"]) == (1, 0)


def test_undo_of_what_was_not_carried_out_does_nothing(spoken):
    kept = spoken.ask(1, "RALLOC", PAGE).a
    assert spoken.ask(1, "UNDO", 12345).status == "OK"
    assert spoken.ask(1, "RREAD", kept, 1).status == "OK"


# ---------------------------------------------------------------- what breaks the protocol


def header(**changes: int) -> bytes:
    fields = {
        "payload": 0, "op": OPS["PING"], "flags": 0, "reserved": 0, "id": 1, "oldest": 1,
        "a": 0, "b": 0, "c": 0, "d": 0,
    }  # fmt: skip
    return REQUEST.pack(*(fields | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"op": 0},
        {"op": max(OPS.values()) + 1},
        {"op": 255},
        {"flags": 1},
        {"flags": 128},
        {"op": OPS["MAP_REF"], "flags": FLAGS["KEEP"]},
        {"reserved": 1},
        {"id": 0, "oldest": 0},
        {"oldest": 2},
        {"payload": 1},
        {"op": OPS["RWRITE"], "payload": 0},
        {"op": OPS["PUT"], "payload": 0},
        {"op": OPS["PUT"], "payload": (1 << 30) + 1},
        {"op": OPS["RWRITE"], "payload": 2**32 - 1},
    ],
    ids=str,
)
def test_a_malformed_request_ends_its_connection(spoken, changes):
    data, broken = spoken.shard.feed(1, header(**changes))
    assert broken
    assert answers(data)[0].status == "BAD_REQUEST"
    assert spoken.shard.feed(1, header()) == (b"", True)  # nothing is listened to any more
    spoken.connect(1)
    assert spoken.ask(1, "PING").status == "OK"


def test_a_repeated_id_with_another_operation_ends_the_connection(spoken):
    spoken.shard.feed(1, request("RALLOC", 1, PAGE))
    data, broken = spoken.shard.feed(1, request("RFREE", 1, 0))
    assert broken
    assert answers(data)[0].status == "BAD_REQUEST"


def test_more_answers_than_agreed_are_not_kept(spoken):
    for id in range(1, 17):
        spoken.shard.feed(1, request("RALLOC", id, 1, oldest=1))
    data, broken = spoken.shard.feed(1, request("RALLOC", 17, 1, oldest=1))
    assert broken
    assert answers(data)[0].status == "BAD_REQUEST"
    assert spoken.audit(2)["nr_ranges"] == 16


def test_an_answer_repeats_what_it_answers(spoken):
    data, _ = spoken.shard.feed(1, request("PING", 77))
    assert ANSWER.unpack(data) == (0, 0, OPS["PING"], 77, 0, 0)


# ---------------------------------------------------------------- quotas


def test_a_process_holds_no_more_than_it_may():
    spoken = Spoken(64, max_pages=10, max_refs=3, max_ranges=4, max_virtual=40)
    mine = spoken.ask(1, "RALLOC", 20 * PAGE).a
    assert spoken.ask(1, "RALLOC", 21 * PAGE).status == "OVER_QUOTA"
    assert spoken.ask(1, "RWRITE", mine, payload=b"x" * 10 * PAGE).status == "OK"
    for op, args, payload in (
        ("RWRITE", (mine + 10 * PAGE,), b"x"),
        ("CREATE_REF", (mine, PAGE), b""),
        ("PUT", (), b"x"),
    ):
        assert spoken.ask(1, op, *args, payload=payload).status == "OVER_QUOTA"
    spoken.ask(1, "RFREE", mine)
    refs = [spoken.ask(1, "PUT", payload=b"x").a for _ in range(3)]
    assert spoken.ask(1, "PUT", payload=b"x").status == "OVER_QUOTA"
    assert spoken.ask(1, "CLONE_REF", refs[0], 1).status == "OVER_QUOTA"
    ranges = [spoken.ask(1, "RALLOC", 1).status for _ in range(5)]
    assert ranges == ["OK"] * 4 + ["OVER_QUOTA"]
    assert spoken.ask(1, "MAP_REF", refs[0], 1).status == "OVER_QUOTA"
    others = [spoken.ask(2, "PUT", payload=b"y" * 4 * PAGE).a for _ in range(2)]
    assert spoken.ask(1, "ACCEPT_REF", others[0], 4 * PAGE).status == "OVER_QUOTA"
    assert spoken.ask(1, "DROP_REF", refs[0], 1).a == 1
    assert spoken.ask(1, "ACCEPT_REF", others[0], 4 * PAGE).status == "OK"
    spoken.ask(1, "DROP_REF", refs[1], 1)
    assert spoken.ask(1, "ACCEPT_REF", others[1], 4 * PAGE).status == "OK"  # 1 + 4 + 4 pages
    spoken.finish()


def test_a_shard_has_as_many_refs_as_it_may():
    spoken = Spoken(64, max_ref_slots=5)
    keys = [spoken.ask(1, "PUT", payload=b"x") for _ in range(6)]
    assert [answer.status for answer in keys] == ["OK"] * 5 + ["NO_REF_SLOT"]
    assert spoken.audit(2)["in_use"] == 5
    spoken.finish()

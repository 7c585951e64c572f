"""The model of slower memory: what is charged, and that nothing is when it is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.latency import Latency, extra_nanoseconds
from tests.fabrics import At, Fabric, HostProcess
from tests.standing import Standing

PAGE = 4096
LINES = PAGE // 64
REF_LINES = 2


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    fabric = Standing({}, {"copy_around": 1})
    yield fabric
    fabric.close()


@pytest.fixture
def hosts(standing: Standing) -> Iterator[list[HostProcess]]:
    """Give a host and one whose faults copy one page; either emulates what tests before have asked for."""
    with standing.use() as (_, hosts):
        yield hosts


def model(at: At) -> dict[str, Any]:
    found = at.host.latency
    assert at.host.emulates_latency == (found is not None)
    return {} if found is None else dataclasses.asdict(found)


def share(at: At, pages: int) -> bytes:
    at.array = at.host.empty(pages * PAGE, "u1")
    at.array[:] = 1
    return at.host.create_ref(at.array).to_bytes()


def share_counted(at: At, pages: int) -> tuple[int, int]:
    """Return the lines that sharing charges, and the number of the first frame."""
    at.array = at.host.empty(pages * PAGE, "u1")
    before = counts_of(at)["lines_alone"]
    ref = at.host.create_ref(at.array)
    lines = counts_of(at)["lines_alone"] - before
    ref.drop()
    first = (at.array.__array_interface__["data"][0] // PAGE) % 8
    return lines, first


def store(at: At, wire: bytes, pages: int) -> tuple[int, int]:
    """Store to pages of a Ref; return the lines that copying charged, and the frames copied."""
    at.view = at.host.map_ref(wire).numpy()
    before, copied = counts_of(at)["lines_copied"], at.host.stats()["frames_copied"]
    for page in range(pages):
        at.view[page * PAGE] = 2
    copied = at.host.stats()["frames_copied"] - copied
    return counts_of(at)["lines_copied"] - before, copied


def charge(at: At, nbytes: int) -> dict[str, int]:
    """Charge bytes; return by how much the counts have grown."""
    before = at.host._latency_counts()
    at.host.charge(nbytes)
    after = at.host._latency_counts()
    return {name: after[name] - before[name] for name in ("owed_ns", "waited_ns", "waits")}


def emulate(at: At, latency: str | None, overlap: int = 1) -> None:
    at.host.emulate_latency(latency, overlap=overlap)


def test_without_being_asked_for_nothing_is_charged(fabric: Fabric) -> None:
    creator, mapper = fabric.host(), fabric.host()
    wire = creator.call(share, 8)
    mapper.call(map_and_free, wire)
    for host in (creator, mapper):
        assert host.call(model) == {}
        counts = host.call(counts_of)
        assert not any(counts[name] for name in counts if name != "overlap"), counts


def map_and_free(at: At, wire: bytes) -> None:
    buffer = at.host.map_ref(wire)
    buffer.numpy()[0] = 3
    buffer.free()
    at.host.charge(1 << 20)


def counts_of(at: At) -> dict[str, Any]:
    return at.host._latency_counts()


@pytest.mark.parametrize("pages", [1, 3])
def test_a_copied_page_charges_the_lines_that_are_read_and_written(
    hosts: list[HostProcess], pages: int
) -> None:
    creator, mapper = hosts
    mapper.call(emulate, "+1ns")
    assert mapper.call(store, creator.call(share, 4), pages) == (2 * LINES * pages, pages)


def test_sharing_charges_the_lines_of_its_frame_words_and_of_its_ref(
    hosts: list[HostProcess],
) -> None:
    hosts[0].call(emulate, "+1ns")
    lines, first = hosts[0].call(share_counted, 64)
    words = 8 if first == 0 else 9  # eight frame words are one line
    assert lines == words + REF_LINES


def test_zeroed_memory_charges_its_lines_once(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+1ns")
    assert hosts[0].call(zero, 5) == 5 * LINES


def zero(at: At, pages: int) -> int:
    before = counts_of(at)["lines_copied"]
    at.host.ralloc(pages * PAGE).free()
    return counts_of(at)["lines_copied"] - before


def test_what_is_owed_is_spun(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+100ns")
    found = hosts[0].call(charge, 64 * 1000)
    assert found["owed_ns"] == 100_000
    assert found["waits"] == 1
    assert found["waited_ns"] > 90_000  # charging itself is a part of it


def test_lines_of_a_copy_overlap(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+100ns", 8)
    assert hosts[0].call(charge, 64 * 1000)["owed_ns"] == 100_000 // 8


def test_little_is_put_off_until_a_wait_is_worth_it(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+100ns")
    found = hosts[0].call(charge, 64)
    assert (found["owed_ns"], found["waits"]) == (100, 0)


def test_what_is_no_slower_than_this_machine_takes_no_longer(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+0ns")
    assert hosts[0].call(charge, 1 << 20)["owed_ns"] == 0


def test_it_can_be_turned_off_again(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+100ns")
    hosts[0].call(emulate, None)
    assert hosts[0].call(model) == {}
    assert hosts[0].call(charge, 1 << 20)["owed_ns"] == 0


def test_the_model_tells_its_own_error(hosts: list[HostProcess]) -> None:
    hosts[0].call(emulate, "+1us")
    found = hosts[0].call(model)
    assert found["local_ns"] > 0
    assert -0.2 < found["error"] < 0.5
    assert "error" in str(Latency(**found))


@pytest.mark.parametrize("wrong", ["265", "fast", "-3ns", "0ns", "200us", 0, -1.0, ""])
def test_what_is_no_latency_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="latency"):
        extra_nanoseconds(wrong)


def test_a_host_is_attached_with_a_latency_or_not_at_all(fabric: Fabric) -> None:
    found = fabric.host(latency="+50ns", latency_overlap=2).call(model)
    assert (found["asked"], found["extra_ns"], found["overlap"]) == ("+50ns", 50, 2)
    with pytest.raises(ValueError, match="latency"):
        fabric.host(latency="slow")


def test_a_difference_is_taken_as_it_is_and_a_latency_above_this_machines() -> None:
    assert extra_nanoseconds("+1.5us") == 1500
    assert 0 < extra_nanoseconds("100us") < 100_000
    assert extra_nanoseconds(1) == 0


def test_data_that_was_stored_is_the_same_under_the_model(hosts: list[HostProcess]) -> None:
    creator, mapper = hosts
    for host in hosts:
        host.call(emulate, "+200ns")
    mapper.call(store, creator.call(share, 16), 16)
    assert mapper.call(sums) == 16 * 2 + 16 * (PAGE - 1)
    assert creator.call(sums) == 16 * PAGE


def sums(at: At) -> int:
    return int(np.asarray(getattr(at, "view", None) if hasattr(at, "view") else at.array).sum())

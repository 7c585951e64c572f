"""Counts when a holder dies (SIGKILL), exits without a word, or detaches: at each stage of a Ref's life.

A Ref belongs to its creator until somebody accepts or maps it. What a process held alone comes
back, what others hold stays.
"""

import os
import signal

import pytest

from dmrpc_cxl.errors import RefConsumed
from tests.crews import Crew, Member
from tests.fabrics import At, Fabric

ENDS = ["killed", "exits"]


def stop_without_a_word(at: At) -> None:
    os._exit(0)


def end(crew: Crew, member: Member, how: str) -> None:
    """End a host's process, and wait until what it held is back."""
    if how == "killed":
        member.kill()
    else:
        member.start(stop_without_a_word)
        assert member.process.expect_death() == 0
    crew.wait_until_reclaimed(member)
    crew.sound(in_flight=0)


@pytest.fixture
def made(crew: Crew) -> int:
    """A page that host 0 made; its frame."""
    crew[0].ralloc("page", crew.page_size)
    crew[0].write("page", b"made")
    return int(crew[0].frames("page")[0])


@pytest.mark.parametrize("how", ENDS)
def test_a_ref_that_nobody_accepted_dies_with_its_creator(crew: Crew, made: int, how: str) -> None:
    creator, receiver = crew[:2]
    wire = creator.create_ref("page")
    end(crew, creator, how)
    assert crew.counts([made]) == [0]
    crew.sound(in_use=0, live_refs=0)
    for use in (receiver.accept, receiver.clone, lambda wire: receiver.map_ref("page", wire)):
        with pytest.raises(RefConsumed):
            use(wire)
    assert not receiver.drop(wire)


@pytest.mark.parametrize("how", ENDS)
def test_an_accepted_ref_survives_its_creator(crew: Crew, made: int, how: str) -> None:
    creator, receiver = crew[:2]
    wire = receiver.accept(creator.create_ref("page"))
    assert crew.counts([made]) == [2]
    end(crew, creator, how)
    assert crew.counts([made]) == [1]
    receiver.map_ref("page", wire)
    assert receiver.read("page", 4) == b"made"
    with receiver.counting() as added:
        receiver.write("page", b"mine")
    assert (receiver.frames("page"), added["frames_copied"]) == ([made], 0)
    receiver.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_an_accepted_ref_dies_with_who_accepted_it(crew: Crew, made: int, how: str) -> None:
    creator, receiver, stranger = crew[:3]
    wire = receiver.accept(creator.create_ref("page"))
    end(crew, receiver, how)
    assert crew.counts([made]) == [1]
    with pytest.raises(RefConsumed):
        stranger.map_ref("page", wire)
    assert creator.read("page", 4) == b"made"
    creator.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_a_mapper_that_dies_gives_its_count_back(crew: Crew, made: int, how: str) -> None:
    creator, mapper = crew[:2]
    mapper.map_ref("page", creator.create_ref("page"))
    assert crew.counts([made]) == [2]
    end(crew, mapper, how)
    assert crew.counts([made]) == [1]
    with creator.counting() as added:
        creator.write("page", b"more")
    assert (creator.frames("page"), added["frames_copied"]) == ([made], 0)
    creator.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_a_mapper_that_dies_after_its_write_loses_only_its_copy(
    crew: Crew, made: int, how: str
) -> None:
    creator, mapper = crew[:2]
    mapper.map_ref("page", creator.create_ref("page"))
    mapper.write("page", b"mine")
    [copy] = mapper.frames("page")
    assert crew.counts([made, copy]) == [1, 1]
    end(crew, mapper, how)
    assert crew.counts([made, copy]) == [1, 0]
    assert creator.read("page", 4) == b"made"
    creator.rfree("page")
    assert crew.counts([made, copy]) == [0, 0]


@pytest.mark.parametrize("how", ENDS)
def test_a_mapping_survives_the_creator_of_its_ref(crew: Crew, made: int, how: str) -> None:
    creator, mapper = crew[:2]
    mapper.map_ref("page", creator.create_ref("page"))
    end(crew, creator, how)
    assert crew.counts([made]) == [1]
    assert mapper.read("page", 4) == b"made"
    mapper.write("page", b"mine")
    assert mapper.frames("page") == [made]
    mapper.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_both_sharers_may_die_in_either_order(crew: Crew, made: int, how: str) -> None:
    creator, mapper = crew[:2]
    mapper.map_ref("page", creator.create_ref("page"))
    mapper.write("page", b"mine")
    [copy] = mapper.frames("page")
    end(crew, creator, how)
    assert crew.counts([made, copy]) == [0, 1]
    assert mapper.read("page", 4) == b"mine"
    end(crew, mapper, how)
    assert crew.counts([made, copy]) == [0, 0]


@pytest.mark.parametrize("how", ENDS)
def test_a_clone_survives_the_death_of_the_other_ones_holder(
    crew: Crew, made: int, how: str
) -> None:
    creator, one, other = crew[:3]
    wire, copy = creator.clone(creator.create_ref("page"))
    wire, copy = one.accept(wire), other.accept(copy)
    creator.rfree("page")
    assert crew.counts([made]) == [2]
    end(crew, one, how)
    assert crew.counts([made]) == [1]
    other.map_ref("page", copy)
    assert other.read("page", 4) == b"made"
    other.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_the_middle_of_a_chain_may_die(crew: Crew, made: int, how: str) -> None:
    first, middle, last = crew[:3]
    middle.map_ref("page", first.create_ref("page"))
    last.map_ref("page", middle.create_ref("page"))
    assert crew.counts([made]) == [3]
    end(crew, middle, how)
    assert crew.counts([made]) == [2]
    last.write("page", b"last")
    assert crew.counts([made, *last.frames("page")]) == [1, 1]
    assert first.read("page", 4) == b"made"
    first.rfree("page")
    last.rfree("page")
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_a_moved_buffer_follows_the_holder_of_its_ref(crew: Crew, made: int, how: str) -> None:
    creator, one, other = crew[:3]
    wire = one.accept(creator.create_ref("page", move=True))
    end(crew, creator, how)
    assert crew.counts([made]) == [1]
    wire = other.accept(wire)
    end(crew, one, how)
    assert crew.counts([made]) == [1]
    other.map_ref("page", wire)
    assert other.read("page", 4) == b"made"
    end(crew, other, how)
    assert crew.counts([made]) == [0]


@pytest.mark.parametrize("how", ENDS)
def test_untouched_and_scattered_buffers_come_back_too(crew: Crew, how: str) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("lazy", 64 * crew.page_size, lazy=True)
    for page in range(0, 64, 2):
        creator.write("lazy", b"x", page * crew.page_size)
    mapper.map_ref("lazy", creator.create_ref("lazy"))
    unmapped = creator.create_ref("lazy")  # more runs than fit a Ref entry
    crew.sound(in_use=33, mapped_pages=64, hole_pages=64, overflow_frames=1, live_refs=1)
    end(crew, creator, how)
    crew.sound(in_use=32, mapped_pages=32, hole_pages=32, overflow_frames=0, live_refs=0)
    assert not mapper.drop(unmapped)
    end(crew, mapper, how)
    crew.sound(in_use=0, hole_pages=0)


# ---------------------------------------------------------------- leaving in order


def test_detaching_drops_what_was_not_accepted_and_leaves_what_was(fabric: Fabric) -> None:
    creator, receiver = (Member(fabric.host(copy_around=1)) for _ in range(2))
    for name in ("kept", "lost"):
        creator.ralloc(name, 4096)
        creator.write(name, name.encode())
    kept = receiver.accept(creator.create_ref("kept"))
    lost = creator.create_ref("lost")
    creator.process.leave()
    audit = fabric.assert_sound()
    assert (audit["in_use"], audit["live_refs"]) == (1, 1)
    with pytest.raises(RefConsumed):
        receiver.map_ref("lost", lost)
    receiver.map_ref("kept", kept)
    assert receiver.read("kept", 4) == b"kept"
    receiver.rfree("kept")


def test_a_stopped_holder_keeps_what_it_holds(crew: Crew, made: int) -> None:
    creator, mapper = crew[:2]
    mapper.map_ref("page", creator.create_ref("page"))
    os.kill(mapper.pid, signal.SIGSTOP)
    try:
        creator.write("page", b"more")
        assert crew.counts([made]) == [1]  # the stopped mapper's
        crew.sound(in_use=2)
    finally:
        os.kill(mapper.pid, signal.SIGCONT)
    assert mapper.read("page", 4) == b"made"
    mapper.rfree("page")
    creator.rfree("page")
    assert crew.counts([made]) == [0]

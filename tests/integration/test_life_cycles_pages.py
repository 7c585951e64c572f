"""Life cycles of buffers of many pages: each page has a count of its own.

Parts of buffers, buffers with holes, buffers in pieces, eager copies, and reserved frames.
"""

import pytest

from dmrpc_cxl.errors import BadAddress
from tests.crews import Crew

page_sizes = pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)
PAGES = 6


@page_sizes
def test_a_store_copies_the_page_it_hits_and_no_other(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", PAGES * crew.page_size)
    for page in range(PAGES):
        creator.write("buffer", b"%d" % page, page * crew.page_size)
    made = creator.frames("buffer")
    mapper.map_ref("buffer", creator.create_ref("buffer"))
    assert crew.counts(made) == [2] * PAGES
    with mapper.counting() as added:
        mapper.write("buffer", b"x", 3 * crew.page_size - 1)  # the last byte of page 2
        mapper.write("buffer", b"y", 4 * crew.page_size)  # the first of page 4
    shown = mapper.frames("buffer")
    assert [page for page in range(PAGES) if shown[page] != made[page]] == [2, 4]
    assert crew.counts(made) == [2, 2, 1, 2, 1, 2]
    assert crew.counts([shown[2], shown[4]]) == [1, 1]
    assert (added["frames_copied"], added["bytes_copied"]) == (2, 2 * crew.page_size)
    # A copied page has the rest of the old one.
    assert mapper.read("buffer", 1, 2 * crew.page_size) == b"2"
    assert mapper.read("buffer", 1, 4 * crew.page_size) == b"y"
    assert creator.read("buffer", 1, 4 * crew.page_size) == b"4"
    creator.rfree("buffer")
    assert crew.counts(made) == [1, 1, 0, 1, 0, 1]
    mapper.rfree("buffer")
    assert crew.counts([*made, *shown]) == [0] * 2 * PAGES


@page_sizes
def test_a_store_across_a_page_boundary_copies_both_pages(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", 3 * crew.page_size)
    made = creator.frames("buffer")
    mapper.map_ref("buffer", creator.create_ref("buffer"))
    mapper.write("buffer", b"across", crew.page_size - 3)
    shown = mapper.frames("buffer")
    assert crew.counts(made) == [1, 1, 2]
    assert shown[2] == made[2]
    assert not {*shown[:2]} & {*made}
    assert mapper.read("buffer", 6, crew.page_size - 3) == b"across"
    assert creator.read("buffer", 6, crew.page_size - 3) == bytes(6)
    creator.rfree("buffer")
    mapper.rfree("buffer")


@page_sizes
def test_a_ref_to_a_part_counts_the_pages_of_that_part(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", PAGES * crew.page_size)
    made = creator.frames("buffer")
    start = 2 * crew.page_size - 10
    wire = creator.create_ref("buffer", start, crew.page_size + 20)  # ends in page 3
    assert crew.counts(made) == [1, 2, 2, 2, 1, 1]
    creator.write("buffer", b"before", start - 6)  # same page, not in the Ref
    assert crew.counts(made) == [1, 1, 2, 2, 1, 1]
    mapper.map_ref("part", wire)
    assert mapper.frames("part") == made[1:4]
    assert len(mapper.read("part")) == crew.page_size + 20
    mapper.write("part", b"mine")
    assert mapper.frames("part") == made[1:4]  # nobody else has page 1 any more
    assert creator.read("buffer", 4, start) == bytes(4)
    mapper.rfree("part")
    now = creator.frames("buffer")
    assert crew.counts(now) == [1] * PAGES
    assert crew.counts([made[1]]) == [0]
    creator.rfree("buffer")
    assert crew.counts(now) == [0] * PAGES


def test_overlapping_refs_count_twice_where_they_overlap(crew: Crew) -> None:
    creator, mapper = crew[:2]
    page = crew.page_size
    creator.ralloc("buffer", 4 * page)
    made = creator.frames("buffer")
    wires = [creator.create_ref("buffer", 0, 3 * page), creator.create_ref("buffer", page)]
    assert crew.counts(made) == [2, 3, 3, 2]
    for name, wire in zip(("low", "high"), wires, strict=True):
        mapper.map_ref(name, wire)
    assert mapper.frames("low") == made[:3]
    assert mapper.frames("high") == made[1:]
    mapper.write("low", b"low.", page)
    assert mapper.read("high", 4) == bytes(4)
    mapper.write("high", b"high")
    assert mapper.read("low", 4, page) == b"low."
    assert crew.counts(made) == [2, 1, 3, 2]
    mapper.rfree("low")
    assert crew.counts(made) == [1, 1, 2, 2]
    mapper.rfree("high")
    creator.rfree("buffer")
    assert crew.counts(made) == [0] * 4


def test_one_frame_mapped_twice_in_one_host_has_a_count_for_each(crew: Crew) -> None:
    creator = crew[0]
    creator.ralloc("buffer", crew.page_size)
    creator.write("buffer", b"made")
    [made] = creator.frames("buffer")
    wires = [creator.create_ref("buffer") for _ in range(3)]
    for number, wire in enumerate(wires):
        creator.map_ref(f"again{number}", wire)
        assert creator.frames(f"again{number}") == [made]
    assert crew.counts([made]) == [4]
    for number in range(3):
        creator.write(f"again{number}", b"no.%d" % number)
        assert crew.counts([made]) == [3 - number]
    names = ("buffer", "again0", "again1", "again2")
    assert [creator.read(name, 4) for name in names] == [b"made", b"no.0", b"no.1", b"no.2"]
    for name in names:
        creator.rfree(name)
    assert crew.counts([made]) == [0]


# ---------------------------------------------------------------- holes


@page_sizes
def test_holes_are_shared_without_frames_and_each_side_fills_its_own(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("lazy", 4 * crew.page_size, lazy=True)
    creator.write("lazy", b"made", crew.page_size)
    [_, made, *_] = creator.frames("lazy")
    wire = creator.create_ref("lazy")
    crew.sound(in_use=1, hole_pages=3, ref_pages=1)
    mapper.map_ref("lazy", wire)
    assert mapper.frames("lazy") == [None, made, None, None]
    crew.sound(in_use=1, mapped_pages=2, hole_pages=6)
    assert mapper.read("lazy") == bytes(crew.page_size) + b"made" + bytes(3 * crew.page_size - 4)
    crew.sound(in_use=1, hole_pages=6)  # reading a hole takes no frame
    mapper.write("lazy", b"mine", 2 * crew.page_size)
    creator.write("lazy", b"more", 2 * crew.page_size)
    crew.sound(in_use=3, hole_pages=4)
    both = [member.frames("lazy")[2] for member in (creator, mapper)]
    assert crew.counts([made, *both]) == [2, 1, 1]
    assert mapper.read("lazy", 8, 2 * crew.page_size) == b"mine" + bytes(4)
    assert creator.read("lazy", 8, 2 * crew.page_size) == b"more" + bytes(4)
    creator.rfree("lazy")
    mapper.rfree("lazy")
    crew.sound(in_use=0, hole_pages=0)


@pytest.mark.parametrize("crew", ["old-kernel"], indirect=True)
def test_where_reading_takes_a_frame_holes_still_read_as_zeros_and_stay_apart(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("lazy", 4 * crew.page_size, lazy=True)
    creator.write("lazy", b"made", crew.page_size)
    wire = creator.create_ref("lazy")
    crew.sound(in_use=1, hole_pages=3)
    mapper.map_ref("lazy", wire)
    with mapper.counting() as added:
        assert mapper.read("lazy", 8) == bytes(8)
    assert (added["missing_faults"], added["frames_filled"]) == (1, 1)
    crew.sound(in_use=2, hole_pages=5)
    mapper.write("lazy", b"mine")
    mapper.write("lazy", b"mine", 2 * crew.page_size)
    assert creator.read("lazy") == bytes(crew.page_size) + b"made" + bytes(3 * crew.page_size - 4)
    with creator.counting() as added:
        again = creator.create_ref("lazy")  # what was read has frames now
        creator.write("lazy", b"more")
    assert added["frames_copied"] == 1
    assert mapper.read("lazy", 8) == b"mine" + bytes(4)
    mapper.map_ref("again", again)
    assert mapper.read("again", 8) == bytes(8)
    for member, name in ((creator, "lazy"), (mapper, "lazy"), (mapper, "again")):
        member.rfree(name)
    crew.sound(in_use=0, hole_pages=0)


@page_sizes
def test_a_buffer_of_holes_alone_can_be_moved_and_stays_free_of_frames(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("lazy", 5 * crew.page_size, lazy=True)
    wire = creator.create_ref("lazy", move=True)
    crew.sound(in_use=0, hole_pages=0, live_refs=1)
    mapper.map_ref("lazy", wire)
    assert mapper.frames("lazy") == [None] * 5
    assert mapper.read("lazy") == bytes(5 * crew.page_size)
    mapper.write("lazy", b"end", 5 * crew.page_size - 3)
    crew.sound(in_use=1, hole_pages=4)
    mapper.rfree("lazy")


# ---------------------------------------------------------------- in pieces


@pytest.mark.parametrize("move", [False, True], ids=["shared", "moved"])
@page_sizes
def test_a_buffer_in_many_pieces_travels_with_an_overflow_frame(crew: Crew, move: bool) -> None:
    creator, mapper = crew[:2]
    pages = 30
    creator.ralloc("buffer", pages * crew.page_size)
    snapshot = creator.create_ref("buffer")
    for page in range(0, pages, 2):
        creator.write("buffer", b"%02d" % page, page * crew.page_size)
    made = creator.frames("buffer")
    crew.sound(in_use=pages + pages // 2, overflow_frames=0)
    wire = creator.create_ref("buffer", move=move)  # 30 runs; 9 fit the entry
    crew.sound(in_use=pages + pages // 2 + 1, overflow_frames=1)
    with mapper.counting() as added:
        mapper.map_ref("buffer", wire)
    assert added["map_scattered"] == 1
    crew.sound(in_use=pages + pages // 2, overflow_frames=0)
    assert mapper.frames("buffer") == made
    # Even pages: the creator's copies, unless it moved away. Odd pages: the snapshot's as well.
    assert crew.counts(made) == ([1, 2] if move else [2, 3]) * (pages // 2)
    for page in range(pages):
        expected = b"%02d" % page if page % 2 == 0 else bytes(2)
        assert mapper.read("buffer", 2, page * crew.page_size) == expected
    assert mapper.drop(snapshot)
    mapper.rfree("buffer")
    if not move:
        assert crew.counts(made) == [1] * pages
        creator.rfree("buffer")
    assert crew.counts(made) == [0] * pages


def test_dropping_a_ref_in_many_pieces_frees_its_overflow_frames(crew: Crew) -> None:
    creator, receiver = crew[:2]
    pages = 1100  # two overflow frames of 511 runs each
    creator.ralloc("buffer", pages * crew.page_size, lazy=True)
    for page in range(0, pages, 2):
        creator.write("buffer", b"x", page * crew.page_size)
    wire, copy = creator.clone(creator.create_ref("buffer"))
    made = creator.frames("buffer")
    assert crew.counts(made) == [3] * (pages // 2)
    overflow = crew.sound(live_refs=2)["overflow_frames"]
    assert overflow == 6
    assert receiver.drop(copy)
    crew.sound(live_refs=1, overflow_frames=overflow // 2)
    assert creator.drop(wire)
    crew.sound(live_refs=0, overflow_frames=0, in_use=pages // 2)
    creator.rfree("buffer")
    assert crew.counts(made) == [0] * (pages // 2)


# ---------------------------------------------------------------- map_ref's options


@page_sizes
def test_an_eager_copy_takes_frames_of_its_own_and_gives_the_refs_counts_back(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", 3 * crew.page_size)
    creator.write("buffer", b"made")
    made = creator.frames("buffer")
    wire = creator.create_ref("buffer")
    with mapper.counting() as added:
        mapper.map_ref("buffer", wire, copy=True)
        mapper.write("buffer", b"mine", crew.page_size)
    copies = mapper.frames("buffer")
    assert not {*copies} & {*made}
    assert crew.counts([*made, *copies]) == [1] * 6
    assert (added["eager_copies"], added["wp_faults"]) == (1, 0)
    assert added["bytes_copied"] == 3 * crew.page_size
    assert mapper.read("buffer", 4) == b"made"
    mapper.rfree("buffer")
    creator.rfree("buffer")
    assert crew.counts([*made, *copies]) == [0] * 6


@page_sizes
def test_reserved_frames_are_used_by_the_stores_and_the_rest_is_let_go(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", 4 * crew.page_size)
    mapper.map_ref("buffer", creator.create_ref("buffer"), reserve=True)
    assert mapper.stats()["reserved_frames"] == 4
    mapper.write("buffer", b"x")
    assert mapper.stats()["reserved_frames"] == 3
    mapper.rfree("buffer")
    assert mapper.stats()["reserved_frames"] == 0
    creator.rfree("buffer")


def test_freeing_twice_takes_no_count_from_others(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", crew.page_size)
    [made] = creator.frames("buffer")
    mapper.map_ref("buffer", creator.create_ref("buffer"))
    creator.call(free_twice, "buffer")
    assert crew.counts([made]) == [1]
    mapper.rfree("buffer")


def free_twice(at, name):
    buffer = getattr(at, name)
    at.host.rfree(buffer)
    for target in (buffer, buffer.address):
        with pytest.raises(BadAddress):
            at.host.rfree(target)

"""What happens to a page from its first write to its last holder's rfree, with the refcount after every step.

The paper's example first, then every other order of the same calls; everything ends with both
frames free. Refcounts are read
from the device, and which frame a page shows from the kernel. A fault serves one page in these
hosts, so that every count is known.
"""

import itertools

import pytest

from dmrpc_cxl.errors import RefConsumed
from tests.crews import Crew, Member, frame_words
from tests.fabrics import Fabric

page_sizes = pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)


def made_by(creator: Member, size: int, content: bytes = b"made") -> int:
    """Allocate "page", write to it, and return its one frame."""
    creator.ralloc("page", size)
    creator.write("page", content)
    [frame] = creator.frames("page")
    return int(frame)


# ---------------------------------------------------------------- the paper's example


@page_sizes
@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_the_papers_example_ends_with_both_frames_free(crew: Crew, lazy: bool) -> None:
    creator, forwarder, balancer, consumer = crew[:4]
    creator.ralloc("page", crew.page_size, lazy=lazy)
    if lazy:
        assert creator.frames("page") == [None]
        crew.sound(in_use=0, hole_pages=1)
    creator.write("page", b"made")
    [old] = creator.frames("page")
    assert crew.counts([old]) == [1]  # the creator

    wire = creator.create_ref("page")
    assert crew.counts([old]) == [2]  # the creator and the Ref
    wire = balancer.accept(forwarder.accept(wire))
    assert crew.counts([old]) == [2]  # whoever forwards touches no count

    consumer.map_ref("page", wire)
    assert consumer.frames("page") == [old]
    assert crew.counts([old]) == [2]  # the Ref's share is the consumer's now
    crew.sound(in_use=1, mapped_pages=2, live_refs=0)

    with consumer.counting() as added:
        consumer.write("page", b"mine")
    [new] = consumer.frames("page")
    assert new != old
    assert crew.counts([old, new]) == [1, 1]
    assert (added["wp_faults"], added["frames_copied"]) == (1, 1)

    with creator.counting() as added:
        creator.write("page", b"more")
    assert creator.frames("page") == [old]
    assert crew.counts([old, new]) == [1, 1]
    assert (added["frames_copied"], added["inplace_upgrades"]) == (0, 1)
    assert (consumer.read("page", 4), creator.read("page", 4)) == (b"mine", b"more")

    consumer.rfree("page")
    assert crew.counts([old, new]) == [1, 0]
    creator.rfree("page")
    assert crew.counts([old, new]) == [0, 0]
    crew.sound(in_use=0)


def test_who_drops_the_last_count_gets_the_frame_on_its_own_free_list(fabric: Fabric) -> None:
    # A fabric of its own: nobody sits on so many frames that some go back to the coordinator.
    creator, consumer = (Member(fabric.host(copy_around=1)) for _ in range(2))
    frame = made_by(creator, 4096)
    assert frame_words(fabric.name, [frame])[0][:2] == (1, creator.id)
    consumer.map_ref("page", creator.create_ref("page"))
    creator.rfree("page")
    assert frame_words(fabric.name, [frame])[0][0] == 1
    free = fabric.assert_sound()["free"].get(consumer.id, 0)
    consumer.rfree("page")
    assert frame_words(fabric.name, [frame])[0][:2] == (0, consumer.id)
    assert fabric.assert_sound()["free"][consumer.id] == free + 1


# ---------------------------------------------------------------- every other order

CREATOR = ("creator writes", "creator frees")
CONSUMER = ("consumer maps", "consumer writes", "consumer frees")


def merges(left: tuple[str, ...], right: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return every order in which two sequences of steps can be mixed."""
    places = itertools.combinations(range(len(left) + len(right)), len(left))
    orders = []
    for chosen in places:
        first, second = iter(left), iter(right)
        orders.append(
            tuple(next(first if at in chosen else second) for at in range(len(left) + len(right)))
        )
    return orders


@pytest.mark.parametrize("order", merges(CREATOR, CONSUMER), ids=", ".join)
def test_any_order_of_writes_and_frees_keeps_counts_and_bytes(
    crew: Crew, order: tuple[str, ...]
) -> None:
    members = dict(zip(("creator", "consumer"), crew[:2], strict=True))
    made = made_by(members["creator"], crew.page_size)
    wire = members["creator"].create_ref("page")
    # The model: which frame each holder has, and what is in it.
    frame_of = {"creator": made, "ref": made}
    content = {"creator": b"made", "ref": b"made"}
    for step in order:
        who, what = step.split()
        member = members[who]
        if what == "maps":
            member.map_ref("page", wire)
            frame_of[who], content[who] = frame_of.pop("ref"), content.pop("ref")
        elif what == "writes":
            shared = list(frame_of.values()).count(frame_of[who]) > 1
            with member.counting() as added:
                member.write("page", who[:4].encode())
            assert added["frames_copied"] == shared
            content[who] = who[:4].encode()
            if shared:
                [frame_of[who]] = member.frames("page")
                others = [frame for holder, frame in frame_of.items() if holder != who]
                assert frame_of[who] not in others
        else:
            member.rfree("page")
            del frame_of[who], content[who]
        for holder in content.keys() & members.keys():
            assert members[holder].frames("page") == [frame_of[holder]]
            assert members[holder].read("page", 4) == content[holder]
        held = list(frame_of.values())
        assert crew.counts(held) == [held.count(frame) for frame in held]
        crew.sound(in_use=len(set(held)), live_refs="ref" in frame_of)
    assert crew.counts([made]) == [0]


@page_sizes
def test_a_ref_whose_creator_freed_first_is_mapped_exclusively_and_written_in_place(
    crew: Crew,
) -> None:
    creator, consumer = crew[:2]
    frame = made_by(creator, crew.page_size)
    wire = creator.create_ref("page")
    creator.rfree("page")
    assert crew.counts([frame]) == [1]  # the Ref
    consumer.map_ref("page", wire)
    assert crew.counts([frame]) == [1]
    with consumer.counting() as added:
        consumer.write("page", b"mine")
    assert consumer.frames("page") == [frame]
    assert (added["wp_faults"], added["frames_copied"]) == (0, 0)
    consumer.rfree("page")
    assert crew.counts([frame]) == [0]


@pytest.mark.parametrize("dropper", [0, 1], ids=["its creator", "its receiver"])
def test_a_ref_that_is_dropped_gives_its_count_back(crew: Crew, dropper: int) -> None:
    creator = crew[0]
    frame = made_by(creator, crew.page_size)
    wire = creator.create_ref("page")
    assert crew.counts([frame]) == [2]
    assert crew[dropper].drop(wire)
    assert crew.counts([frame]) == [1]
    assert not creator.drop(wire)
    assert crew.counts([frame]) == [1]
    with creator.counting() as added:
        creator.write("page", b"more")
    assert (added["frames_copied"], added["inplace_upgrades"]) == (0, 1)
    creator.rfree("page")
    assert crew.counts([frame]) == [0]


def test_a_ref_dropped_after_its_creator_freed_leaves_nothing(crew: Crew) -> None:
    creator, receiver = crew[:2]
    frame = made_by(creator, crew.page_size)
    wire = creator.create_ref("page")
    creator.rfree("page")
    assert crew.counts([frame]) == [1]
    assert receiver.drop(wire)
    assert crew.counts([frame]) == [0]
    crew.sound(in_use=0, live_refs=0)


def test_a_clone_is_one_count_more_and_both_are_mapped_for_themselves(crew: Crew) -> None:
    creator, one, other = crew[:3]
    frame = made_by(creator, crew.page_size)
    wire, copy = creator.clone(creator.create_ref("page"))
    assert crew.counts([frame]) == [3]
    one.map_ref("page", wire)
    other.map_ref("page", copy)
    assert crew.counts([frame]) == [3]
    one.write("page", b"one.")
    assert crew.counts([frame, *one.frames("page")]) == [2, 1]
    other.write("page", b"two.")
    assert crew.counts([frame, *other.frames("page")]) == [1, 1]
    with creator.counting() as added:
        creator.write("page", b"mine")
    assert (creator.frames("page"), added["frames_copied"]) == ([frame], 0)
    contents = [member.read("page", 4) for member in (creator, one, other)]
    assert contents == [b"mine", b"one.", b"two."]
    crew.sound(in_use=3, mapped_pages=3)
    for member in (creator, one, other):
        member.rfree("page")
    assert crew.counts([frame]) == [0]


def test_two_refs_of_one_page_are_independent_snapshots(crew: Crew) -> None:
    creator, one, other = crew[:3]
    first = made_by(creator, crew.page_size, b"1st.")
    early = creator.create_ref("page")
    again = creator.create_ref("page")
    assert crew.counts([first]) == [3]
    creator.write("page", b"2nd.")
    [second] = creator.frames("page")
    assert crew.counts([first, second]) == [2, 1]
    late = creator.create_ref("page")
    assert crew.counts([first, second]) == [2, 2]
    one.map_ref("early", early)
    other.map_ref("again", again)
    other.map_ref("late", late)
    creator.write("page", b"3rd.")
    [third] = creator.frames("page")
    assert crew.counts([first, second, third]) == [2, 1, 1]
    one.write("early", b"mine")
    assert crew.counts([first, second, third]) == [1, 1, 1]
    other.write("again", b"own.")
    other.write("late", b"late")
    assert other.frames("again") == [first]  # the last holder writes in place
    assert other.frames("late") == [second]
    assert creator.read("page", 4) == b"3rd."
    assert one.read("early", 4) == b"mine"
    for member, name in ((creator, "page"), (one, "early"), (other, "again"), (other, "late")):
        member.rfree(name)
    assert crew.counts([first, second, third]) == [0, 0, 0]


# ---------------------------------------------------------------- sharing again


@pytest.mark.parametrize("backwards", [False, True], ids=["first to last", "last to first"])
@page_sizes
def test_a_page_shared_on_through_five_hosts_has_six_holders(crew: Crew, backwards: bool) -> None:
    members = crew[:6]
    frame = made_by(members[0], crew.page_size)
    for depth, (sharer, mapper) in enumerate(itertools.pairwise(members), start=1):
        mapper.map_ref("page", sharer.create_ref("page"))
        assert crew.counts([frame]) == [depth + 1]
        assert mapper.read("page", 4) == b"made"
    writers = members[::-1] if backwards else members
    for number, writer in enumerate(writers, start=1):
        writer.write("page", b"by %d" % writer.id)
        assert crew.counts([frame]) == [max(6 - number, 1)]
    assert writers[-1].frames("page") == [frame]  # nobody else holds it any more
    for member in members:
        assert member.read("page", 6).startswith(b"by %d" % member.id)
    frames = [member.frames("page")[0] for member in members]
    assert len(set(frames)) == 6
    assert crew.counts(frames) == [1] * 6
    for member in members:
        member.rfree("page")
    assert crew.counts(frames) == [0] * 6


def test_a_chain_of_hosts_that_free_once_they_have_shared_on_uses_one_frame(crew: Crew) -> None:
    members = crew[:6]
    frame = made_by(members[0], crew.page_size)
    for sharer, mapper in itertools.pairwise(members):
        wire = sharer.create_ref("page")
        assert crew.counts([frame]) == [2]
        sharer.rfree("page")
        assert crew.counts([frame]) == [1]
        mapper.map_ref("page", wire)
        mapper.write("page", b"by %d" % mapper.id)
        assert mapper.frames("page") == [frame]
    crew.sound(in_use=1)
    members[-1].rfree("page")
    assert crew.counts([frame]) == [0]


def test_a_buffer_moved_through_five_hosts_has_one_count_and_no_fault(crew: Crew) -> None:
    members = crew[:6]
    frame = made_by(members[0], crew.page_size)
    for sharer, mapper in itertools.pairwise(members):
        wire = sharer.create_ref("page", move=True)
        assert crew.counts([frame]) == [1]
        [ref] = crew.refs()
        assert ref["exclusive"]
        with mapper.counting() as added:
            mapper.map_ref("page", wire)
            mapper.write("page", b"by %d" % mapper.id)
        assert mapper.frames("page") == [frame]
        assert (added["wp_faults"], added["frames_copied"], added["map_exclusive"]) == (0, 0, 1)
    members[-1].rfree("page")
    assert crew.counts([frame]) == [0]


def test_a_consumed_ref_stays_consumed_through_the_whole_chain(crew: Crew) -> None:
    creator, one, other = crew[:3]
    frame = made_by(creator, crew.page_size)
    wire = creator.create_ref("page")
    one.map_ref("page", wire)
    shared_on = one.create_ref("page")
    for member in (creator, one, other):
        with pytest.raises(RefConsumed):
            member.map_ref("again", wire)
        assert crew.counts([frame]) == [3]
    other.map_ref("page", shared_on)
    for member in (creator, one, other):
        member.rfree("page")
    assert crew.counts([frame]) == [0]

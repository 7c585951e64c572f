"""What the paper leaves open, question by question, and what holds here.

A test is named after the number of its question:

 1 who holds the count that create_ref takes        18 order of copying and uncounting
 2 may a Ref be mapped twice                        19 two sharers drop their counts at once
 3 what frees a Ref that nobody maps                20 create_ref while another thread stores
 4 the creator frees before the consumer maps       21 size of a Ref
 5 the creator is gone before the consumer maps     22 protection of Refs
 6 the creator writes while the page is shared      23 may the mapper write
 7 the last holder writes                           24 mapping one's own Ref
 8 create_ref twice                                 26 where the mapper of a Ref must go
 9 sharing what was mapped                          29 identity of a process
10 create_ref over pages never written              31 a process crashes
11 reading a page never written                     32 sizes of batches
12 sizes and addresses that are no whole pages      33 who zeroes frames
13 sharing and freeing a part
15 the pool runs dry in the middle of a write
16 the pool is exhausted
17 width of a count

Belong to the network variant: 14 (a write that covers a page is not copied: a store does not say what will follow),
25 (order of rread and rwrite), 27 (round robin over servers), 28 (shards of a server).
Belong to the RPC layer: 30 (retransmitted calls), 34 (one object for values and references).

1 to 13 and 31 are told shortly here, and with every count in test_life_cycles*.py. 15 to 20, 32
and 33: test_semantics_frames.py.
"""

import re
import struct
from pathlib import Path

import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadAddress, BadRef, RefConsumed
from tests.crews import Crew, attach, in_host
from tests.fabrics import At, Fabric, running
from tests.pictures import nothing_changes

ELSEWHERE = {14, 25, 27, 28, 30, 34}


def test_every_question_is_answered_here_or_belongs_elsewhere() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_semantics*.py"))
    answered = {int(number) for number in re.findall(r"^def test_(\d+)_", text, re.MULTILINE)}
    assert answered | ELSEWHERE == set(range(1, 35))
    assert not answered & ELSEWHERE


def test_01_the_ref_owns_one_count_and_map_ref_takes_it_over(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("page", crew.page_size)
    frames = creator.frames("page")
    wire = creator.create_ref("page")
    crew.sound(mapped_pages=1, ref_pages=1)
    assert crew.counts(frames) == [2]
    mapper.map_ref("page", wire)
    crew.sound(mapped_pages=2, ref_pages=0)
    assert crew.counts(frames) == [2]
    creator.rfree("page")
    mapper.rfree("page")
    assert crew.counts(frames) == [0]


def test_02_a_ref_is_used_once_and_cloned_for_more_readers(crew: Crew) -> None:
    creator, *readers = crew[:4]
    creator.ralloc("page", crew.page_size)
    creator.write("page", b"news")
    wire = creator.create_ref("page")
    for reader in readers:
        wire, copy = creator.clone(wire)
        reader.map_ref("page", copy)
        with pytest.raises(RefConsumed):
            reader.map_ref("again", copy)
        assert reader.read("page", 4) == b"news"
    assert creator.drop(wire)
    for member in (creator, *readers):
        member.rfree("page")


def test_03_a_ref_that_nobody_maps_goes_with_a_drop_or_with_its_holder(crew: Crew) -> None:
    creator, receiver = crew[:2]
    creator.ralloc("page", crew.page_size)
    wires = [creator.create_ref("page") for _ in range(3)]
    crew.sound(live_refs=3)
    assert receiver.drop(wires[0])
    assert not receiver.drop(wires[0])
    crew.sound(live_refs=2)
    receiver.accept(wires[1])
    receiver.kill()
    crew.wait_until_reclaimed(receiver)
    crew.sound(live_refs=1)
    creator.kill()
    crew.wait_until_reclaimed(creator)
    crew.sound(live_refs=0, in_use=0)


def test_04_the_creator_may_free_before_the_consumer_maps(crew: Crew) -> None:
    creator, consumer = crew[:2]
    creator.ralloc("page", crew.page_size)
    creator.write("page", b"made")
    wire = creator.create_ref("page")
    creator.rfree("page")
    creator.ralloc("other", 100 * crew.page_size)  # its frame is not handed out meanwhile
    creator.write("other", b"x" * 100 * crew.page_size)
    consumer.map_ref("page", wire)
    assert consumer.read("page", 4) == b"made"
    creator.rfree("other")
    consumer.rfree("page")


def test_05_a_ref_survives_its_creator_once_it_was_accepted_and_not_before(crew: Crew) -> None:
    creator, consumer = crew[:2]
    creator.ralloc("page", crew.page_size)
    creator.write("page", b"made")
    accepted, other = consumer.accept(creator.create_ref("page")), creator.create_ref("page")
    creator.kill()
    crew.wait_until_reclaimed(creator)
    with pytest.raises(RefConsumed):
        consumer.accept(other)
    consumer.map_ref("page", accepted)
    assert consumer.read("page", 4) == b"made"
    consumer.rfree("page")


def test_06_the_creators_store_is_copied_and_the_consumers_is_then_in_place(crew: Crew) -> None:
    creator, consumer = crew[:2]
    creator.ralloc("page", crew.page_size)
    creator.write("page", b"made")
    [made] = creator.frames("page")
    wire = creator.create_ref("page")
    creator.write("page", b"more")
    assert creator.frames("page") != [made]
    consumer.map_ref("page", wire)
    with consumer.counting() as added:
        assert consumer.read("page", 4) == b"made"
        consumer.write("page", b"mine")
    assert (consumer.frames("page"), added["frames_copied"]) == ([made], 0)
    assert creator.read("page", 4) == b"more"
    creator.rfree("page")
    consumer.rfree("page")


@in_host
def test_07_the_last_holders_store_copies_nothing(at: At) -> None:
    buffer = at.host.ralloc(at.host.page_size)
    at.host.create_ref(buffer).drop()
    before = at.host.stats()
    memoryview(buffer)[0] = 1
    after = at.host.stats()
    assert after["frames_copied"] == before["frames_copied"]
    assert after["inplace_upgrades"] == before["inplace_upgrades"] + 1
    memoryview(buffer)[1] = 1  # and the page is private again
    assert at.host.stats()["wp_faults"] == after["wp_faults"]


@in_host
def test_08_two_refs_of_a_range_are_independent_snapshots(at: At) -> None:
    buffer = at.host.ralloc(10)
    view = memoryview(buffer)
    refs = []
    for value in (b"one", b"two", b"two"):
        view[:3] = value
        refs.append(at.host.create_ref(buffer))
    view[:3] = b"end"
    mapped = [at.host.map_ref(ref) for ref in refs]
    memoryview(mapped[1])[:3] = b"own"
    assert [bytes(one)[:3] for one in mapped] == [b"one", b"own", b"two"]
    assert bytes(view[:3]) == b"end"


def test_09_what_was_mapped_can_be_shared_on_to_any_depth(crew: Crew) -> None:
    members = crew[:3]
    members[0].ralloc("0", 2 * crew.page_size)
    for depth in range(1, 13):
        sharer, mapper = members[(depth - 1) % 3], members[depth % 3]
        sharer.write(f"{depth - 1}", b"%02d" % depth, crew.page_size - 1)  # in both pages
        mapper.map_ref(f"{depth}", sharer.create_ref(f"{depth - 1}"))
    for depth in range(13):
        content = members[depth % 3].read(f"{depth}", 2, crew.page_size - 1)
        assert content == b"%02d" % min(depth + 1, 12)
        members[depth % 3].rfree(f"{depth}")


def test_10_a_page_never_written_is_shared_as_a_hole(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("lazy", 3 * crew.page_size, lazy=True)
    mapper.map_ref("lazy", creator.create_ref("lazy"))
    assert mapper.read("lazy") == bytes(3 * crew.page_size)
    crew.sound(in_use=0, hole_pages=6)
    mapper.write("lazy", b"mine")
    assert creator.read("lazy") == bytes(3 * crew.page_size)
    crew.sound(in_use=1, hole_pages=5)
    creator.rfree("lazy")
    mapper.rfree("lazy")


@in_host
def test_11_reading_a_page_never_written_gives_zeros_and_takes_no_frame(at: At) -> None:
    page = at.host.page_size
    dirty = at.host.ralloc(50 * page)
    memoryview(dirty)[:] = b"\xee" * (50 * page)
    dirty.free()  # the frames that a careless handler would show
    lazy = at.host.ralloc(50 * page, lazy=True)
    before = at.host.stats()
    assert bytes(lazy) == bytes(50 * page)
    after = at.host.stats()
    assert after["frames_filled"] == before["frames_filled"]
    assert after["free_frames"] == before["free_frames"]
    memoryview(lazy)[7 * page + 5] = 1
    assert bytes(lazy) == bytes(7 * page + 5) + b"\1" + bytes(43 * page - 6)


@pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)
@in_host
def test_12_any_size_and_start_is_shared_exactly_and_the_rest_of_the_page_is_zero(at: At) -> None:
    import ctypes

    page = at.host.page_size
    buffer = at.host.ralloc(page + 10)
    memoryview(buffer)[:] = b"\xff" * (page + 10)
    assert buffer.address % 4096 == 0
    assert ctypes.string_at(buffer.address + page + 10, page - 10) == bytes(page - 10)
    for start, size in ((0, page + 10), (3, 4), (page - 1, 2), (page + 9, 1)):
        with at.host.map_ref(at.host.create_ref(buffer.address + start, size)) as mapped:
            assert (len(mapped), bytes(mapped)) == (size, b"\xff" * size)


@in_host
def test_13_a_part_can_be_shared_but_only_the_whole_is_freed_and_once(at: At) -> None:
    page = at.host.page_size
    buffer = at.host.ralloc(4 * page)
    memoryview(buffer)[2 * page] = 1
    with at.host.map_ref(at.host.create_ref(buffer.address + page, 2 * page)) as part:
        assert bytes(part) == bytes(page) + b"\1" + bytes(page - 1)
        for address in (buffer.address + page, part.address + page):
            with nothing_changes(at.host.fabric), pytest.raises(BadAddress):
                at.host.rfree(address)
    at.host.rfree(buffer.address)
    with nothing_changes(at.host.fabric), pytest.raises(BadAddress):
        at.host.rfree(buffer.address)


@in_host
def test_21_a_ref_has_the_same_few_bytes_whatever_it_covers(at: At) -> None:
    page = at.host.page_size
    scattered = at.host.ralloc(2000 * page, lazy=True)
    for number in range(0, 2000, 2):
        memoryview(scattered)[number * page] = 1
    for target in (at.host.ralloc(1), at.host.ralloc(1000 * page), scattered):
        assert len(at.host.create_ref(target, move=True).accept().to_bytes()) == 40
    at.host.detach()
    at.host = dmrpc_cxl.attach(at.host.fabric, copy_around=1)


@in_host
def test_22_refs_are_found_by_a_random_number_that_is_checked(at: At) -> None:
    refs = [at.host.create_ref(at.host.ralloc(1)) for _ in range(64)]
    nonces = [struct.unpack_from("<Q", ref.to_bytes(), 24)[0] for ref in refs]
    assert len(set(nonces)) == 64
    assert all(bin(nonce).count("1") > 8 for nonce in nonces)
    wire = refs[0].to_bytes()
    with nothing_changes(at.host.fabric), pytest.raises(BadRef):
        at.host.map_ref(wire[:24] + refs[1].to_bytes()[24:32] + wire[32:])
    for ref in refs:
        assert ref.drop()


def test_23_the_mapper_owns_its_mapping_and_may_write(crew: Crew) -> None:
    creator, mapper = crew[:2]
    creator.ralloc("buffer", 3 * crew.page_size)
    mapper.map_ref("buffer", creator.create_ref("buffer"))
    mapper.write("buffer", b"mine" * (3 * crew.page_size // 4))
    assert creator.read("buffer") == bytes(3 * crew.page_size)
    assert mapper.read("buffer") == b"mine" * (3 * crew.page_size // 4)
    creator.rfree("buffer")
    mapper.rfree("buffer")


@in_host
def test_24_a_host_may_map_its_own_ref(at: At) -> None:
    buffer = at.host.ralloc(10)
    memoryview(buffer)[:4] = b"made"
    own = at.host.map_ref(at.host.create_ref(buffer))
    assert own.address != buffer.address
    memoryview(own)[:4] = b"mine"
    assert bytes(buffer)[:4] == b"made"
    moved = at.host.map_ref(at.host.create_ref(own, move=True))
    assert bytes(moved)[:4] == b"mine"


def test_26_a_ref_names_its_fabric_and_finds_the_host_on_it(crew: Crew) -> None:
    with running(size=4 << 20) as elsewhere:
        crew[0].call(find_the_right_host, elsewhere.name)


def find_the_right_host(at: At, name: str) -> None:
    with dmrpc_cxl.attach(name) as other:
        for host in (at.host, other):
            wire = host.create_ref(host.ralloc(1), move=True).to_bytes()
            assert Ref.from_bytes(wire).host is host
            host.map_ref(wire).free()


def test_29_a_host_has_an_id_that_no_other_live_host_has_and_an_incarnation_of_its_own(
    fabric: Fabric,
) -> None:
    hosts = [fabric.host() for _ in range(3)]
    assert {host.id for host in hosts} == {1, 2, 3}
    before = {entry["incarnation"] for entry in fabric.host_states()}
    hosts[1].kill()
    fabric.wait_until(lambda _: len(fabric.host_states()) == 2)
    assert hosts[0].call(attach_and_leave, 5) <= {2, 4, 5, 6, 7}
    after = {entry["incarnation"] for entry in fabric.host_states()}
    assert after < before
    assert len(hosts[0].call(incarnations, 5) | before) == 8


def attach_and_leave(at: At, times: int) -> set[int]:
    ids = set()
    for _ in range(times):
        with attach(at) as host:
            ids.add(host.id)
    return ids


def incarnations(at: At, times: int) -> set[int]:
    from dmrpc_cxl.fabric import device

    seen = set()
    for _ in range(times):
        with attach(at) as host, device.open(at.host.fabric) as opened:
            seen.add(opened.host(host.id)["incarnation"])
    return seen


def test_31_what_a_crashed_process_held_is_read_from_the_pool_even_by_a_later_coordinator(
    fabric: Fabric,
) -> None:
    creator, consumer = fabric.host(), fabric.host()
    wires = creator.call(make_and_share)
    consumer.call(map_first, wires)
    fabric.coordinator.kill()
    fabric.coordinator.wait()
    creator.kill()
    assert fabric.assert_sound()["in_use"] == 30  # nobody has noticed
    fabric.start_coordinator()
    fabric.wait_until(lambda _: len(fabric.host_states()) == 1)
    audit = fabric.assert_sound()
    assert (audit["in_use"], audit["live_refs"]) == (10, 0)
    assert consumer.call(content) == b"made"


def make_and_share(at: At) -> list[bytes]:
    at.buffers = [at.host.ralloc(10 * at.host.page_size) for _ in range(3)]
    for buffer in at.buffers:
        memoryview(buffer)[:4] = b"made"
    return [at.host.create_ref(buffer).to_bytes() for buffer in at.buffers[:2]]


def map_first(at: At, wires: list[bytes]) -> None:
    at.buffer = at.host.map_ref(wires[0])


def content(at: At) -> bytes:
    return bytes(memoryview(at.buffer)[:4])

"""What a memory server's operations mean: each question about Refs, counts and pages, and its answer.

The questions are those that a description of create_ref and map_ref leaves open: who holds what, until when, and what is left when
somebody is slow, careless or dead.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator

import pytest

import dmrpc_net
from dmrpc_cxl.errors import (
    BadAddress,
    BadRef,
    BadSize,
    OutOfFrames,
    RefConsumed,
    TooManyRefs,
)
from dmrpc_net import ReadOnly, Ref
from tests.net_servers import Servers, StandingServers, There
from tests.standing import until

PAGE = 4096
# One shard: what a test does is then all in one place, and counted there.
_standing = StandingServers("--max-count", "40", shards=1, size="4M")


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    yield
    _standing.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with _standing.use() as servers:
        yield servers


@pytest.fixture
def creator(servers: Servers) -> dmrpc_net.Client:
    return servers.client()


@pytest.fixture
def consumer(servers: Servers) -> dmrpc_net.Client:
    return servers.client()


def filled(client: dmrpc_net.Client, value: bytes, pages: int = 1) -> int:
    """Allocate pages full of one value."""
    address = client.ralloc(pages * PAGE)
    client.rwrite(address, value * (pages * PAGE))
    return address


def in_use(client: dmrpc_net.Client) -> int:
    return client.audit()["in_use"]


class Counted:
    """How counters change in a block."""

    def __init__(self, client: dmrpc_net.Client) -> None:
        self.client = client

    def __enter__(self) -> Counted:
        self.before = self.client.stats()
        return self

    def __exit__(self, *_: object) -> None:
        after = self.client.stats()
        self.change = {name: after[name] - self.before[name] for name in after}

    def __getitem__(self, name: str) -> int:
        return self.change[name]


# ---------------------------------------------------------------- holders of a Ref


def test_a_mapped_ref_leaves_no_count_behind(creator, consumer):
    """Who holds the count that create_ref takes? The Ref; mapping passes it on to the mapping."""
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE)
    mapped = consumer.map_ref(ref.to_bytes())
    consumer.rfree(mapped)
    creator.rfree(address)
    assert in_use(creator) == 0


def test_a_ref_is_used_once(creator, consumer):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE).to_bytes()
    consumer.map_ref(ref)
    for client in (creator, consumer):
        with pytest.raises(RefConsumed):
            client.map_ref(ref)
        with pytest.raises(RefConsumed):
            client.get(ref)
        with pytest.raises(RefConsumed):
            client.clone_ref(ref)


def test_clones_are_refs_of_their_own(creator, consumer, servers):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE)
    clones = [ref.clone().to_bytes() for _ in range(3)]
    assert len({*clones, ref.to_bytes()}) == 4
    mapped = [consumer.map_ref(clone) for clone in clones]
    consumer.rwrite(mapped[0], b"b")
    assert consumer.read(mapped[1], 1) == b"a"
    assert creator.get(ref) == b"a" * PAGE


def test_a_ref_that_nobody_maps_is_dropped_by_its_holder_as_often_as_he_likes(creator):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE)
    wire = ref.to_bytes()
    creator.rfree(address)
    assert in_use(creator) == 1
    assert creator.drop_ref(wire) is True
    assert creator.drop_ref(wire) is False
    assert ref.drop() is False
    assert in_use(creator) == 0


def test_a_ref_that_is_collected_is_dropped_unless_its_bytes_were_handed_out(creator):
    address = filled(creator, b"a")
    creator.create_ref(address, PAGE)
    assert creator.audit()["nr_refs"] == 0
    wire = creator.create_ref(address, PAGE).to_bytes()
    assert creator.ref_is_held(wire)
    creator.drop_ref(wire)


def test_who_does_not_hold_a_ref_cannot_drop_it(creator, consumer):
    address = filled(creator, b"a")
    wire = creator.create_ref(address, PAGE).to_bytes()
    assert consumer.drop_ref(wire) is False
    assert not consumer.ref_is_held(wire)
    assert creator.ref_is_held(wire)
    consumer.accept_ref(wire)
    assert consumer.ref_is_held(wire)
    assert creator.drop_ref(wire) is False
    assert consumer.get(wire) == b"a" * PAGE


def test_a_slow_consumer_does_not_lose_its_ref(creator, consumer):
    """There is no lease: nothing but a use, a drop or a death ends a Ref."""
    address = filled(creator, b"a")
    wire = consumer.get(creator.put(b"x" * 10).to_bytes())
    ref = creator.create_ref(address, PAGE).to_bytes()
    for _ in range(200):  # more requests than answers are kept for
        consumer.rfree(consumer.ralloc(1))
    assert consumer.get(ref) == b"a" * PAGE
    assert wire == b"x" * 10


def test_a_creator_may_free_its_range_before_the_ref_is_mapped(creator, consumer):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE).to_bytes()
    creator.rfree(address)
    mapped = consumer.map_ref(ref)
    assert consumer.read(mapped, PAGE) == b"a" * PAGE
    with Counted(consumer) as counted:
        consumer.rwrite(mapped, b"b")
    assert counted["in_place_writes"] == 1  # nobody else holds it


def make_refs(there: There) -> tuple[bytes, bytes]:
    there.address = there.client.ralloc(PAGE)
    there.client.rwrite(there.address, b"a" * PAGE)
    return tuple(there.client.create_ref(there.address, PAGE).to_bytes() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("way", ["kill", "leave"])
def test_what_was_accepted_survives_the_end_of_its_creator_and_what_was_not_dies_with_it(
    servers, consumer, way
):
    creator = servers.process()
    accepted, other = creator.call(make_refs)
    consumer.accept_ref(accepted)
    getattr(creator, way)()
    until(lambda: not consumer.ref_is_held(other) and consumer.audit()["nr_refs"] == 1)
    with pytest.raises(RefConsumed):
        consumer.accept_ref(other)
    with pytest.raises(RefConsumed):
        consumer.map_ref(other)
    assert consumer.get(accepted) == b"a" * PAGE


# ---------------------------------------------------------------- writes and copies


def test_a_creator_that_writes_leaves_the_original_to_the_ref(creator, consumer):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE)
    with Counted(creator) as counted:
        creator.rwrite(address + 5, b"zz")
    assert (counted["pages_copied"], counted["pages_taken"]) == (1, 1)
    mapped = consumer.map_ref(ref.to_bytes())
    assert consumer.read(mapped, PAGE) == b"a" * PAGE
    with Counted(consumer) as counted:
        consumer.rwrite(mapped, b"b")
    assert (counted["pages_copied"], counted["in_place_writes"]) == (0, 1)
    assert creator.read(address, 10) == b"aaaaazzaaa"


def test_the_last_holder_writes_in_place(creator, consumer):
    address = filled(creator, b"a")
    mapped = consumer.map_ref(creator.create_ref(address, PAGE).to_bytes())
    creator.rfree(address)
    with Counted(consumer) as counted:
        consumer.rwrite(mapped, b"b")
    assert (counted["pages_taken"], counted["in_place_writes"]) == (0, 1)


def test_two_refs_of_one_range_are_snapshots_of_their_own(creator, consumer):
    address = filled(creator, b"a")
    first = creator.create_ref(address, PAGE)
    creator.rwrite(address, b"b")
    second = creator.create_ref(address, PAGE)
    creator.rwrite(address, b"c")
    one, two = (consumer.map_ref(ref.to_bytes()) for ref in (first, second))
    consumer.rwrite(two, b"d")
    assert consumer.read(one, 2) == b"aa"
    assert consumer.read(two, 2) == b"da"
    assert creator.read(address, 2) == b"ca"


def test_what_was_mapped_can_be_shared_again_to_any_depth(servers):
    clients = [servers.client() for _ in range(5)]
    address = filled(clients[0], b"0", 3)
    for depth, client in enumerate(clients[1:], start=1):
        ref = clients[depth - 1].create_ref(address, 3 * PAGE).to_bytes()
        address = client.map_ref(ref)
        client.rwrite(address + depth, str(depth).encode())
    assert clients[-1].read(address, 6) == b"012340"
    audit = clients[0].audit()
    assert (audit["mapped_pages"], audit["in_use"]) == (
        15,
        5 + 2,
    )  # first pages differ, the rest is shared


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE])
def test_only_a_write_of_less_than_a_page_copies_it(creator, size):
    address = filled(creator, b"a")
    ref = creator.create_ref(address, PAGE)
    with Counted(creator) as counted:
        creator.rwrite(address, b"b" * size)
    whole = size == PAGE
    assert counted["full_page_writes"] == whole
    assert counted["pages_copied"] == (not whole)
    assert counted["bytes_copied"] == PAGE - size
    assert creator.get(ref) == b"a" * PAGE
    assert creator.read(address, PAGE) == b"b" * size + b"a" * (PAGE - size)


def test_of_a_long_write_only_the_ends_are_copied(creator):
    address = filled(creator, b"a", 5)
    ref = creator.create_ref(address, 5 * PAGE)
    with Counted(creator) as counted:
        creator.rwrite(address + 100, b"b" * (5 * PAGE - 300))
    assert (counted["pages_copied"], counted["full_page_writes"]) == (2, 3)
    assert counted["bytes_copied"] == 300
    assert creator.get(ref) == b"a" * 5 * PAGE
    assert creator.read(address, 5 * PAGE) == b"a" * 100 + b"b" * (5 * PAGE - 300) + b"a" * 200


def test_with_copy_a_ref_has_pages_of_its_own_at_once(creator, consumer):
    address = filled(creator, b"a", 3)
    with Counted(creator) as counted:
        ref = creator.create_ref(address, 3 * PAGE, copy=True)
    assert (counted["pages_copied_eagerly"], counted["bytes_copied"]) == (3, 3 * PAGE)
    with Counted(creator) as counted:
        creator.rwrite(address, b"b")
    assert (counted["pages_copied"], counted["in_place_writes"]) == (0, 1)
    assert consumer.get(ref.to_bytes()) == b"a" * 3 * PAGE


def test_moving_a_range_into_a_ref_counts_and_copies_nothing(creator, consumer):
    address = filled(creator, b"a", 2)
    with Counted(creator) as counted:
        ref = creator.create_ref(address, 2 * PAGE - 5, move=True)
    assert counted["pages_taken"] == counted["bytes_copied"] == 0
    with pytest.raises(BadAddress):
        creator.read(address, 1)
    mapped = consumer.map_ref(ref.to_bytes())
    with Counted(consumer) as counted:
        consumer.rwrite(mapped, b"b")
    assert counted["in_place_writes"] == 1
    other = filled(creator, b"c", 3)
    for part, size in ((other, PAGE), (other + PAGE, 2 * PAGE)):
        with pytest.raises((BadSize, BadAddress)):
            creator.create_ref(part, size, move=True)
    assert creator.read(other, 1) == b"c"


# ---------------------------------------------------------------- holes


def test_what_was_never_written_reads_as_zeros_and_takes_no_page(creator):
    address = creator.ralloc(10 * PAGE)
    assert creator.read(address + 5, 9 * PAGE) == bytes(9 * PAGE)
    assert in_use(creator) == 0


def test_a_ref_of_holes_reads_as_zeros_for_everybody(creator, consumer):
    address = creator.ralloc(4 * PAGE)
    creator.rwrite(address + PAGE, b"a")
    ref = creator.create_ref(address, 4 * PAGE)
    mapped = consumer.map_ref(ref.to_bytes())
    assert in_use(creator) == 1
    assert consumer.read(mapped, 4 * PAGE) == bytes(PAGE) + b"a" + bytes(3 * PAGE - 1)
    consumer.rwrite(mapped + 3 * PAGE + 7, b"b")
    assert creator.read(address + 3 * PAGE, PAGE) == bytes(PAGE)
    assert in_use(creator) == 2


def test_nobody_sees_what_was_in_a_page_before(creator, consumer):
    total = creator.stats()["nr_pages"]
    address = filled(creator, b"S", total)  # every page there is
    creator.rfree(address)
    other = consumer.ralloc(total * PAGE)
    for page in range(0, total, 7):
        consumer.rwrite(other + page * PAGE + page % 4000, b"x")
    assert b"S" not in consumer.read(other, total * PAGE)
    assert b"S" not in consumer.get(consumer.put(b"y" * 5000).to_bytes())


# ---------------------------------------------------------------- addresses and sizes


def test_ranges_are_aligned_and_refs_need_aligned_addresses(creator):
    address = creator.ralloc(3 * PAGE)
    assert address % PAGE == 0
    for wrong in (1, 8, PAGE - 1):
        with pytest.raises(BadAddress):
            creator.create_ref(address + wrong, 10)


def test_a_ref_has_the_length_it_was_made_with_and_its_mapping_whole_pages(creator, consumer):
    address = creator.ralloc(2 * PAGE)
    creator.rwrite(address, b"a" * (PAGE + 10))
    ref = creator.create_ref(address, PAGE + 10)
    assert ref.nbytes == len(ref) == PAGE + 10
    assert len(creator.get(ref, keep=True)) == PAGE + 10
    mapped = consumer.map_ref(ref.to_bytes())
    assert consumer.read(mapped + PAGE, PAGE) == b"a" * 10 + bytes(PAGE - 10)
    with pytest.raises(BadSize):
        consumer.read(mapped, 2 * PAGE + 1)


def test_a_part_of_a_range_can_be_shared(creator, consumer):
    address = creator.ralloc(4 * PAGE)
    for page in range(4):
        creator.rwrite(address + page * PAGE, bytes([page + 1]) * PAGE)
    ref = creator.create_ref(address + PAGE, 2 * PAGE)
    assert consumer.get(ref.to_bytes()) == b"\2" * PAGE + b"\3" * PAGE
    for offset, size in ((0, 4 * PAGE + 1), (3 * PAGE, PAGE + 1), (0, 0)):
        with pytest.raises(BadSize):
            creator.create_ref(address + offset, size)


def test_only_a_whole_range_can_be_freed_and_only_once(creator):
    address = creator.ralloc(4 * PAGE)
    for wrong in (address + PAGE, address + 1, address + 4 * PAGE, 0, 2**64 - 1, -1, 2**70):
        with pytest.raises(BadAddress):
            creator.rfree(wrong)
    creator.rfree(address)
    with pytest.raises(BadAddress):
        creator.rfree(address)


def test_addresses_are_of_one_process(creator, consumer):
    address = filled(creator, b"a")
    with pytest.raises(BadAddress):
        consumer.read(address, 1)
    with pytest.raises(BadAddress):
        consumer.rfree(address)
    with pytest.raises(BadAddress):
        consumer.create_ref(address, PAGE)


def test_what_reaches_beyond_a_range_is_refused_whole(creator):
    address = filled(creator, b"a", 2)
    with pytest.raises(BadSize):
        creator.rwrite(address + PAGE, b"b" * (PAGE + 1))
    assert creator.read(address, 2 * PAGE) == b"a" * 2 * PAGE
    for size in (0, 2**70, -1):
        with pytest.raises((BadSize, ValueError)):
            creator.ralloc(size)
    with pytest.raises(BadSize):
        creator.ralloc(creator.stats()["nr_pages"] * PAGE + 1)


# ---------------------------------------------------------------- when pages run out


def test_ranges_may_promise_more_than_there_is_and_the_write_that_fails_says_so(creator):
    total = creator.stats()["nr_pages"]
    ranges = [creator.ralloc(total * PAGE) for _ in range(5)]
    creator.rwrite(ranges[0], b"a" * total * PAGE)
    with pytest.raises(OutOfFrames):
        creator.rwrite(ranges[1], b"b")
    with pytest.raises(MemoryError):
        creator.put(b"b")
    creator.rfree(ranges[0])
    creator.rwrite(ranges[1], b"b")


def test_a_write_for_which_pages_run_out_midway_writes_nothing(creator):
    total = creator.stats()["nr_pages"]
    mine = filled(creator, b"a", 4)  # two of its pages others hold, two not
    ref = creator.create_ref(mine + PAGE, 2 * PAGE)
    rest = filled(creator, b"r", total - 4 - 1)
    with pytest.raises(OutOfFrames):  # one page is free, two are needed
        creator.rwrite(mine, b"b" * 4 * PAGE)
    assert creator.read(mine, 4 * PAGE) == b"a" * 4 * PAGE
    assert creator.stats()["nr_free"] == 1
    creator.rfree(rest)
    creator.rwrite(mine, b"b" * 4 * PAGE)
    assert creator.get(ref) == b"a" * 2 * PAGE


def test_an_eager_copy_for_which_pages_run_out_copies_nothing(creator):
    total = creator.stats()["nr_pages"]
    mine = filled(creator, b"a", 4)
    filled(creator, b"r", total - 4 - 3)
    with pytest.raises(OutOfFrames):
        creator.create_ref(mine, 4 * PAGE, copy=True)
    assert creator.stats()["nr_free"] == 3
    assert creator.audit()["nr_refs"] == 0


def test_a_page_has_as_many_holders_as_can_be_counted(creator):
    """The server of these tests counts to 40; in earnest it is 2^32 - 1."""
    address = filled(creator, b"a", 2)
    creator.rwrite(address, b"b")
    refs = [creator.create_ref(address, PAGE) for _ in range(39)]
    with pytest.raises(TooManyRefs):
        creator.create_ref(address, PAGE)
    with pytest.raises(TooManyRefs):
        creator.create_ref(address, 2 * PAGE)
    with pytest.raises(OverflowError):
        refs[0].clone()
    assert creator.audit()["ref_pages"] == 39
    refs.pop().drop()
    refs.append(creator.create_ref(address, 2 * PAGE))


# ---------------------------------------------------------------- Refs as bytes


def test_a_ref_is_24_bytes(creator):
    ref = creator.put(b"a" * 100_000)
    wire = ref.to_bytes()
    assert len(wire) == 24
    assert Ref.from_bytes(wire, creator).nbytes == 100_000
    assert creator.get(pickle.loads(pickle.dumps(ref))) == b"a" * 100_000


def test_keys_are_drawn_so_that_nobody_guesses_them(creator):
    keys = [int.from_bytes(creator.put(b"a").to_bytes()[8:16], "little") for _ in range(64)]
    assert len(set(keys)) == 64
    ones = sum((a ^ b).bit_count() for a, b in zip(keys, keys[1:], strict=False)) / 63
    assert 26 < ones < 38  # neighbours differ in half of their 64 bits


def test_what_is_no_ref_is_refused(creator):
    wire = creator.put(b"abc").to_bytes()
    rng = random.Random(1)
    for place in range(24):
        for _ in range(4):
            forged = bytearray(wire)
            forged[place] ^= rng.randint(1, 255)
            with pytest.raises(BadRef):
                creator.get(forged)
    for wrong in (b"", wire[:-1], wire + b"x", bytes(24), b"\xff" * 24):
        with pytest.raises(BadRef):
            creator.map_ref(wrong)
    assert creator.get(wire) == b"abc"


def test_a_read_only_mapping_refuses_writes_only(creator, consumer):
    address = filled(creator, b"a")
    mapped = consumer.map_ref(creator.create_ref(address, PAGE).to_bytes(), read_only=True)
    with pytest.raises(ReadOnly):
        consumer.rwrite(mapped, b"b")
    with pytest.raises(PermissionError):
        consumer.rwrite(mapped, b"b" * PAGE)
    assert consumer.read(mapped, 3) == b"aaa"
    again = consumer.create_ref(mapped, PAGE)
    consumer.rfree(mapped)
    writable = creator.map_ref(again.to_bytes())
    creator.rwrite(writable, b"b")


def test_a_process_may_map_what_it_made_itself(creator):
    address = filled(creator, b"a")
    mapped = creator.map_ref(creator.create_ref(address, PAGE))
    creator.rwrite(mapped, b"b")
    assert creator.read(address, 1) + creator.read(mapped, 1) == b"ab"


# ---------------------------------------------------------------- ends


def allocate_and_share(there: There, pages: int) -> bytes:
    there.address = there.client.ralloc(pages * PAGE)
    there.client.rwrite(there.address, b"p" * pages * PAGE)
    there.refs = [there.client.create_ref(there.address, pages * PAGE) for _ in range(3)]
    there.client.put(b"q" * 10 * PAGE).to_bytes()
    return there.refs[0].to_bytes()  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["kill", "leave"])
def test_all_that_a_process_held_is_freed_when_it_ends(servers, creator, way):
    process = servers.process()
    wire = process.call(allocate_and_share, 50)
    mapped = creator.map_ref(wire)
    assert in_use(creator) == 60
    getattr(process, way)()
    until(lambda: in_use(creator) == 50)
    assert creator.read(mapped, 50 * PAGE) == b"p" * 50 * PAGE


def test_closing_returns_when_everything_is_freed(servers, creator):
    for _ in range(20):
        with dmrpc_net.attach(servers.addresses, secret=servers.secret) as other:
            filled(other, b"x", 100)
        assert in_use(creator) == 0


def test_process_ids_are_never_given_twice(servers):
    pids = []
    for _ in range(30):
        with dmrpc_net.attach(servers.addresses, secret=servers.secret) as client:
            pids.append(client.pid)
    assert len(set(pids)) == 30


def test_compound_calls_do_what_their_parts_do(creator, consumer):
    data = bytes(range(256)) * 50
    with Counted(creator) as counted:
        ref, address = creator.put(data, keep=True)
    assert counted["requests"] == 2 + 1 - 1  # the one, and the look at the counters
    assert creator.read(address, len(data)) == data
    creator.rwrite(address, b"changed")
    into = bytearray(100)
    consumer.get(ref.to_bytes(), into, offset=256, keep=True)
    assert into == bytes(range(100))
    assert consumer.get(ref.to_bytes(), offset=12_000, size=10, keep=True) == data[12_000:12_010]
    assert consumer.get(ref.to_bytes()) == data
    assert creator.audit()["nr_refs"] == 0


def test_a_ref_that_was_got_gives_its_pages_back_soon(creator, consumer):
    wire = creator.put(b"a" * 10 * PAGE).to_bytes()
    consumer.get(wire)
    consumer.ping(0, 0)  # says that the answer has arrived
    assert in_use(creator) == 0
    wire = creator.put(b"a" * 10 * PAGE).to_bytes()
    consumer.get(wire)
    until(lambda: in_use(creator) == 0)  # or nobody says so, and it takes a little longer

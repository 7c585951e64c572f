"""The interface: create_ref, map_ref, and what a Ref can do. Its bytes on the wire: test_api_ref_bytes.py."""

import gc
import weakref
from collections.abc import Callable

import pytest

from dmrpc_cxl import Buffer, Host, Ref
from dmrpc_cxl.errors import BadAddress, BadSize, BufferInUse, OutOfFrames, RefConsumed
from tests.crews import Crew, attach, in_host
from tests.fabrics import At
from tests.pictures import nothing_changes


def filled(at: At, size: int) -> Buffer:
    """Return a buffer with different bytes at neighbouring places."""
    buffer = at.host.ralloc(size)
    buffer.numpy()[:] = [(7 * place + place // 256) % 251 for place in range(size)]
    return buffer


def live_refs(host: Host) -> int:
    from dmrpc_cxl.fabric import device

    with device.open(host.fabric, writable=False) as opened:
        return int(opened.audit()["live_refs"])


# ---------------------------------------------------------------- create_ref: sharing

FORMS: dict[str, Callable[[Host, Buffer], Ref]] = {
    "buffer": lambda host, buffer: host.create_ref(buffer),
    "address and size": lambda host, buffer: host.create_ref(buffer.address, len(buffer)),
    "size by name": lambda host, buffer: host.create_ref(buffer.address, size=len(buffer)),
    "tuple": lambda host, buffer: host.create_ref((buffer.address, len(buffer))),
    "array": lambda host, buffer: host.create_ref(buffer.numpy("u1")),
    "memoryview": lambda host, buffer: host.create_ref(memoryview(buffer)),
}


@pytest.mark.parametrize("form", FORMS)
@in_host
def test_a_ref_denotes_what_the_bytes_were_when_it_was_made(at: At, form: str) -> None:
    buffer = filled(at, 10_000)
    content = bytes(buffer)
    ref = FORMS[form](at.host, buffer)
    assert (len(ref), ref.nbytes, ref.host) == (10_000, 10_000, at.host)
    assert "10000 bytes" in repr(ref)
    memoryview(buffer)[:] = bytes(10_000)
    with at.host.map_ref(ref) as received:
        assert bytes(received) == content
    assert bytes(buffer) == bytes(10_000)


@pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)
@in_host
def test_any_part_of_a_buffer_can_be_shared(at: At) -> None:
    page = at.host.page_size
    buffer = filled(at, 2 * page + 100)
    content = bytes(buffer)
    for start in (0, 1, page - 1, page, page + 1, 2 * page, 2 * page + 99):
        for size in (1, 2, page - 1, page, page + 1):
            if start + size > len(content):
                continue
            with at.host.map_ref(at.host.create_ref(buffer.address + start, size)) as part:
                assert bytes(part) == content[start : start + size]
                memoryview(part)[:] = bytes(size)
    assert bytes(buffer) == content


@in_host
def test_a_range_that_is_not_all_in_one_buffer_is_refused(at: At) -> None:
    page = at.host.page_size
    buffer = at.host.ralloc(2 * page)
    beyond = at.host.ralloc(2 * page)  # likely right behind
    start = min(buffer.address, beyond.address)
    sizes = (0, -1, 2 * page + 1, 4 * page, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70)
    with nothing_changes(at.host.fabric):
        for size in sizes:
            with pytest.raises(BadSize):
                at.host.create_ref(start, size)
            with pytest.raises(BadSize):
                at.host.create_ref((start + 1, size - 1 if size > 0 else size))
    del buffer, beyond


@pytest.mark.parametrize("address", [0, 1, 4096, 1 << 47, (1 << 64) - 1])
@in_host
def test_an_address_elsewhere_is_refused(at: At, address: int) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(BadAddress):
        at.host.create_ref(address, 1)


@in_host
def test_an_address_needs_a_size_and_nothing_else_takes_one(at: At) -> None:
    buffer = at.host.ralloc(100)
    with nothing_changes(at.host.fabric):
        with pytest.raises(BadSize):
            at.host.create_ref(buffer.address)
        for target in (buffer, memoryview(buffer), buffer.numpy(), (buffer.address, 100)):
            with pytest.raises(TypeError):
                at.host.create_ref(target, 100)
        for target in (None, "text", 1.5, {}, object()):
            with pytest.raises(TypeError):
                at.host.create_ref(target)
        with pytest.raises(ValueError, match="unpack"):
            at.host.create_ref((buffer.address, 100, 0))


@in_host
def test_a_buffer_of_another_host_is_refused(at: At) -> None:
    with attach(at) as other:
        theirs = other.ralloc(100)
        with nothing_changes(at.host.fabric):
            for target in (theirs, theirs.numpy(), (theirs.address, 100)):
                with pytest.raises(BadAddress):
                    at.host.create_ref(target)
            with pytest.raises(BadAddress):
                at.host.create_ref(theirs, move=True)
            with pytest.raises(BadAddress):
                at.host.rfree(theirs)
            with pytest.raises(BadAddress):
                at.host.rfree(theirs.address)
        theirs.free()


# ---------------------------------------------------------------- create_ref: moving

MOVES: dict[str, Callable[[Host, Buffer], Ref]] = {
    "buffer": lambda host, buffer: host.create_ref(buffer, move=True),
    "address": lambda host, buffer: host.create_ref(buffer.address, move=True),
    "address and size": lambda host, buffer: host.create_ref(
        buffer.address, len(buffer), move=True
    ),
    "tuple": lambda host, buffer: host.create_ref((buffer.address, len(buffer)), move=True),
}


@pytest.mark.parametrize("form", MOVES)
@in_host
def test_a_moved_buffer_is_gone_and_the_ref_has_it(at: At, form: str) -> None:
    buffer = filled(at, 10_000)
    content, address = bytes(buffer), buffer.address
    before = at.host.stats()
    ref = MOVES[form](at.host, buffer)
    after = at.host.stats()
    assert after["mappings"] == before["mappings"] - 1
    assert after["protect_calls"] == before["protect_calls"]
    assert buffer.freed
    with nothing_changes(at.host.fabric):
        for use in (
            buffer.free,
            lambda: memoryview(buffer),
            lambda: at.host.rfree(address),
            lambda: at.host.create_ref(buffer, move=True),
        ):
            with pytest.raises(BadAddress):
                use()
    received = at.host.map_ref(ref)
    assert received.exclusive
    assert bytes(received) == content


@in_host
def test_a_move_takes_the_whole_buffer_or_nothing(at: At) -> None:
    buffer = filled(at, 10_000)
    with nothing_changes(at.host.fabric):
        for size in (0, 1, 9_999, 10_001, 12_288):
            with pytest.raises(BadSize):
                at.host.create_ref(buffer.address, size, move=True)
        for address in (buffer.address + 1, buffer.address + 4096, 0):
            with pytest.raises(BadAddress):
                at.host.create_ref(address, move=True)
    assert not buffer.freed


@in_host
def test_a_buffer_with_views_does_not_move(at: At) -> None:
    buffer = filled(at, 10_000)
    view = memoryview(buffer)
    with nothing_changes(at.host.fabric):
        for form in MOVES.values():
            with pytest.raises(BufferInUse):
                form(at.host, buffer)
        for target in (view, view[1:2], buffer.numpy()):
            with pytest.raises(BufferInUse):
                at.host.create_ref(target, move=True)
    del target  # the array is a view, too
    assert view[1] == 7
    view[1] = 8
    view.release()
    at.host.create_ref(buffer, move=True)


# ---------------------------------------------------------------- map_ref


@in_host
def test_map_ref_gives_a_writable_buffer_and_uses_the_ref_up(at: At) -> None:
    buffer = filled(at, 5000)
    ref = at.host.create_ref(buffer)
    received = at.host.map_ref(ref)
    assert (len(received), received.host, received.freed) == (5000, at.host, False)
    assert not memoryview(received).readonly
    with nothing_changes(at.host.fabric):
        for use in (lambda: at.host.map_ref(ref), ref.to_bytes, ref.clone, ref.accept):
            with pytest.raises(RefConsumed) as caught:
                use()
            assert isinstance(caught.value, ValueError)
        assert ref.drop() is False
    assert "spent" in repr(ref)
    assert live_refs(at.host) == 0


@in_host
def test_a_ref_can_be_given_to_another_host_of_the_same_process(at: At) -> None:
    buffer = filled(at, 5000)
    with attach(at) as other:
        ref = at.host.create_ref(buffer)
        with other.map_ref(ref) as received:
            assert received.host is other
            memoryview(received)[0] = 9
            assert bytes(received)[1:] == bytes(buffer)[1:]
        assert bytes(buffer)[0] == 0
        with pytest.raises(RefConsumed):
            at.host.map_ref(ref)


@pytest.mark.parametrize("crew", ["scarce"], indirect=True)
@pytest.mark.parametrize(
    "how", [{"copy": True}, {"reserve": True}, {"copy": True, "reserve": True}]
)
def test_mapping_without_frames_leaves_the_ref_good(crew: Crew, how: dict[str, bool]) -> None:
    creator, mapper, hog = crew[:3]
    creator.ralloc("buffer", 8 * crew.page_size)
    creator.write("buffer", b"made")
    wire = creator.create_ref("buffer")
    hog.call(take_everything)
    mapper.call(fail_to_map, wire, how)
    hog.call(let_go)
    mapper.map_ref("buffer", wire, **how)
    assert mapper.read("buffer", 4) == b"made"


def take_everything(at: At) -> None:
    at.held = []
    with pytest.raises(OutOfFrames):
        while True:
            at.held.append(at.host.ralloc(at.host.page_size, zero=False))


def let_go(at: At) -> None:
    at.held.clear()


def fail_to_map(at: At, wire: bytes, how: dict[str, bool]) -> None:
    ref = Ref.from_bytes(wire, at.host)
    for source in (ref, wire):
        with (
            nothing_changes(at.host.fabric, taker=at.host.id),
            pytest.raises(OutOfFrames) as caught,
        ):
            at.host.map_ref(source, **how)
        assert isinstance(caught.value, MemoryError)
    assert at.host.stats()["reserved_frames"] == 0


# ---------------------------------------------------------------- accept, clone, drop


@in_host
def test_accept_is_idempotent_and_says_who_holds_the_ref(at: At) -> None:
    buffer = filled(at, 5000)
    with attach(at) as other:
        sent = at.host.create_ref(buffer)
        received = Ref.from_bytes(sent.to_bytes(), other)
        assert "not accepted" in repr(received)
        assert received.accept() is received
        assert "held" in repr(received)
        wire = received.to_bytes()
        assert received.accept().to_bytes() == wire
        assert wire != sent.to_bytes()
        for use in (sent.accept, sent.clone, lambda: at.host.map_ref(sent)):
            with pytest.raises(RefConsumed):
                use()
        assert sent.drop() is False
        with other.map_ref(received) as mapped:
            assert bytes(mapped) == bytes(buffer)


@in_host
def test_a_ref_of_ones_own_is_accepted_already(at: At) -> None:
    ref = at.host.create_ref(filled(at, 10))
    wire, before = ref.to_bytes(), at.host.stats()["accept_calls"]
    assert ref.accept() is ref
    assert ref.to_bytes() == wire
    assert at.host.stats()["accept_calls"] == before
    assert Ref.from_bytes(wire).drop() is True
    with pytest.raises(RefConsumed):
        Ref.from_bytes(wire).accept()


@in_host
def test_clones_are_independent(at: At) -> None:
    buffer = filled(at, 5000)
    content = bytes(buffer)
    ref = at.host.create_ref(buffer, move=True)
    clones = [ref.clone() for _ in range(20)]
    assert len({clone.to_bytes() for clone in clones} | {ref.to_bytes()}) == 21
    assert {len(clone) for clone in clones} == {5000}
    assert ref.drop()
    mapped = [at.host.map_ref(clone) for clone in clones[:10]]
    for number, one in enumerate(mapped):
        memoryview(one)[:] = bytes([number]) * 5000
    for clone in clones[10:]:
        with at.host.map_ref(clone) as one:
            assert bytes(one) == content
    assert all(bytes(one) == bytes([number]) * 5000 for number, one in enumerate(mapped))


@in_host
def test_drop_releases_once(at: At) -> None:
    ref = at.host.create_ref(filled(at, 10))
    drops = at.host.stats()["drop_calls"]
    assert ref.drop() is True
    assert ref.drop() is False
    assert at.host.stats()["drop_calls"] == drops + 1
    with nothing_changes(at.host.fabric):
        for use in (ref.clone, ref.accept, ref.to_bytes, lambda: at.host.map_ref(ref)):
            with pytest.raises(RefConsumed):
                use()


# ---------------------------------------------------------------- garbage collection


@in_host
def test_a_ref_that_nobody_was_given_is_dropped_with_its_object(at: At) -> None:
    buffer = filled(at, 10)
    ref = at.host.create_ref(buffer)
    gone = weakref.ref(ref)
    assert live_refs(at.host) == 1
    del ref
    assert gone() is None
    assert live_refs(at.host) == 0
    kept = at.host.create_ref(buffer)
    clone = kept.clone()
    del kept
    assert live_refs(at.host) == 1
    del clone
    assert live_refs(at.host) == 0


@in_host
def test_a_ref_in_cyclic_garbage_is_dropped(at: At) -> None:
    cycle: list[object] = [at.host.create_ref(filled(at, 10), move=True)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert live_refs(at.host) == 0


@in_host
def test_a_ref_whose_bytes_were_given_away_outlives_its_object(at: At) -> None:
    buffer = filled(at, 10)
    wire = at.host.create_ref(buffer).to_bytes()
    gc.collect()
    assert live_refs(at.host) == 1
    received = Ref.from_bytes(wire)
    del received  # never accepted: still this host's to give away
    assert live_refs(at.host) == 1
    with at.host.map_ref(wire) as mapped:
        assert bytes(mapped) == bytes(buffer)


@in_host
def test_an_accepted_ref_is_dropped_with_its_object(at: At) -> None:
    buffer = filled(at, 10)
    with attach(at) as other:
        received = Ref.from_bytes(at.host.create_ref(buffer).to_bytes(), other).accept()
        assert live_refs(at.host) == 1
        del received
        assert live_refs(at.host) == 0

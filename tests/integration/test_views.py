"""Views: what view_ref returns behaves like what map_ref returns, and costs nothing for each page.

The counts of a view stay with its Ref, so the audit sees a live Ref where map_ref would have left
mapped pages. A store that faults, or sharing, turns a view into a mapping.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
from typing import Any

import pytest

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadRef, BufferInUse, ForkedError, RefConsumed
from tests.crews import Crew, Member, attach, in_host
from tests.fabrics import At, Fabric

SIZES = pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)
UNTOUCHED = ("views_materialised", "wp_faults", "missing_faults", "syscalls", "frames_copied")


def made(crew: Crew, pages: int = 4) -> tuple[Member, Member, bytes]:
    """A creator that keeps a buffer "made" and has shared it, a receiver, and the Ref."""
    creator, receiver = crew[:2]
    creator.ralloc("made", pages * crew.page_size)
    creator.write("made", b"made" * (pages * crew.page_size // 4))
    return creator, receiver, creator.create_ref("made")


def given(crew: Crew, pages: int = 4) -> tuple[Member, Member, bytes]:
    """The same, but the creator has moved the buffer: the Ref is exclusive."""
    creator, receiver = crew[:2]
    creator.ralloc("made", pages * crew.page_size)
    creator.write("made", b"made" * (pages * crew.page_size // 4))
    return creator, receiver, creator.create_ref("made", move=True)


def is_exclusive(at: At, name: str) -> bool:
    return bool(getattr(at, name).exclusive)


# ---------------------------------------------------------------- isolation


@SIZES
def test_what_the_receiver_writes_nobody_else_sees(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    other, copy = creator.clone(wire)
    third = crew[2]
    third.map_ref("page", copy)
    receiver.view_ref("page", other)
    receiver.write("page", b"mine", crew.page_size + 8)
    assert receiver.read("page", 12, crew.page_size) == b"mademademine"
    for holder, name in ((creator, "made"), (third, "page")):
        assert holder.read(name) == b"made" * crew.page_size
    crew.sound(live_refs=0)


@SIZES
def test_what_the_creator_writes_the_receiver_does_not_see(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    receiver.view_ref("page", wire)
    creator.write("made", b"more" * crew.page_size)
    assert receiver.read("page") == b"made" * crew.page_size
    crew.sound(live_refs=1)
    receiver.rfree("page")
    assert creator.read("made") == b"more" * crew.page_size


def test_what_a_third_holder_writes_a_view_does_not_show(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    wire, copy = creator.clone(wire)
    third = crew[2]
    receiver.view_ref("page", wire)
    third.view_ref("page", copy)
    third.write("page", b"mine")
    third.write("page", b"mine", 2 * crew.page_size)
    assert receiver.read("page") == creator.read("made") == b"made" * crew.page_size


def test_a_view_outlives_the_creator_and_its_buffer(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    receiver.view_ref("page", wire)
    creator.rfree("made")
    creator.ralloc("other", 100 * crew.page_size)
    creator.write("other", b"x" * 100 * crew.page_size)
    assert receiver.read("page") == b"made" * crew.page_size
    creator.kill()
    crew.wait_until_reclaimed(creator)
    assert receiver.read("page") == b"made" * crew.page_size
    receiver.write("page", b"mine")
    receiver.rfree("page")
    crew.sound(in_use=0)


def test_an_exclusive_view_is_written_without_a_fault_and_read_by_the_next_holder(
    crew: Crew,
) -> None:
    receiver = crew[1]
    receiver.call(warm, given(crew)[2])
    creator, _, wire = given(crew)
    with receiver.counting() as added:
        receiver.view_ref("page", wire)
        receiver.write("page", b"mine", 5)
    assert [added[name] for name in UNTOUCHED] == [0] * len(UNTOUCHED)
    assert receiver.call(is_exclusive, "page")
    wire = receiver.create_ref("page", move=True)
    [ref] = crew.refs()
    assert ref["exclusive"]
    creator.view_ref("back", wire)
    assert creator.call(is_exclusive, "back")
    assert creator.read("back", 12) == b"mademmineade"
    crew.sound(mapped_pages=0, live_refs=1)


def warm(at: At, wire: bytes) -> None:
    """View and free, so that the owned window is writable there."""
    at.host.view_ref(wire).free()


# ---------------------------------------------------------------- what it costs


@SIZES
def test_reading_a_view_takes_no_fault_and_no_system_call(crew: Crew) -> None:
    _, receiver, wire = made(crew, 64)
    with receiver.counting() as added:
        receiver.view_ref("page", wire)
        assert receiver.read("page") == b"made" * 16 * crew.page_size
        receiver.rfree("page")
    assert [added[name] for name in UNTOUCHED] == [0] * len(UNTOUCHED)
    assert (added["map_views"], added["map_ref_calls"], added["rfree_calls"]) == (1, 0, 1)


@SIZES
def test_the_first_store_takes_one_fault_and_copies_one_page(crew: Crew) -> None:
    _, receiver, wire = made(crew, 8)
    receiver.view_ref("page", wire)
    crew.sound(live_refs=1, mapped_pages=8, ref_pages=8)
    with receiver.counting() as added:
        receiver.write("page", b"mine", 3 * crew.page_size)
        receiver.write("page", b"mine", 3 * crew.page_size + 100)
    assert (added["wp_faults"], added["views_materialised"], added["frames_copied"]) == (1, 1, 1)
    crew.sound(live_refs=0, mapped_pages=16, ref_pages=0)
    with receiver.counting() as added:
        receiver.write("page", b"mine", 4 * crew.page_size)
    assert (added["wp_faults"], added["views_materialised"]) == (1, 0)


def test_the_last_holders_first_store_copies_nothing(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    receiver.view_ref("page", wire)
    creator.rfree("made")
    with receiver.counting() as added:
        receiver.write("page", b"mine")
    assert (added["frames_copied"], added["inplace_upgrades"]) == (0, 1)
    assert receiver.read("page", 8) == b"minemade"


@pytest.mark.parametrize("share", [made, given])
def test_a_ref_is_viewed_and_passed_on_through_three_hosts_and_no_page_is_touched(
    crew: Crew, share: Any
) -> None:
    _, _, wire = share(crew, 256)
    before = crew.refs()
    for member in crew[1:4]:
        with member.counting() as added:
            member.view_ref("page", wire)
            wire = member.create_ref("page", move=True)
        assert [added[name] for name in UNTOUCHED] == [0] * len(UNTOUCHED)
        assert (added["map_views"], added["move_ref_calls"], added["vm_pieces"]) == (1, 1, 0)
    [was], [is_now] = before, crew.refs()
    assert is_now["generation"] == was["generation"] + 3
    assert (is_now["entry"], is_now["exclusive"]) == (was["entry"], share is given)
    crew.sound(live_refs=1, ref_pages=256, mapped_pages=256 if share is made else 0)
    crew[0].map_ref("back", wire)
    assert crew[0].read("back") == b"made" * 64 * crew.page_size


def test_views_take_no_kernel_mappings_and_no_frames(crew: Crew) -> None:
    creator, receiver = crew[:2]
    wires = []
    for number in range(40):
        creator.ralloc(f"{number}", crew.page_size)
        wires.append(creator.create_ref(f"{number}"))
    with receiver.counting() as added:
        for number, wire in enumerate(wires):
            receiver.view_ref(f"{number}", wire)
    assert (added["mappings"], added["vm_pieces"], added["free_frames"]) == (40, 0, 0)


# ---------------------------------------------------------------- Refs


@pytest.mark.parametrize("share", [made, given])
def test_bytes_that_were_viewed_are_stale_for_everybody(crew: Crew, share: Any) -> None:
    creator, receiver, wire = share(crew)
    receiver.view_ref("page", wire)
    for member in (creator, receiver, crew[2]):
        for use in (member.view_ref, member.map_ref):
            with pytest.raises(RefConsumed):
                use("again", wire)
        for ask in (member.accept, member.clone):
            with pytest.raises(RefConsumed):
                ask(wire)
        assert not member.drop(wire)
    assert receiver.read("page", 4) == b"made"


@in_host
def test_a_ref_of_ones_own_is_used_up_by_viewing_it(at: At) -> None:
    buffer = at.host.ralloc(10)
    memoryview(buffer)[:4] = b"made"
    ref = at.host.create_ref(buffer)
    wire = ref.to_bytes()
    again = Ref.from_bytes(wire, at.host)
    view = at.host.view_ref(ref)
    assert "spent" in repr(ref)
    for used in (ref, again, wire):
        with pytest.raises(RefConsumed):
            at.host.view_ref(used)
        with pytest.raises(RefConsumed):
            at.host.map_ref(used)
    assert not ref.drop()
    assert not again.drop()
    del ref, again
    gc.collect()
    assert bytes(view)[:4] == b"made"
    view.free()
    buffer.free()


@in_host
def test_what_is_no_ref_is_refused(at: At) -> None:
    for data in (b"", b"x" * 40, b"x" * 41):
        with pytest.raises(BadRef):
            at.host.view_ref(data)


@in_host
def test_a_ref_to_part_of_a_page_is_viewed_at_its_place(at: At) -> None:
    buffer = at.host.ralloc(3 * at.host.page_size)
    memoryview(buffer)[100:104] = b"part"
    ref = at.host.create_ref(buffer.address + 100, at.host.page_size + 5)
    before = at.host.stats()["map_views"]
    view = at.host.view_ref(ref)
    assert at.host.stats()["map_views"] == before + 1
    assert view.address % at.host.page_size == 100
    assert (len(view), bytes(view)[:4]) == (at.host.page_size + 5, b"part")
    memoryview(view)[:4] = b"mine"
    assert bytes(memoryview(buffer)[96:106]) == bytes(4) + b"part" + bytes(2)


@in_host
def test_holes_and_scattered_frames_are_mapped_instead(at: At) -> None:
    page = at.host.page_size
    lazy = at.host.ralloc(3 * page, lazy=True)
    torn = at.host.ralloc(3 * page)
    keep = at.host.create_ref(torn)
    memoryview(torn)[page] = 7  # now its middle page shows another frame
    for buffer in (lazy, torn):
        before = at.host.stats()
        view = at.host.view_ref(at.host.create_ref(buffer))
        after = at.host.stats()
        assert (after["map_views"], after["map_ref_calls"], after["map_scattered"]) == (
            before["map_views"], before["map_ref_calls"] + 1, before["map_scattered"] + 1,
        )  # fmt: skip
        assert bytes(view) == bytes(buffer)
        memoryview(view)[0] = 9
        assert buffer.numpy()[0] == 0
        del buffer
    del keep


def test_a_view_is_shared_on_in_whole_and_in_part(crew: Crew) -> None:
    _, receiver, wire = made(crew)
    third = crew[2]
    receiver.view_ref("page", wire)
    part = receiver.create_ref("page", crew.page_size + 4, 100)
    whole = receiver.create_ref("page")
    crew.sound(live_refs=2, mapped_pages=8, ref_pages=5)
    assert receiver.stats()["views_materialised"] >= 1
    third.view_ref("part", part)
    receiver.write("page", b"mine" * crew.page_size)
    third.view_ref("whole", whole)
    assert third.read("part") == b"made" * 25
    assert third.read("whole") == b"made" * crew.page_size


def test_an_exclusive_view_that_is_shared_is_no_longer_exclusive(crew: Crew) -> None:
    creator, receiver, wire = given(crew)
    receiver.view_ref("page", wire)
    receiver.write("page", b"mine")
    wire = receiver.create_ref("page")
    assert not receiver.call(is_exclusive, "page")
    creator.view_ref("page", wire)
    receiver.write("page", b"more")
    assert creator.read("page", 8) == b"minemade"
    assert receiver.read("page", 8) == b"moremade"


# ---------------------------------------------------------------- several in one host


@pytest.mark.parametrize("first", ["view_ref", "map_ref"])
@pytest.mark.parametrize("second", ["view_ref", "map_ref"])
def test_frames_that_a_host_shows_already_are_shown_again_elsewhere(
    crew: Crew, first: str, second: str
) -> None:
    creator, receiver, wire = made(crew)
    wire, copy = creator.clone(wire)
    getattr(receiver, first)("one", wire)
    getattr(receiver, second)("two", copy)
    assert receiver.call(address_of, "one") != receiver.call(address_of, "two")
    receiver.write("one", b"one!")
    receiver.write("two", b"two!", crew.page_size)
    assert receiver.read("one", 4) == b"one!"
    assert receiver.read("two", 4) == b"made"
    assert receiver.read("one", 4, crew.page_size) == b"made"
    receiver.rfree("one")
    assert receiver.read("two", 4, crew.page_size) == b"two!"
    assert creator.read("made") == b"made" * crew.page_size
    receiver.rfree("two")


def address_of(at: At, name: str) -> int:
    return int(getattr(at, name).address)


@in_host
def test_the_creator_may_view_its_own_ref_beside_its_buffer(at: At) -> None:
    buffer = at.host.ralloc(2 * at.host.page_size)
    view = at.host.view_ref(at.host.create_ref(buffer))
    other = at.host.view_ref(at.host.create_ref(buffer))
    part = at.host.view_ref(at.host.create_ref(buffer.address + at.host.page_size, 8))
    for number, one in enumerate((view, other, part, buffer)):
        memoryview(one)[0] = number + 1
    firsts = [memoryview(one)[0] for one in (view, other, part, buffer)]
    assert firsts == [1, 2, 3, 4]
    assert memoryview(buffer)[at.host.page_size] == 0


@in_host
def test_frames_come_back_and_are_used_anew_beside_views(at: At) -> None:
    """Views and buffers of all sizes come and go; none ever shows what another one holds."""
    kept: list[tuple[Any, int]] = []
    for step in range(400):
        pages = step * 7 % 5 + 1
        buffer = at.host.ralloc(pages * at.host.page_size, zero=False)
        buffer.numpy()[:] = step % 251
        kept.append((buffer, step % 251))
        kept.append((at.host.view_ref(at.host.create_ref(buffer, move=step % 3 == 0)), step % 251))
        if step % 3 == 0:
            del kept[-2]
        if step % 4 == 1:
            view, value = kept[step % len(kept)]
            memoryview(view)[len(view) // 2] = value
        del buffer
        while len(kept) > 30:
            one, value = kept.pop(step * 11 % len(kept))
            assert (one.numpy() == value).all()
            if step % 2:
                at.host.create_ref(one, move=True).drop()
            else:
                one.free()
            del one
    for one, value in kept:
        assert (one.numpy() == value).all()
    del kept, one
    gc.collect()


# ---------------------------------------------------------------- the end of a view


@pytest.mark.parametrize("share", [made, given])
def test_a_freed_view_gives_its_counts_back(crew: Crew, share: Any) -> None:
    creator, receiver, wire = share(crew)
    receiver.view_ref("page", wire)
    receiver.rfree("page")
    crew.sound(live_refs=0, ref_pages=0, in_use=4 if share is made else 0)
    if share is made:
        with creator.counting() as added:
            creator.write("made", b"more")
        assert added["frames_copied"] == 0


@in_host
def test_a_forgotten_view_is_freed_with_the_last_array_on_it(at: At) -> None:
    buffer = at.host.ralloc(100)
    array = at.host.view_ref(at.host.create_ref(buffer)).numpy()
    mappings = at.host.stats()["mappings"]
    assert array[0] == 0
    del array
    assert at.host.stats()["mappings"] == mappings - 1


@in_host
def test_a_view_with_arrays_on_it_is_neither_freed_nor_moved(at: At) -> None:
    view = at.host.view_ref(at.host.create_ref(at.host.ralloc(100), move=True))
    with memoryview(view):
        with pytest.raises(BufferInUse):
            view.free()
        with pytest.raises(BufferInUse):
            at.host.create_ref(view, move=True)
    with view:
        pass
    assert view.freed


@in_host
def test_detach_lets_go_of_views(at: At) -> None:
    buffer = at.host.ralloc(100)
    other = attach(at)
    views = [other.view_ref(at.host.create_ref(buffer).to_bytes()) for _ in range(3)]
    views.append(other.view_ref(at.host.create_ref(at.host.ralloc(5), move=True).to_bytes()))
    memoryview(views[1])[0] = 1
    other.detach()
    assert all(view.freed for view in views)
    before = at.host.stats()["frames_copied"]
    memoryview(buffer)[0] = 1
    assert at.host.stats()["frames_copied"] == before  # nobody else holds it


@pytest.mark.parametrize("share", [made, given])
def test_a_host_that_is_killed_lets_go_of_its_views(crew: Crew, share: Any) -> None:
    creator, receiver, wire = share(crew)
    receiver.view_ref("page", wire)
    receiver.write("page", b"mine") if share is given else None
    receiver.kill()
    crew.wait_until_reclaimed(receiver)
    crew.sound(live_refs=0, in_use=4 if share is made else 0)
    with pytest.raises(RefConsumed):
        creator.view_ref("page", wire)
    if share is made:
        assert creator.read("made") == b"made" * crew.page_size


def test_a_host_killed_after_a_store_to_a_view_loses_only_its_copy(crew: Crew) -> None:
    creator, receiver, wire = made(crew)
    receiver.view_ref("page", wire)
    receiver.write("page", b"mine")
    receiver.kill()
    crew.wait_until_reclaimed(receiver)
    crew.sound(live_refs=0, in_use=4)
    assert creator.read("made") == b"made" * crew.page_size


@in_host
def test_a_forked_child_is_refused(at: At) -> None:
    view = at.host.view_ref(at.host.create_ref(at.host.ralloc(100)))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        refused = 0
        for call in (lambda: memoryview(view), view.free, lambda: at.host.view_ref(bytes(40)),
                     lambda: at.host.ref_is_held(bytes(40)), lambda: at.host.drop_refs(b"")):  # fmt: skip
            try:
                call()
            except ForkedError:
                refused += 1
        os.write(write, bytes([refused]))
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"\5"
    os.close(read)
    os.close(write)
    memoryview(view)[0] = 1
    view.free()


# ---------------------------------------------------------------- stores of all kinds


@pytest.mark.parametrize("crew", ["4K", "16K"], indirect=True)
@pytest.mark.parametrize("share", [made, given])
def test_the_kernel_stores_into_a_view_for_this_host_alone(crew: Crew, share: Any) -> None:
    creator, receiver, wire = share(crew)
    if share is made:
        wire, copy = creator.clone(wire)
        creator.map_ref("copy", copy)
    receiver.view_ref("page", wire)
    receiver.call(receive, "page")
    assert receiver.read("page", 1000, crew.page_size - 500) == bytes(i % 251 for i in range(1000))
    if share is made:
        for name in ("made", "copy"):
            assert creator.read(name) == b"made" * crew.page_size


def receive(at: At, name: str) -> None:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(bytes(i % 251 for i in range(1000)))
        start = at.host.page_size - 500
        view = memoryview(getattr(at, name))[start : start + 1000]
        assert two.recv_into(view, 1000, socket.MSG_WAITALL) == 1000


@in_host
def test_threads_that_store_to_a_view_at_once_materialise_it_once(at: At) -> None:
    page, nr = at.host.page_size, 8
    buffer = at.host.ralloc(nr * page)
    buffer.numpy()[:] = 5
    for _ in range(30):
        view = at.host.view_ref(at.host.create_ref(buffer))
        before = at.host.stats()["views_materialised"]
        start = threading.Barrier(nr)
        array = view.numpy()

        def store(i: int, array: Any = array, start: threading.Barrier = start) -> None:
            start.wait()
            array[i * page : i * page + 9] = i
            array[(i + 1) % nr * page + 100] = i

        threads = [threading.Thread(target=store, args=(i,)) for i in range(nr)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert at.host.stats()["views_materialised"] == before + 1
        assert [array[i * page] for i in range(nr)] == list(range(nr))
        assert [array[(i + 1) % nr * page + 100] for i in range(nr)] == list(range(nr))
        assert (buffer.numpy() == 5).all()
        del array, store
        view.free()


@in_host
def test_threads_may_view_pass_on_and_free_at_once(at: At) -> None:
    buffer = at.host.ralloc(4 * at.host.page_size)
    buffer.numpy()[:] = 3
    wrong = []

    def work(number: int) -> None:
        for step in range(150):
            view = at.host.view_ref(at.host.create_ref(buffer))
            if (step + number) % 3 == 0:
                view.numpy()[step] = 9
            if (step + number) % 2 == 0:
                view = at.host.view_ref(at.host.create_ref(view, move=True))
            if view.numpy()[-1] != 3:
                wrong.append(step)
            view.free()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (buffer.numpy() == 3).all()


# ---------------------------------------------------------------- strict


def test_a_strict_host_protects_what_it_viewed_alone_and_passes_on(fabric: Fabric) -> None:
    strict, other = fabric.host(strict=True), fabric.host()
    for _ in range(3):
        wire = other.call(pass_on, b"")
        before = strict.call(protections)
        wire = strict.call(pass_on, wire)
        assert strict.call(protections) == before + 1
        wire = strict.call(pass_on, wire)  # writable again
        assert strict.call(take_in, wire) == b"passed"


def protections(at: At) -> int:
    return at.host.stats()["protect_calls"]


def pass_on(at: At, wire: bytes) -> bytes:
    """Make or view a buffer, write to it, move it on."""
    buffer = at.host.view_ref(wire) if wire else at.host.ralloc(3 * at.host.page_size)
    memoryview(buffer)[:6] = b"passed"
    return at.host.create_ref(buffer, move=True).to_bytes()


def take_in(at: At, wire: bytes) -> bytes:
    with at.host.view_ref(wire) as view:
        return bytes(view)[:6]


# ---------------------------------------------------------------- Refs that were sent


@in_host
def test_a_ref_is_held_until_its_bytes_are_stale(at: At) -> None:
    host, buffer = at.host, at.host.ralloc(100)
    other = attach(at)
    wires = [host.create_ref(buffer).to_bytes() for _ in range(5)]
    assert all(host.ref_is_held(wire) and other.ref_is_held(wire) for wire in wires)
    Ref.from_bytes(wires[0], other).accept()
    other.map_ref(wires[1]).free()
    view = other.view_ref(wires[2])
    Ref.from_bytes(wires[3], other).drop()
    assert [host.ref_is_held(wire) for wire in wires] == [False] * 4 + [True]
    assert host.ref_is_held(memoryview(wires[4]))
    view.free()
    host.drop_refs(wires[4])
    other.detach()


@in_host
def test_bytes_that_are_no_ref_are_not_held(at: At) -> None:
    wire = at.host.create_ref(at.host.ralloc(100), move=True).to_bytes()
    for data in (b"", wire[:-1], wire + b"x", bytes(40), b"\xff" * 40):
        assert at.host.ref_is_held(data) is False
    for bit in range(320):
        bad = bytearray(wire)
        bad[bit // 8] ^= 1 << bit % 8
        assert at.host.ref_is_held(bytes(bad)) is False
        assert at.host.drop_refs(bad) == 0
    assert at.host.ref_is_held(wire) is True
    assert at.host.drop_refs(wire) == 1
    with pytest.raises(TypeError):
        at.host.ref_is_held("text")


@in_host
def test_drop_refs_drops_what_nobody_took_whoever_holds_it(at: At) -> None:
    host, buffer = at.host, at.host.ralloc(100)
    other = attach(at)
    wires = [host.create_ref(buffer).to_bytes() for _ in range(6)]
    accepted = Ref.from_bytes(wires[0], other).accept().to_bytes()
    with other.map_ref(wires[1]), other.view_ref(wires[2]):
        of_other = other.create_ref(other.ralloc(9), move=True).to_bytes()
        data = b"".join([*wires, of_other, bytes(40), of_other])
        assert host.drop_refs(memoryview(data)) == 4
        assert host.drop_refs(data) == 0
        assert host.drop_refs(b"") == 0
    assert other.ref_is_held(accepted)
    with pytest.raises(BadRef):
        host.drop_refs(accepted + b"x")
    assert host.ref_is_held(accepted)
    assert host.drop_refs(bytearray(accepted)) == 1
    memoryview(buffer)[0] = 1
    assert host.stats()["frames_copied"] == 0 or host.stats()["inplace_upgrades"] > 0
    other.detach()


def test_of_many_that_drop_the_same_refs_each_ref_is_dropped_by_one(crew: Crew) -> None:
    creator = crew[0]
    creator.ralloc("made", crew.page_size)
    data = b"".join(creator.create_ref("made") for _ in range(300))
    members = crew[:3]
    for member in members:
        member.start(drop_all, data)
    assert sum(member.result() for member in members) == 300
    crew.sound(live_refs=0, in_use=1)


def drop_all(at: At, data: bytes) -> int:
    return at.host.drop_refs(data)

"""The interface, call by call: allocating, freeing, and the Buffer.

For each: what it does, every error it documents, and that nothing has changed after the error.
Arrays, Refs and the host
itself have files of their own, test_api_*.py.
"""

import ctypes
import gc
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl import Buffer, Host, Ref
from dmrpc_cxl.errors import BadAddress, BadSize, BufferInUse, OutOfFrames
from tests.crews import attach, in_host
from tests.fabrics import At
from tests.pictures import nothing_changes

page_sizes = pytest.mark.parametrize("crew", ["4K", "16K", "64K"], indirect=True)


def test_every_public_name_has_a_test_in_these_files() -> None:
    here = Path(__file__).parent
    files = [
        *here.glob("test_api*.py"),
        *here.glob("test_rpc*.py"),
        here / "test_latency.py",
        here / "test_services.py",
        here / "test_views.py",
        here.parent / "rpc_peers.py",
        here.parent / "rpc_services.py",
    ]
    text = "".join(path.read_text() for path in files)
    inherited = {name for kind in (object, Exception) for name in dir(kind)}
    names = {
        name
        for kind in (Buffer, Host, Ref)
        for name in dir(kind)
        if name not in inherited and not name.startswith("_")
    }
    assert {"ralloc", "create_ref", "to_bytes", "stats", "views", "empty"} <= names
    called = set(re.findall(r"\.(\w+)", text))
    # For the layers above, whose own tests call them.
    inner = {"request", "fabric_id", "find_places", "secret", "move_viewed", "take_ref"}
    assert not names - called - inner, "no test calls these"


# ---------------------------------------------------------------- ralloc


@page_sizes
@in_host
def test_ralloc_gives_zeroed_writable_memory_at_a_page(at: At) -> None:
    page = at.host.page_size
    for size in (1, 2, page - 1, page, page + 1, 3 * page, 100_000):
        buffer = at.host.ralloc(size)
        assert buffer.address % 4096 == 0
        assert (len(buffer), buffer.nbytes) == (size, size)
        assert bytes(buffer) == bytes(size)
        view = memoryview(buffer)
        assert (view.readonly, view.format, view.shape, view.contiguous) == (
            False,
            "B",
            (size,),
            True,
        )
        view[:] = b"\xff" * size
        assert bytes(buffer) == b"\xff" * size
        del view
        buffer.free()


@page_sizes
@in_host
def test_ralloc_never_shows_what_was_there_before(at: At) -> None:
    page = at.host.page_size
    for _ in range(3):
        dirty = at.host.ralloc(40 * page)
        dirty.numpy()[:] = 0xEE
        address = dirty.address
        del dirty
        for lazy in (False, True):
            fresh = at.host.ralloc(40 * page, lazy=lazy)
            assert not fresh.numpy().any()
            fresh.numpy()[::page] = 1  # lazy pages get their frames now
            assert fresh.numpy().sum() == 40
            del fresh
        again = at.host.ralloc(40 * page, zero=False)
        if again.address == address:  # the same frames: unless asked otherwise they are not cleared
            assert again.numpy().any()
        del again


@in_host
def test_zero_false_saves_the_zeroing(at: At) -> None:
    before = at.host.stats()["bytes_zeroed"]
    unzeroed = at.host.ralloc(10 * at.host.page_size, zero=False)
    assert at.host.stats()["bytes_zeroed"] == before
    zeroed = at.host.ralloc(10 * at.host.page_size)
    assert at.host.stats()["bytes_zeroed"] == before + 10 * at.host.page_size
    del unzeroed, zeroed


@page_sizes
@in_host
def test_buffers_do_not_overlap(at: At) -> None:
    rng = np.random.default_rng(1)
    buffers = [at.host.ralloc(int(size)) for size in rng.integers(1, 5 * at.host.page_size, 50)]
    for number, buffer in enumerate(buffers):
        buffer.numpy()[:] = number
    for number, buffer in enumerate(buffers):
        assert (buffer.numpy() == number).all()
    spans = sorted((buffer.address, buffer.address + len(buffer)) for buffer in buffers)
    assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("lazy", [False, True])
@in_host
def test_ralloc_refuses_a_size_of_zero(at: At, lazy: bool) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(BadSize):
        at.host.ralloc(0, lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("size", [33 << 20, 1 << 40, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1])
@in_host
def test_ralloc_refuses_more_than_the_device_has_at_once(at: At, size: int, lazy: bool) -> None:
    granted = at.host.stats()["frames_granted"]
    with nothing_changes(at.host.fabric), pytest.raises(OutOfFrames):
        at.host.ralloc(size, lazy=lazy)
    assert at.host.stats()["frames_granted"] == granted


@pytest.mark.parametrize("size", [-1, 1 << 64, 1 << 70])
@in_host
def test_ralloc_refuses_what_is_no_size(at: At, size: int) -> None:
    with nothing_changes(at.host.fabric), pytest.raises((BadSize, OutOfFrames)):
        at.host.ralloc(size)


@pytest.mark.parametrize("size", ["5", 5.0, None, b"5"])
@in_host
def test_ralloc_wants_an_integer(at: At, size: object) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(TypeError):
        at.host.ralloc(size)


@in_host
def test_ralloc_takes_numpy_integers(at: At) -> None:
    assert len(at.host.ralloc(np.int64(5))) == 5


# ---------------------------------------------------------------- rfree


@pytest.mark.parametrize("how", ["rfree", "address", "numpy address", "free", "with", "del"])
@in_host
def test_each_way_to_free_gives_the_frames_back(at: At, how: str) -> None:
    before = at.host.stats()
    buffer = at.host.ralloc(5 * at.host.page_size)
    assert at.host.stats()["mappings"] == before["mappings"] + 1
    if how == "rfree":
        assert at.host.rfree(buffer) is None
    elif how == "address":
        at.host.rfree(buffer.address)
    elif how == "numpy address":
        at.host.rfree(np.uint64(buffer.address))
    elif how == "free":
        buffer.free()
    elif how == "with":
        with buffer as same:
            assert same is buffer
    if how != "del":
        assert buffer.freed
        assert "freed" in repr(buffer)
    del buffer
    after = at.host.stats()
    assert after["mappings"] == before["mappings"]
    assert after["rfree_calls"] == before["rfree_calls"] + 1


@in_host
def test_a_buffer_can_be_freed_inside_its_own_with_block(at: At) -> None:
    with at.host.ralloc(5) as buffer:
        buffer.free()
    assert buffer.freed


@in_host
def test_freeing_twice_is_refused(at: At) -> None:
    buffer = at.host.ralloc(5)
    address = buffer.address
    buffer.free()
    with nothing_changes(at.host.fabric):
        for free in (buffer.free, lambda: at.host.rfree(buffer), lambda: at.host.rfree(address)):
            with pytest.raises(BadAddress):
                free()


@in_host
def test_freeing_twice_does_not_free_who_came_after(at: At) -> None:
    gone = at.host.ralloc(5)
    gone.free()
    here = at.host.ralloc(5)
    assert here.address == gone.address  # or this test shows nothing
    with pytest.raises(BadAddress):
        gone.free()
    assert not here.freed
    memoryview(here)[0] = 1


@in_host
def test_rfree_takes_only_the_start_of_a_buffer(at: At) -> None:
    page = at.host.page_size
    buffer = at.host.ralloc(3 * page)
    memoryview(buffer)[:] = b"\x07" * len(buffer)
    start = buffer.address
    wrong = (start + 1, start + page, start - page, start + 3 * page, 0, 1, -1, 1 << 64, 1 << 47)
    with nothing_changes(at.host.fabric):
        for address in wrong:
            with pytest.raises(BadAddress):
                at.host.rfree(address)
    assert bytes(buffer) == b"\x07" * len(buffer)


@pytest.mark.parametrize("target", [None, "x", b"x", 1.5, [1]])
@in_host
def test_rfree_refuses_what_is_no_buffer(at: At, target: object) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(BadAddress):
        at.host.rfree(target)


@pytest.mark.parametrize("viewer", ["memoryview", "numpy", "slice", "cast"])
@in_host
def test_a_buffer_with_views_is_not_freed(at: At, viewer: str) -> None:
    buffer = at.host.ralloc(64)
    view = {
        "memoryview": lambda: memoryview(buffer),
        "numpy": lambda: buffer.numpy("i4"),
        "slice": lambda: memoryview(buffer)[3:4],
        "cast": lambda: memoryview(buffer).cast("Q"),
    }[viewer]()
    assert buffer.views == 1
    with nothing_changes(at.host.fabric):
        for free in (buffer.free, lambda: at.host.rfree(buffer.address), buffer.__exit__):
            with pytest.raises(BufferInUse) as caught:
                free()
            assert isinstance(caught.value, BufferError)
    assert not buffer.freed
    view[0] = 1
    assert buffer.views == 1
    del view
    assert buffer.views == 0
    buffer.free()


# ---------------------------------------------------------------- garbage collection


@in_host
def test_memory_is_freed_with_the_last_view(at: At) -> None:
    before = at.host.stats()["mappings"]
    buffer = at.host.ralloc(64)
    gone = weakref.ref(buffer)
    array = buffer.numpy("i4")
    part = array[3:5]
    del buffer, array
    assert at.host.stats()["mappings"] == before + 1
    part[:] = 7
    assert gone() is not None
    del part
    assert gone() is None
    assert at.host.stats()["mappings"] == before


class Node:
    """Something that a cycle can be made of."""


@in_host
def test_a_buffer_in_cyclic_garbage_is_freed(at: At) -> None:
    before = at.host.stats()["mappings"]
    node = Node()
    node.buffer = at.host.ralloc(64)  # older than what refers to it, so collected before
    address = node.buffer.address
    node.self = node
    del node
    gc.collect()
    assert at.host.stats()["mappings"] == before
    with pytest.raises(BadAddress):
        at.host.rfree(address)


@in_host
def test_a_buffer_that_its_host_keeps_does_not_keep_the_host(at: At) -> None:
    host = attach(at)
    fabric, identity = host.fabric, host.id
    host.kept = host.ralloc(64)
    del host
    gc.collect()
    from dmrpc_cxl.fabric import device  # by now the host has detached

    with device.open(fabric) as opened:
        assert not opened.host(identity)["state"]


@in_host
def test_a_buffer_dropped_in_another_thread_is_freed(at: At) -> None:
    before = at.host.stats()["mappings"]
    held = [at.host.ralloc(64)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert at.host.stats()["mappings"] == before


# ---------------------------------------------------------------- Buffer


@in_host
def test_what_a_buffer_says_about_itself(at: At) -> None:
    buffer = at.host.ralloc(1000)
    assert buffer.host is at.host
    assert buffer.nbytes == len(buffer) == 1000
    assert (buffer.views, buffer.freed, buffer.exclusive) == (0, False, True)
    assert repr(buffer) == f"<Buffer of 1000 bytes at {buffer.address:#x}>"
    assert ctypes.string_at(buffer.address, 1000) == bytes(buffer)


@in_host
def test_a_buffer_is_exclusive_until_it_is_shared(at: At) -> None:
    buffer = at.host.ralloc(1000)
    assert buffer.exclusive
    ref = at.host.create_ref(buffer)
    assert not buffer.exclusive
    copy = at.host.map_ref(ref)
    assert not copy.exclusive
    copied = at.host.map_ref(at.host.create_ref(buffer), copy=True)
    assert copied.exclusive
    moved = at.host.map_ref(at.host.create_ref(copied, move=True))
    assert moved.exclusive


@in_host
def test_a_freed_buffer_refuses_everything_but_to_say_so(at: At) -> None:
    buffer = at.host.ralloc(1000)
    buffer.free()
    refused = (
        lambda: memoryview(buffer),
        lambda: bytes(buffer),
        buffer.numpy,
        buffer.free,
        lambda: buffer.exclusive,
        lambda: at.host.create_ref(buffer),
        lambda: at.host.create_ref(buffer, move=True),
        lambda: at.host.create_ref(buffer.address, 10),
    )
    for call in refused:
        with pytest.raises(BadAddress):
            call()
    with buffer:  # leaving the block does not free it again
        pass
    assert (len(buffer), buffer.freed, buffer.views) == (1000, True, 0)


@pytest.mark.parametrize("kind", [Buffer, Ref])
@in_host
def test_buffers_and_refs_are_made_by_a_host_only(at: At, kind: type) -> None:
    with pytest.raises(TypeError):
        kind()


@in_host
def test_the_buffer_protocol_serves_whoever_speaks_it(at: At, tmp_path: Path) -> None:
    buffer = at.host.ralloc(1000)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 4)
    with path.open("rb", buffering=0) as stream:
        assert stream.readinto(buffer) == 1000
    assert bytes(buffer) == path.read_bytes()
    path.write_bytes(buffer)
    assert path.read_bytes()[-1] == 249
    assert b"".join([buffer, b"!"])[-2:] == b"\xf9!"
    assert bytearray(buffer)[:3] == b"\0\1\2"
    assert np.frombuffer(buffer, "u1").sum() == buffer.numpy().sum()
    ctypes.c_char.from_buffer(buffer).value = b"z"
    gc.collect()
    assert bytes(buffer)[:1] == b"z"
    assert hash(buffer) == hash(buffer)
    assert buffer != at.host.ralloc(1000)
    assert dmrpc_cxl.Buffer is type(buffer)

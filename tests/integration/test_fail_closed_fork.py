"""Fork: a child can neither store to what its parent shares nor use its parent's host."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dmrpc_cxl.errors import ForkedError
from tests.fabrics import At
from tests.standing import Standing
from tests.victims import (
    MARK,
    PAGE,
    PAGES,
    another_ref,
    changed,
    make,
    pattern,
    scene,
    store_everywhere,
)

standing = Standing({}, size=32 << 20)


@pytest.fixture(scope="module", autouse=True)
def _stand() -> Any:
    yield
    standing.close()


def prepare_shared_window(at: At, wires: list[bytes]) -> None:
    at.buffer = at.host.map_ref(wires[0])


def prepare_owned_window(at: At, wires: list[bytes]) -> None:
    """Take what was moved here over, and share it again."""
    at.buffer = at.host.map_ref(wires[0], copy=True)


def prepare_vma_area(at: At, wires: list[bytes]) -> None:
    """Map the same frames twice: only one of them can be in the shared window."""
    at.first, at.buffer = (at.host.map_ref(wire) for wire in wires[:2])


def prepare_copied_pages(at: At, wires: list[bytes]) -> None:
    """Have copy-on-write remap every page."""
    at.buffer = at.host.map_ref(wires[0])
    words = at.buffer.numpy()
    words[:] = words.copy()


def prepare_restored_window(at: At, wires: list[bytes]) -> None:
    """Map where pages were remapped and brought back."""
    first = at.host.map_ref(wires[0])
    first.numpy()[::PAGE] = 1
    first.free()
    at.buffer = at.host.map_ref(wires[1])


def prepare_filled_holes(at: At, wires: list[bytes]) -> None:
    at.buffer = at.host.ralloc(PAGES * PAGE, lazy=True)
    at.buffer.numpy()[:] = pattern(PAGES)


PREPARATIONS = [
    prepare_shared_window,
    prepare_owned_window,
    prepare_vma_area,
    prepare_copied_pages,
    prepare_restored_window,
    prepare_filled_holes,
]


def make_refs(at: At) -> list[bytes]:
    return [make(at), another_ref(at)]


def fork_and_store(at: At, offset: int) -> int:
    """Store in a forked child; return what waitpid says of it."""
    address = at.buffer.address + offset
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.memset(address, MARK, 64)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def map_second(at: At, wire: bytes) -> None:
    at.seen = at.host.map_ref(wire)


def seen_unchanged(at: At) -> bool:
    return bytes(at.seen) == pattern(PAGES).tobytes()


@pytest.mark.parametrize("prepare", PREPARATIONS, ids=lambda p: p.__name__[8:])
def test_a_forked_child_cannot_store_to_what_its_parent_shares(
    prepare: Callable[..., None],
) -> None:
    with scene(standing) as here:
        here.victim.call(prepare, here.keeper.call(make_refs))
        here.keeper.call(map_second, here.victim.call(another_ref))
        for offset in (0, 5 * PAGE + 100, PAGES * PAGE - 64):
            status = here.victim.call(fork_and_store, offset)
            assert os.WIFSIGNALED(status), "the child's store went somewhere"
            assert os.WTERMSIG(status) == signal.SIGSEGV
        assert here.keeper.call(seen_unchanged)
        here.assert_unchanged()
        assert here.victim.call(changed) == []
        assert here.victim.call(store_everywhere)  # the parent can
        assert here.keeper.call(seen_unchanged)


def fork_and_call(at: At, wire: bytes) -> list[str]:
    """Make every call in a forked child; return those that were not refused with ForkedError."""
    host, buffer = at.host, at.buffer
    ref = host.create_ref(buffer)
    calls: dict[str, Callable[[], Any]] = {
        "ralloc": lambda: host.ralloc(PAGE),
        "array": lambda: host.zeros(10),
        "rfree": lambda: host.rfree(buffer),
        "create_ref": lambda: host.create_ref(buffer),
        "move": lambda: host.create_ref(buffer, move=True),
        "map_ref": lambda: host.map_ref(wire),
        "accept": lambda: ref.accept(),
        "clone": lambda: ref.clone(),
        "drop": lambda: ref.drop(),
        "memoryview": lambda: memoryview(buffer),
        "numpy": lambda: buffer.numpy(),
        "stats": lambda: host.stats(),
        "detach": lambda: host.detach(),
    }
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        wrong = []
        for name, call in calls.items():
            try:
                call()
                wrong.append(name)
            except ForkedError:
                pass
            except BaseException as error:
                wrong.append(f"{name}: {error!r}")
        # What the child drops is not its own: nothing of its parent's may go.
        at.__dict__.clear()
        del host, buffer, ref, calls, call
        os.write(write, repr(wrong).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    ref.drop()
    return [text] if text != "[]" else []


def test_every_call_in_a_forked_child_is_refused_and_its_end_takes_nothing_along() -> None:
    with scene(standing) as here:
        here.share()
        wire = here.keeper.call(another_ref)
        before = here.fabric.assert_sound()
        assert here.victim.call(fork_and_call, wire) == []
        after = here.fabric.assert_sound()
        assert {key: after[key] for key in ("mapped_pages", "live_refs")} == {
            key: before[key] for key in ("mapped_pages", "live_refs")
        }
        assert here.victim.call(store_everywhere)
        here.assert_unchanged()


def fork_under_stores(at: At, wires: list[bytes], seed: int) -> list[int]:
    """Fork again and again, while a thread takes faults; let each child store to a random place."""
    dice = random.Random(seed)
    buffers = [at.host.map_ref(wire) for wire in wires]
    done = threading.Event()

    def store() -> None:
        for buffer in buffers:
            ctypes.memset(buffer.address, 1, len(buffer))
        done.set()

    thread = threading.Thread(target=store)
    statuses: list[int] = []
    thread.start()
    while not done.is_set() or len(statuses) < 5:
        at.buffer = dice.choice(buffers)
        statuses.append(fork_and_store(at, dice.randrange(len(at.buffer) - 64)))
    thread.join()
    return statuses


def make_many(at: At, count: int) -> list[bytes]:
    return [make(at, 512), *(another_ref(at) for _ in range(count - 1))]


def test_children_forked_while_faults_are_served_cannot_store_either() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with scene(standing, copy_around=1) as here:
        wires = here.keeper.call(make_many, 8)
        statuses = here.victim.call(fork_under_stores, wires, seed)
        print(f"{len(statuses)} children")
        assert {os.WTERMSIG(status) for status in statuses} == {signal.SIGSEGV}
        here.assert_unchanged()

"""Fork. Other ways to start a process from a host: test_processes.py.

A forked child has its parent's objects and none of its memory in DM. Every call is refused there,
touching an array ends the child, and whatever the child does, or leaves undone at its end, means
nothing to the parent.
"""

import contextlib
import copy
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadRef, ForkedError
from tests.crews import Crew, Member, in_host
from tests.fabrics import At, Fabric
from tests.pictures import nothing_changes


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Let threads exist: the child calls nothing that could wait for one of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def in_child(act: Callable[[], Any], ends: int = 0) -> Any:
    """Run `act` in a forked child, and return what it returned or raise what it raised.

    ends: the status that the child must end with, negative for a signal.
    """
    readable, writable = os.pipe()
    with forking():
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os.close(readable)
            answer = (True, act())
        except BaseException as error:
            answer = (False, f"{error!r}\n{traceback.format_exc()}")
        with os.fdopen(writable, "wb") as stream:
            stream.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == ends, f"the child ended with {status}, not {ends}"
    if not text:
        return None
    fine, value = pickle.loads(text)
    assert fine, value
    return value


# ---------------------------------------------------------------- calls in a forked child


def stuff(at: At) -> None:
    """Make one thing of every kind."""
    at.buffer = at.host.ralloc(10_000)
    at.array = at.host.array(np.arange(1000))
    at.ref, at.other = at.host.create_ref(at.array), at.host.create_ref(at.array)
    at.wire = at.other.to_bytes()
    at.mapped = at.host.map_ref(at.host.create_ref(at.array))


CALLS: dict[str, Callable[[At], Any]] = {
    "ralloc": lambda at: at.host.ralloc(5),
    "ralloc lazy": lambda at: at.host.ralloc(5, lazy=True),
    "empty": lambda at: at.host.empty(5),
    "zeros": lambda at: at.host.zeros(5),
    "array": lambda at: at.host.array([1]),
    "rfree buffer": lambda at: at.host.rfree(at.buffer),
    "rfree address": lambda at: at.host.rfree(at.buffer.address),
    "create_ref buffer": lambda at: at.host.create_ref(at.buffer),
    "create_ref array": lambda at: at.host.create_ref(at.array),
    "create_ref address": lambda at: at.host.create_ref(at.buffer.address, 5),
    "create_ref move": lambda at: at.host.create_ref(at.buffer, move=True),
    "map_ref": lambda at: at.host.map_ref(at.ref),
    "map_ref bytes": lambda at: at.host.map_ref(at.wire),
    "map_ref copy": lambda at: at.host.map_ref(at.wire, copy=True),
    "detach": lambda at: at.host.detach(),
    "with host": lambda at: at.host.__exit__(),
    "stats": lambda at: at.host.stats(),
    "id": lambda at: at.host.id,
    "page_size": lambda at: at.host.page_size,
    "handler_tid": lambda at: at.host.handler_tid,
    "contains": lambda at: at.host.contains(at.array),
    "free": lambda at: at.buffer.free(),
    "with buffer": lambda at: at.buffer.__exit__(),
    "memoryview": lambda at: memoryview(at.buffer),
    "bytes": lambda at: bytes(at.buffer),
    "numpy": lambda at: at.buffer.numpy(),
    "exclusive": lambda at: at.buffer.exclusive,
    "accept": lambda at: at.ref.accept(),
    "clone": lambda at: at.ref.clone(),
    "drop": lambda at: at.ref.drop(),
    "to_bytes": lambda at: at.ref.to_bytes(),
    "pickle": lambda at: pickle.dumps(at.ref),
    "copy": lambda at: copy.copy(at.ref),
    "from_bytes": lambda at: Ref.from_bytes(at.wire, at.host),
}


@pytest.mark.parametrize("call", CALLS)
@in_host
def test_a_forked_child_is_refused(at: At, call: str) -> None:
    stuff(at)

    def refused() -> str:
        with pytest.raises(ForkedError) as caught:
            CALLS[call](at)
        return str(caught.value)

    with nothing_changes(at.host.fabric):
        message = in_child(refused)
    assert "child" in message
    # The parent's own call works as if nothing had been.
    assert not at.buffer.freed
    with at.host.map_ref(at.wire) as mapped:
        assert np.frombuffer(mapped, "i8").tolist() == list(range(1000))


@in_host
def test_a_ref_finds_no_host_in_a_forked_child(at: At) -> None:
    stuff(at)

    def refused() -> None:
        with pytest.raises((ForkedError, BadRef)):
            Ref.from_bytes(at.wire)

    in_child(refused)
    assert at.other.drop()


@in_host
def test_what_needs_no_memory_still_answers_in_a_forked_child(at: At) -> None:
    stuff(at)

    def look() -> tuple[Any, ...]:
        return (len(at.buffer), at.buffer.address, at.buffer.freed, len(at.ref), at.host.name,
                "Buffer" in repr(at.buffer), "Ref" in repr(at.ref), at.host.detached)  # fmt: skip

    assert in_child(look) == look()
    assert at.other.drop()


# ---------------------------------------------------------------- memory in a forked child


@pytest.mark.parametrize("what", ["buffer", "array", "mapped", "written", "lazy", "piecewise"])
@pytest.mark.parametrize("store", [True, False], ids=["stores", "reads"])
@in_host
def test_touching_dm_in_a_forked_child_ends_it_and_changes_no_byte(
    at: At, what: str, store: bool
) -> None:
    stuff(at)
    at.written = at.host.map_ref(at.host.create_ref(at.array))
    at.written.numpy()[:] = 3  # copied on write: other mappings of the kernel's
    at.lazy = at.host.ralloc(10_000, lazy=True)
    at.piecewise = at.host.map_ref(at.host.create_ref(at.written))
    thing = getattr(at, what)
    view = thing if what == "array" else memoryview(thing)
    words = np.frombuffer(view, "u1")
    before = words.tobytes()

    def touch() -> None:
        if store:
            words[0] = 99
        else:
            bytes(words[:1])

    for place in (0, len(words) - 1):
        words = np.frombuffer(view, "u1")[place:]
        in_child(touch, ends=-signal.SIGSEGV)
    assert np.frombuffer(view, "u1").tobytes() == before
    assert at.other.drop()


@in_host
def test_the_device_is_not_mapped_and_no_userfault_is_served_in_a_forked_child(at: At) -> None:
    def look() -> tuple[bool, list[str]]:
        maps = Path("/proc/self/maps").read_text()
        return at.host.fabric in maps, os.listdir("/proc/self/task")

    mapped, threads = in_child(look)
    assert not mapped
    assert len(threads) == 1


# ---------------------------------------------------------------- the end of a forked child


@in_host
def test_garbage_collected_in_a_forked_child_is_not_the_parents(at: At) -> None:
    stuff(at)
    node: dict[str, Any] = {"buffer": at.host.ralloc(10), "ref": at.host.create_ref(at.array)}
    node["self"] = node

    def collect() -> int:
        node.clear()
        host = at.host
        at.__dict__.clear()
        gc.collect()
        return sys.getrefcount(host)

    with nothing_changes(at.host.fabric):
        in_child(collect)
    assert not at.buffer.freed
    assert not node["buffer"].freed
    assert bytes(at.mapped) == at.array.tobytes()
    assert at.other.drop()


@pytest.mark.parametrize("end", ["sys.exit", "os._exit", "SIGKILL", "exception"])
def test_however_a_forked_child_ends_its_parent_goes_on(crew: Crew, end: str) -> None:
    parent, other = crew[:2]
    parent.call(stuff)
    wire = parent.call(lose_a_child, end)
    other.map_ref("mapped", wire)
    parent.call(copy_on_write_still_works)
    assert other.call(sum_of_mapped) == sum(range(1000))
    other.rfree("mapped")
    parent.call(drop_wire)


def lose_a_child(at: At, end: str) -> bytes:
    with forking():
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        if end == "os._exit":
            os._exit(0)
        elif end == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if end == "exception":
                raise RuntimeError("in the child")
            sys.exit(0)
        except BaseException:
            # As an interpreter ends: everything is let go, in no order.
            at.__dict__.clear()
            gc.collect()
            os._exit(0)
    os.waitpid(child, 0)
    wire = at.ref.to_bytes()
    assert isinstance(wire, bytes)
    return wire


def copy_on_write_still_works(at: At) -> None:
    before = at.host.stats()
    at.array[:] = 7
    after = at.host.stats()
    assert after["frames_copied"] > before["frames_copied"]
    assert at.mapped.numpy("i8").tolist() == list(range(1000))


def sum_of_mapped(at: At) -> int:
    return int(at.mapped.numpy("i8").sum())


def drop_wire(at: At) -> None:
    assert Ref.from_bytes(at.wire).drop()


def test_a_child_that_outlives_its_parent_keeps_nothing_of_it(fabric: Fabric) -> None:
    parent, other = Member(fabric.host()), Member(fabric.host())
    parent.ralloc("buffer", 100_000)
    wire = parent.create_ref("buffer")
    child = parent.call(leave_a_child)
    try:
        parent.kill()
        fabric.wait_until(lambda audit: audit["in_use"] == audit["live_refs"] == 0)
        assert not other.drop(wire)
        os.kill(child, 0)  # and it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def leave_a_child(at: At) -> int:
    with forking():
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        while True:
            signal.pause()
    return child


@in_host
def test_stores_go_on_in_the_parent_while_children_come_and_go(at: At) -> None:
    array = at.host.array(np.zeros(50_000, "u1"))
    for value in range(1, 20):
        ref = at.host.create_ref(array)
        array[:25_000] = value
        assert in_child(lambda value=value: value) == value
        array[25_000:] = value
        with at.host.map_ref(ref) as mapped:
            assert set(mapped.numpy().tolist()) == {value - 1}


# ---------------------------------------------------------------- attaching in a child


@in_host
def test_a_forked_child_may_attach_for_itself(at: At) -> None:
    stuff(at)

    def attach_again() -> None:
        with dmrpc_cxl.attach(at.host.fabric) as own:
            with own.map_ref(at.wire) as mapped:
                memoryview(mapped)[:] = bytes(len(mapped))  # served by a handler of its own
                assert bytes(mapped) == bytes(len(mapped))
            for call in (at.ref.drop, at.buffer.free, at.host.stats):
                with pytest.raises(ForkedError):
                    call()
            assert own.create_ref(own.array([5, 6])).drop()

    in_child(attach_again)
    assert at.array.tolist() == list(range(1000))


@in_host
def test_a_grandchild_is_refused_both_hosts(at: At) -> None:
    def attach_and_fork() -> None:
        own = dmrpc_cxl.attach(at.host.fabric)

        def refused() -> None:
            for host in (own, at.host):
                with pytest.raises(ForkedError):
                    host.stats()
            dmrpc_cxl.attach(at.host.fabric).detach()

        in_child(refused)
        own.detach()

    in_child(attach_and_fork)

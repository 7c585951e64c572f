"""Whatever breaks, not one byte of a shared frame changes.

A victim stores to pages that it shares with a keeper, while something is done to it: its fault
handler is killed, its descriptors
are closed, it is forked, it is killed, the coordinator is. Then it may go on copying or it may
end, but what the keeper sees stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import DmError
from tests.fabrics import At, running
from tests.standing import Standing, until
from tests.victims import (
    PAGE,
    Scene,
    another_ref,
    changed,
    map_it,
    scene,
    store_everywhere,
)

standing = Standing({}, size=32 << 20)


@pytest.fixture(scope="module", autouse=True)
def _stand() -> Any:
    yield
    standing.close()


# -------------------------------------------------------------------- the fault handler is killed

SEIZE, INTERRUPT, CONTINUE, DETACH, PEEK, GET_REGISTERS, SET_REGISTERS = (
    0x4206, 0x4207, 7, 17, 1, 12, 13,
)  # fmt: skip
RAX, RDI, ORIG_RAX, RIP = 10, 14, 15, 16
SYS_EXIT, SYSCALL_INSTRUCTION, WALL = 60, 0x050F, 0x40000000


def end_thread(tid: int) -> None:
    """Make one thread of another process call exit(2), as nothing but a debugger can.

    It is stopped where it is at the end of a system call, and made to execute that instruction
    again with another number.
    """
    if platform.machine() != "x86_64":
        pytest.skip("knows the registers of x86-64 only")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long

    def ptrace(request: int, address: int = 0, argument: Any = None) -> int:
        ctypes.set_errno(0)
        value = int(libc.ptrace(request, tid, address, argument))
        if ctypes.get_errno() == errno.EPERM:
            pytest.skip("this user may not trace its processes")
        assert ctypes.get_errno() == 0, os.strerror(ctypes.get_errno())
        return value

    registers = (ctypes.c_ulonglong * 27)()

    def stopped_behind_a_system_call() -> bool:
        ptrace(INTERRUPT)
        os.waitpid(tid, WALL)
        ptrace(GET_REGISTERS, 0, registers)
        if ptrace(PEEK, registers[RIP] - 2) & 0xFFFF == SYSCALL_INSTRUCTION:
            return True
        ptrace(CONTINUE)
        return False

    ptrace(SEIZE)
    until(stopped_behind_a_system_call)
    registers[RIP] -= 2
    registers[RAX], registers[RDI], registers[ORIG_RAX] = SYS_EXIT, 0, 2**64 - 1
    ptrace(SET_REGISTERS, 0, registers)
    ptrace(DETACH)


def handler_tid(at: At) -> int:
    """Return the handler's thread id, and allow any process of this user to trace us."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1))  # PR_SET_PTRACER, ANY
    return int(at.host.handler_tid)


def test_a_process_whose_fault_handler_dies_stops_and_says_why(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with scene(standing) as here:
        here.share()
        end_thread(here.victim.call(handler_tid))
        assert here.victim.expect_death() == -signal.SIGABRT
        assert "the fault handler thread died" in (text := capfd.readouterr().err)
        assert f"fabric {here.fabric.name}" in text
        here.assert_unchanged()


def test_stores_that_are_under_way_when_the_handler_dies_change_nothing_shared() -> None:
    with scene(standing, copy_around=1) as here:
        here.share(2000)
        tid = here.victim.call(handler_tid)
        here.victim.start(store_everywhere)
        until(lambda: here.copied() > 20)
        end_thread(tid)
        assert here.victim.expect_death() == -signal.SIGABRT
        here.assert_unchanged()


# -------------------------------------------------------------------- descriptors are closed behind our back


def close_descriptors(at: At) -> None:
    """Do os.closerange(3, 4096), but for the pipe on which this test is asked and answered."""
    pipe = sys._getframe(1).f_locals["connection"].fileno()
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 4096)


def occupy_descriptors(at: At) -> None:
    """Open files where the DM layer's descriptors were."""
    at.files = []
    for i in range(40):
        file = tempfile.TemporaryFile()
        file.write(b"%d" % i)
        file.flush()
        at.files.append(file)


def files_harmed(at: At) -> list[int]:
    """Return which of those files were closed or written to by somebody else."""
    harmed = []
    for i, file in enumerate(at.files):
        try:
            intact = os.pread(file.fileno(), 100, 0) == b"%d" % i
        except OSError:
            intact = False
        if not intact:
            harmed.append(i)
    return harmed


@pytest.mark.parametrize("reused", [False, True], ids=["left closed", "numbers reused"])
def test_stores_still_copy_when_all_descriptors_were_closed(reused: bool) -> None:
    with scene(standing) as here:
        here.share()
        here.victim.call(close_descriptors)
        if reused:
            here.victim.call(occupy_descriptors)
        assert here.victim.call(store_everywhere)
        here.assert_unchanged()
        if reused:
            assert here.victim.call(files_harmed) == []
        here.victim.kill()  # whatever leaving does without descriptors is the next test's


def use_all_calls(at: At, wire: bytes) -> dict[str, str]:
    """Make every call once; return how each ended."""
    host = at.host
    ends: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except DmError as error:
            ends[name] = type(error).__name__
            return None
        ends[name] = "done"
        return result

    buffer = attempt("ralloc", lambda: host.ralloc(8 * PAGE))
    attempt("ralloc of much", lambda: host.ralloc(1500 * PAGE).free())
    attempt("ralloc lazily", lambda: host.ralloc(8 * PAGE, lazy=True).free())
    if buffer is not None:
        buffer.numpy()[:] = 3
        ref = attempt("create_ref", lambda: host.create_ref(buffer))
        if ref is not None:
            attempt("clone", lambda: ref.clone().drop())
        buffer.numpy()[:] = 4
        if ref is not None:
            mapped = attempt("map_ref", lambda: host.map_ref(ref))
            assert mapped is None or bytes(mapped) == bytes([3]) * 8 * PAGE
        moved = attempt("move", lambda: host.create_ref(buffer, move=True))
        if moved is not None:
            attempt("map a moved one", lambda: host.map_ref(moved, copy=True).free())
    taken = attempt("map another's", lambda: host.map_ref(wire))
    if taken is not None:
        attempt("share another's again", lambda: host.create_ref(taken).drop())
        taken.numpy()[:] = 9
        attempt("free another's", taken.free)
    attempt("free what was copied", at.buffer.free)
    return ends


def test_calls_without_descriptors_work_or_say_which_is_lost_and_harm_no_other_file() -> None:
    with scene(standing) as here:
        here.share()
        wire = here.keeper.call(another_ref)
        here.victim.call(close_descriptors)
        here.victim.call(occupy_descriptors)
        assert here.victim.call(store_everywhere)
        ends = here.victim.call(use_all_calls, wire)
        assert set(ends.values()) <= {"done", "DescriptorLost"}, ends
        assert ends["ralloc"] == ends["ralloc of much"] == "done", ends  # it can connect anew
        assert here.victim.call(files_harmed) == []
        here.assert_unchanged()
        here.victim.call(detach_and_keep_files)
        here.assert_unchanged()
        here.victim.left = True
        here.victim.kill()


def detach_and_keep_files(at: At) -> None:
    with contextlib.suppress(DmError):
        at.host.detach()
    assert files_harmed(at) == []


def pipes_end(at: At, fabric: str) -> bool:
    """Attach after a pipe and a socket were made; say whether their ends are seen when this process closes them."""
    read, write = os.pipe()
    one, two = socket.socketpair()
    host = dmrpc_cxl.attach(fabric)
    buffer = host.ralloc(PAGE)
    ref = host.create_ref(buffer)
    buffer.numpy()[0] = 1  # the handler has worked
    os.close(write)
    two.close()
    os.set_blocking(read, False)
    one.setblocking(False)
    ended = os.read(read, 1) == b"" and one.recv(1) == b""
    os.close(read)
    one.close()
    ref.drop()
    buffer.free()
    host.detach()
    return ended


def test_the_handler_keeps_no_descriptor_of_the_process_open() -> None:
    with scene(standing) as here:
        assert here.victim.call(pipes_end, here.fabric.name)


# -------------------------------------------------------------------- the victim or the coordinator is killed


def test_a_host_killed_while_it_stores_leaves_the_bytes_of_others_alone() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(4):
        with scene(standing, copy_around=dice.choice([1, 8])) as here:
            here.share(2000)
            enough = dice.randrange(1, 1900)
            here.victim.start(store_everywhere)
            while here.copied() < enough:
                os.sched_yield()
            here.victim.kill()
            here.wait_until_reclaimed()
            here.assert_unchanged()
            here.fabric.assert_sound()


def kill_coordinator(here: Scene) -> None:
    here.fabric.coordinator.kill()
    here.fabric.coordinator.wait()


@pytest.mark.parametrize("closed", [False, True], ids=["", "and descriptors closed"])
def test_pages_stay_protected_when_the_coordinator_is_killed(closed: bool) -> None:
    with running() as fabric:
        here = Scene(fabric, fabric.host(), fabric.host())
        here.share(reserve=True)
        kill_coordinator(here)
        if closed:
            here.victim.call(close_descriptors)
        assert here.victim.call(store_everywhere)
        here.assert_unchanged()
        fabric.start_coordinator()
        # With the successor everything goes on; a victim without descriptors can share nothing more.
        if not closed:
            here.keeper.call(map_it, here.victim.call(another_ref))
            here.share()
            assert here.victim.call(store_everywhere)
            here.assert_unchanged()


def test_stores_under_way_when_the_coordinator_is_killed_change_nothing_shared() -> None:
    with running() as fabric:
        here = Scene(fabric, fabric.host(), fabric.host(copy_around=1))
        here.share(2000, reserve=True)
        here.victim.start(store_everywhere)
        until(lambda: here.copied() > 20)
        kill_coordinator(here)
        assert here.victim.result()
        here.assert_unchanged()
        fabric.start_coordinator()


@pytest.mark.parametrize("coordinator_lives", [True, False], ids=["guarded", "unguarded"])
def test_a_dead_handler_and_closed_descriptors_together_change_nothing_shared(
    coordinator_lives: bool,
) -> None:
    """Guarded: the coordinator's duplicate is the last descriptor. Unguarded: the process's own is."""
    with running() as fabric:
        here = Scene(fabric, fabric.host(), fabric.host(copy_around=1))
        here.share(2000, reserve=True)
        tid = here.victim.call(handler_tid)
        if coordinator_lives:
            here.victim.call(close_descriptors)
        else:
            kill_coordinator(here)
        here.victim.start(store_everywhere)
        until(lambda: here.copied() > 20)
        end_thread(tid)
        assert here.victim.expect_death() == -signal.SIGABRT
        here.assert_unchanged()
        if not coordinator_lives:
            fabric.start_coordinator()


# -------------------------------------------------------------------- without kernel faults


def receive(at: At) -> int:
    """Let the kernel store; return its errno."""
    one, two = socket.socketpair()
    with one, two:
        one.sendall(b"\xee" * PAGE)
        try:
            two.recv_into(memoryview(at.buffer)[:PAGE])
        except OSError as error:
            return error.errno or -1
        return 0


def test_with_user_mode_only_kernel_stores_fail_and_change_nothing() -> None:
    with scene(standing, user_mode_only=True) as here:
        here.share()
        assert here.victim.call(receive) == errno.EFAULT
        assert here.victim.call(changed) == []
        here.assert_unchanged()
        assert here.victim.call(store_everywhere)  # user-mode stores are copied as ever
        here.assert_unchanged()
        assert here.victim.call(receive) == 0  # and then the kernel may

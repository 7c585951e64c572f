"""Processes started from processes that are hosts: multiprocessing with every start method, and exec."""

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from tests.crews import Member, in_host, run_apart
from tests.fabrics import At, Fabric

# ---------------------------------------------------------------- multiprocessing


def parent_of_workers(fabric: str, method: str) -> list[Any]:
    """Give Refs to children as arguments, through a pipe and through a queue; take Refs back."""
    context: Any = multiprocessing.get_context(method)
    with dmrpc_cxl.attach(fabric) as host:
        array = host.array(np.arange(5000))
        ours, theirs = context.Pipe()
        tasks, results = context.Queue(), context.Queue()
        worker = context.Process(
            target=work, args=(fabric, host.create_ref(array).to_bytes(), theirs, tasks, results)
        )
        worker.start()
        ours.recv()  # it has attached: a Ref that it unpickles finds its host
        ours.send(host.create_ref(array))
        tasks.put({"ref": host.create_ref(array[1000:2000])})
        answers = [results.get(timeout=60) for _ in range(3)]
        back = ours.recv()
        assert back.host is host
        with host.map_ref(back) as mapped:
            answers.append(int(mapped.numpy("i8").sum()))
        ours.send(None)
        worker.join(60)
        answers.append(worker.exitcode)
        answers.append(int(array.sum()))
        for one in (tasks, results):
            one.close()
            one.join_thread()
        del array
    return answers


def work(fabric: str, wire: bytes, pipe: Any, tasks: Any, results: Any) -> None:
    with dmrpc_cxl.attach(fabric) as host:
        pipe.send("attached")
        for ref in (wire, pipe.recv(), tasks.get(timeout=60)["ref"]):
            with host.map_ref(ref) as mapped:
                results.put(int(mapped.numpy("i8").sum()))
                mapped.numpy()[:] = 0
        pipe.send(host.create_ref(host.ralloc(80), move=True).accept())
        pipe.recv()  # stay until the Ref has been taken: it is ours until then


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_refs_go_to_and_from_multiprocessing_children(fabric: Fabric, method: str) -> None:
    whole, part = sum(range(5000)), sum(range(1000, 2000))
    assert run_apart(parent_of_workers, fabric.name, method) == [whole, whole, part, 0, 0, whole]


def pool_of_workers(fabric: str, method: str) -> list[int]:
    context: Any = multiprocessing.get_context(method)
    with dmrpc_cxl.attach(fabric) as host, context.Pool(2, attach_worker, (fabric,)) as pool:
        array = host.array(np.arange(5000))
        refs = [host.create_ref(array[start : start + 500]) for start in range(0, 5000, 500)]
        sums = pool.map(sum_of, refs)
        pool.close()
        pool.join()
        del array
    return [int(one) for one in sums]


WORKER: list[dmrpc_cxl.Host] = []


def attach_worker(fabric: str) -> None:
    WORKER.append(dmrpc_cxl.attach(fabric))


def sum_of(ref: Ref) -> int:
    assert ref.host is WORKER[0]
    with WORKER[0].map_ref(ref) as mapped:
        return int(mapped.numpy("i8").sum())


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_of_workers_maps_refs(fabric: Fabric, method: str) -> None:
    sums = run_apart(pool_of_workers, fabric.name, method)
    assert sums == [sum(range(start, start + 500)) for start in range(0, 5000, 500)]


# ---------------------------------------------------------------- exec

LIST_DESCRIPTORS = """
import os
for name in sorted(os.listdir("/proc/self/fd"), key=int):
    try:
        print(name, os.readlink("/proc/self/fd/" + name))
    except OSError:
        pass
"""


@in_host
def test_a_program_that_is_executed_inherits_no_descriptor(at: At) -> None:
    def inherited() -> list[str]:
        lines = subprocess.run(
            [sys.executable, "-c", LIST_DESCRIPTORS],
            close_fds=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        return [line.split(maxsplit=1)[1].split(":")[0] for line in lines]

    before = inherited()
    with dmrpc_cxl.attach(at.host.fabric) as host:
        host.map_ref(host.create_ref(host.array([1]))).free()
        assert inherited() == before
    assert not any(at.host.fabric in line or "userfaultfd" in line for line in before)


def test_a_host_that_executes_another_program_is_gone_when_that_ends(fabric: Fabric) -> None:
    host, other = Member(fabric.host()), Member(fabric.host())
    host.ralloc("buffer", 100_000)
    wire = other.accept(host.create_ref("buffer"))
    host.start(become_another_program)
    assert host.process.expect_death() == 7
    fabric.wait_until(lambda audit: len(fabric.host_states()) == 1)
    audit = fabric.assert_sound()
    assert (audit["in_use"], audit["live_refs"]) == (25, 1)
    assert other.drop(wire)


def become_another_program(at: At) -> None:
    os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"])

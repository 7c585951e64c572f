"""Ways to store to memory: from Python, numpy and the kernel, and in places where nobody expects a page fault.

Each fills a view with one byte, MARK.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MARK = 0xA5


def data(view: memoryview) -> bytes:
    return bytes([MARK]) * len(view)


def by_slice(view: memoryview) -> None:
    view[:] = data(view)


def by_item(view: memoryview) -> None:
    for i in range(len(view)):
        view[i] = MARK


def by_pack_into(view: memoryview) -> None:
    struct.pack_into(f"{len(view)}s", view, 0, data(view))


def by_memset_without_the_gil(view: memoryview) -> None:
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), MARK, len(view))


def by_ufunc(view: memoryview) -> None:
    out = np.frombuffer(view, "u1")
    np.add(np.zeros(len(view), "u1"), np.uint8(MARK), out=out)


def by_masked_ufunc(view: memoryview) -> None:
    out = np.frombuffer(view, "u1")
    odd = np.arange(len(view)) % 2 == 1
    np.bitwise_or(np.zeros(1, "u1"), np.uint8(MARK), out=out, where=odd)
    np.bitwise_or(np.zeros(1, "u1"), np.uint8(MARK), out=out, where=~odd)


def by_ufunc_that_calls_python(view: memoryview) -> None:
    out = np.frombuffer(view, "u1")
    np.copyto(out, np.frompyfunc(lambda _: MARK, 1, 1)(np.arange(len(view))).astype("u1"))
    np.frompyfunc(lambda i: view.__setitem__(i, MARK), 1, 1)(np.arange(0, len(view), 999))


def by_sort(view: memoryview) -> None:
    out = np.frombuffer(view, "u1")
    np.maximum(out, MARK, out=out)
    np.minimum(out, MARK, out=out)
    out.sort()


def by_recv_into(view: memoryview) -> None:
    one, two = socket.socketpair()
    with one, two:
        done = 0
        while done < len(view):
            part = view[done : done + 32768]
            one.sendall(data(part))
            assert two.recv_into(part, 0, socket.MSG_WAITALL) == len(part)
            done += len(part)


def by_recvmsg_into_over_tcp(view: memoryview) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
        with one, two:
            sender = threading.Thread(target=one.sendall, args=(data(view),))
            sender.start()
            done = 0
            while done < len(view):
                middle = (done + len(view)) // 2
                done += two.recvmsg_into([view[done:middle], view[middle:]])[0]
            sender.join()


def by_readinto(view: memoryview) -> None:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data(view))
        file.seek(0)
        assert file.readinto(view) == len(view)


def by_buffered_readinto(view: memoryview) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data(view))
        file.seek(0)
        assert file.readinto(view) == len(view)


def by_bytesio_readinto(view: memoryview) -> None:
    assert io.BytesIO(data(view)).readinto(view) == len(view)


def by_readv_of_a_pipe(view: memoryview) -> None:
    read, write = os.pipe()
    done = 0
    while done < len(view):
        part = view[done : done + 40000]
        os.write(write, data(part))
        cut = len(part) // 3
        assert os.readv(read, [part[:cut], part[cut:]]) == len(part)
        done += len(part)
    os.close(read)
    os.close(write)


def by_preadv(view: memoryview) -> None:
    with tempfile.TemporaryFile() as file:
        os.pwrite(file.fileno(), data(view), 0)
        cut = len(view) // 2
        assert os.preadv(file.fileno(), [view[:cut], view[cut:]], 0) == len(view)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def by_process_vm_writev(view: memoryview) -> None:
    """The kernel stores through the page tables of another process, which is this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    source = ctypes.create_string_buffer(data(view), len(view))
    target = ctypes.addressof(ctypes.c_char.from_buffer(view))
    ours = _Vector(ctypes.addressof(source), len(view))
    theirs = _Vector(target, len(view))
    done = libc.process_vm_writev(os.getpid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    assert done == len(view), os.strerror(ctypes.get_errno())


def in_a_thread(view: memoryview) -> None:
    thread = threading.Thread(target=by_slice, args=(view,))
    thread.start()
    thread.join()


def in_a_thread_bound_to_each_cpu(view: memoryview) -> None:
    cpus = sorted(os.sched_getaffinity(0))

    def store(i: int) -> None:
        os.sched_setaffinity(0, {cpus[i]})  # of this thread
        by_slice(view[i * len(view) // len(cpus) : (i + 1) * len(view) // len(cpus)])

    for i in range(len(cpus)):
        thread = threading.Thread(target=store, args=(i,))
        thread.start()
        thread.join()


def while_other_threads_want_the_gil(view: memoryview) -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(100))

    threads = [threading.Thread(target=spin) for _ in range(4)]
    for thread in threads:
        thread.start()
    by_slice(view)
    stop.set()
    for thread in threads:
        thread.join()


def in_an_import(view: memoryview) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stores_when_imported.py"
        path.write_text(f"import sys\nsys.watched[:] = bytes([{MARK}]) * len(sys.watched)\n")
        sys.watched = view
        sys.path.insert(0, folder)
        try:
            importlib.invalidate_caches()
            importlib.import_module("stores_when_imported")
        finally:
            sys.path.remove(folder)
            sys.modules.pop("stores_when_imported", None)
            del sys.watched


def in_the_garbage_collector(view: memoryview) -> None:
    class Stores:
        def __init__(self) -> None:
            self.itself = self  # only the collector can free it

        def __del__(self) -> None:
            by_slice(view)

    Stores()
    gc.collect()


def in_a_weakref_callback(view: memoryview) -> None:
    class Thing:
        pass

    thing = Thing()
    watch = weakref.ref(thing, lambda _: by_slice(view))
    del thing
    assert watch() is None


def in_a_signal_handler(view: memoryview) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: by_slice(view))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def under_a_hail_of_signals(view: memoryview) -> None:
    hits: list[None] = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(view.__setitem__(0, MARK)))
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        for start in range(0, len(view), 300):
            by_slice(view[start : start + 300])
        while not hits:  # however fast the machine is: at least one
            by_slice(view)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_a_trace_function(view: memoryview) -> None:
    def trace(*_: Any) -> None:
        by_slice(view)

    sys.settrace(trace)
    try:
        (lambda: None)()
    finally:
        sys.settrace(None)


def in_a_comparison_while_a_list_is_sorted(view: memoryview) -> None:
    def key(i: int) -> int:
        view[i] = MARK
        return -i

    list(range(len(view))).sort(key=key)


STORES: list[Callable[[memoryview], None]] = [
    by_slice,
    by_item,
    by_pack_into,
    by_memset_without_the_gil,
    by_ufunc,
    by_masked_ufunc,
    by_ufunc_that_calls_python,
    by_sort,
    by_recv_into,
    by_recvmsg_into_over_tcp,
    by_readinto,
    by_buffered_readinto,
    by_bytesio_readinto,
    by_readv_of_a_pipe,
    by_preadv,
    by_process_vm_writev,
    in_a_thread,
    in_a_thread_bound_to_each_cpu,
    while_other_threads_want_the_gil,
    in_an_import,
    in_the_garbage_collector,
    in_a_weakref_callback,
    in_a_signal_handler,
    under_a_hail_of_signals,
    in_a_trace_function,
    in_a_comparison_while_a_list_is_sorted,
]

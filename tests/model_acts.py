"""The operations of the model test, as host processes carry them out. Buffers and Refs go by the model's keys."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import socket
import tempfile
from typing import Any

import dmrpc_cxl
from tests.fabrics import WATCHDOG_SECONDS, At


def attach_again(at: At, fabric: str, options: dict[str, Any]) -> int:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    host = at.host
    at.__dict__.clear()
    host.detach()
    at.host = dmrpc_cxl.attach(fabric, **options)
    at.buffers, at.refs = {}, {}
    at.file = tempfile.TemporaryFile(buffering=0)
    at.pair = socket.socketpair()
    return at.host.id


def ralloc(at: At, key: int, size: int, lazy: bool, zero: bool) -> int:
    buffer = at.buffers[key] = at.host.ralloc(size, lazy=lazy, zero=zero)
    return buffer.address


def rfree(at: At, key: int, how: str) -> None:
    buffer = at.buffers.pop(key)
    if how == "rfree":
        at.host.rfree(buffer)
    elif how == "address":
        at.host.rfree(buffer.address)
    elif how == "free":
        buffer.free()
    # and otherwise the last reference goes with this frame


def create_ref(at: At, key: int, ref: int, offset: int, length: int, how: str) -> None:
    buffer = at.buffers[key]
    if how == "buffer" and (offset, length) == (0, len(buffer)):
        target: Any = buffer
    elif how == "address":
        target = (buffer.address + offset, length)
    elif how == "array":
        target = buffer.numpy()[offset : offset + length]
    else:
        target = memoryview(buffer)[offset : offset + length]
    at.refs[ref] = at.host.create_ref(target)


def move(at: At, key: int, ref: int) -> None:
    at.refs[ref] = at.host.create_ref(at.buffers[key], move=True)
    del at.buffers[key]


def send(at: At, ref: int) -> bytes:
    return at.refs[ref].to_bytes()


def receive(at: At, ref: int, wire: bytes) -> None:
    at.refs[ref] = dmrpc_cxl.Ref.from_bytes(wire, at.host)


def accept(at: At, ref: int) -> None:
    at.refs[ref].accept()


def clone(at: At, ref: int, copy: int) -> None:
    at.refs[copy] = at.refs[ref].clone()


def drop(at: At, ref: int) -> bool:
    return at.refs[ref].drop()


def discard(at: At, ref: int) -> None:
    del at.refs[ref]


def map_ref(at: At, ref: int | bytes, key: int, copy: bool, reserve: bool) -> int:
    source = ref if isinstance(ref, bytes) else at.refs[ref]
    buffer = at.buffers[key] = at.host.map_ref(source, copy=copy, reserve=reserve)
    return buffer.address


def view_ref(at: At, ref: int | bytes, key: int) -> tuple[int, bool]:
    """Return the address, and whether it is a view: it is a mapping if the Ref could not be viewed."""
    source = ref if isinstance(ref, bytes) else at.refs[ref]
    before = at.host.stats()["map_views"]
    buffer = at.buffers[key] = at.host.view_ref(source)
    return buffer.address, at.host.stats()["map_views"] > before


def write(at: At, key: int, offset: int, data: bytes, how: str) -> None:
    view = memoryview(at.buffers[key])[offset : offset + len(data)]
    if how == "memoryview":
        view[:] = data
    elif how == "memmove":
        ctypes.memmove(at.buffers[key].address + offset, data, len(data))
    elif how == "readinto":
        at.file.seek(0)
        at.file.write(data)
        at.file.seek(0)
        assert at.file.readinto(view) == len(data)
    elif how == "preadv":
        os.pwrite(at.file.fileno(), data, 0)
        middle = len(data) // 2
        assert os.preadv(at.file.fileno(), [view[:middle], view[middle:]], 0) == len(data)
    else:
        done = 0
        while done < len(data):  # as much as certainly fits in the socket
            part = data[done : done + 16384]
            at.pair[0].sendall(part)
            assert at.pair[1].recv_into(view[done:], len(part), socket.MSG_WAITALL) == len(part)
            done += len(part)


def read(at: At, key: int, offset: int, length: int, kernel: bool) -> bytes:
    view = memoryview(at.buffers[key])[offset : offset + length]
    if not kernel:
        return bytes(view)
    os.pwrite(at.file.fileno(), view, 0)
    return os.pread(at.file.fileno(), length, 0)

"""Any picklable object in DM: Host.put and Host.get.

An object is one Ref. Its bytes: a table, the pickle, and every buffer of the object (pickle protocol 5, out of band) at a
multiple of 64. Whoever gets it maps that once: buffers are not copied, arrays come back writable, and each reader's
stores are its own (copy-on-write).

A pickle runs code when it is read. All processes of a fabric are one user's; objects of strangers are not to be read.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

import numpy as np

from ..errors import BadRef, CannotSend
from .places import Attachment

__all__ = ["get", "put"]

MAGIC = 0x31305450504D4452
HEAD = struct.Struct("<QQQ")  # magic, bytes of the pickle, number of buffers
LENGTH = struct.Struct("<Q")
ALIGNMENT = 64


def _up(at: int) -> int:
    return (at + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def put(host: Attachment, value: Any) -> Any:
    """Place an object in DM."""
    outside: list[pickle.PickleBuffer] = []
    try:
        raw = pickle.dumps(value, 5, buffer_callback=outside.append)
        views = [buffer.raw() for buffer in outside]
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, BufferError) as error:
        raise CannotSend(f"this object cannot be pickled: {error}") from error
    table = HEAD.size + LENGTH.size * len(views)
    places, size = [], table + len(raw)
    for view in views:
        places.append(_up(size))
        size = places[-1] + view.nbytes
    buffer = host.ralloc(size, zero=False)
    target: Any = buffer.numpy()
    HEAD.pack_into(target, 0, MAGIC, len(raw), len(views))
    for i, view in enumerate(views):
        LENGTH.pack_into(target, HEAD.size + LENGTH.size * i, view.nbytes)
    target[table : table + len(raw)] = np.frombuffer(raw, "u1")
    end = table + len(raw)
    for place, view in zip(places, views, strict=True):
        target[end:place] = 0  # nothing of the last user's shows
        target[place : place + view.nbytes] = np.frombuffer(view, "u1")
        end = place + view.nbytes
    del target
    ref = host.create_ref(buffer, move=True)
    return ref


def get(host: Attachment, ref: Any) -> Any:
    """Return the object that a Ref denotes; the Ref is used up."""
    buffer = host.view_ref(ref)
    view = memoryview(buffer)
    if len(view) < HEAD.size:
        raise BadRef("this Ref denotes no object: it was not made by put()")
    magic, nr_raw, nr_views = HEAD.unpack_from(view)
    table = HEAD.size + LENGTH.size * nr_views
    if magic != MAGIC or table + nr_raw > len(view):
        raise BadRef("this Ref denotes no object: it was not made by put()")
    at = table + nr_raw
    outside = []
    for i in range(nr_views):
        (length,) = LENGTH.unpack_from(view, HEAD.size + LENGTH.size * i)
        at = _up(at)
        if at + length > len(view):
            raise BadRef("this Ref denotes an object that reaches beyond its end")
        outside.append(view[at : at + length])
        at += length
    return pickle.loads(view[table : table + nr_raw], buffers=outside)

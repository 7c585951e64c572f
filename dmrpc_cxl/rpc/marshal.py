"""Values to messages and back; large data leaves the message and goes by Ref.

msgpack (msgspec) writes plain values, dataclasses and structs. What has its memory outside of them becomes a msgpack
extension that says where to find it:

==  =========  =====================================================================
1   array      (place, nbytes, dtype, shape): an ndarray
2   blob       (place, nbytes, kind): bytes, a bytearray, a memoryview or a Buffer
3   Ref        place: a Ref that the user sent as such, of either kind
==  =========  =====================================================================

A place >= 0 is the number of a Ref in the frame; -1 - n is byte n of the frame's inline part.

Which way, by ``transfer``:

=======  ===========================================================================================
auto     by value below the threshold, by Ref from there on; by value as well when DM is exhausted
value    always in the message. The pass-by-value baseline
ref      always by Ref
copy     by Ref, but memory that is in DM already is copied at once instead of on write. The eager-copy baseline
=======  ===========================================================================================

By Ref, an array that lies in DM is shared: its pages become copy-on-write and the caller goes on using it. Any other is
copied into DM once, and that copy is given away. The receiver gets an ndarray over the frames themselves, or over the
received message; either is writable and its own. Where Refs lead to, the pool or memory servers, is chosen by what both
ends reach: places.py.

Paper: IV (size-aware transfer).
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import sys
import threading
import typing
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np

from .._native import Ref, crash_point
from ..errors import (
    CannotSend,
    CoordinatorLost,
    DeadlineExceeded,
    DmError,
    OutOfFrames,
    RefTableFull,
    RemoteProtocolError,
)
from . import frames
from .frames import BLOBS, PICKLED, REF_BYTES, SPECIAL_FLAGS, Flag, Frame
from .ownership import (
    Buffers,
    Example,
    Moved,
    buffer_of_lonely,
    lonely_arrays,
    move,
    move_whole,
    pass_on,
)
from .places import POOL, Attachment, Place

__all__ = ["Encoded", "Marshaller", "Moved", "Serializer", "Transfer", "move", "pass_on"]

Transfer: TypeAlias = Literal["auto", "value", "ref", "copy"]
Serializer: TypeAlias = Literal["msgpack", "pickle"]
TRANSFERS: tuple[Transfer, ...] = ("auto", "value", "ref", "copy")

ARRAY, BLOB, REF = 1, 2, 3
BYTES, BYTEARRAY, VIEW = 0, 1, 2  # kinds of blobs
ALIGNMENT = frames.INLINE_ALIGNMENT
LONGEST_NAME = 64  # characters of the name of a type without fields
MAX_DIMENSIONS = 32
MAX_EXTENT = 1 << 48  # bytes, counting lengths of 0 as 1: no empty array of absurd lengths

# Whoever hands out frames may also be away, or slow: in the message it goes without.
_NO_ROOM = (OutOfFrames, RefTableFull, CoordinatorLost, DeadlineExceeded)

FLAGS_OF: dict[Transfer, int] = {
    "auto": 0,
    "value": int(Flag.VALUE),
    "ref": int(Flag.REF),
    "copy": int(Flag.COPY),
}
TRANSFER_OF: dict[int, Transfer] = {flag: name for name, flag in FLAGS_OF.items()}

_pack = msgspec.msgpack.Encoder().encode
_unpack_array = msgspec.msgpack.Decoder(tuple[int, int, Any, tuple[int, ...]]).decode
_unpack_blob = msgspec.msgpack.Decoder(tuple[int, int, int]).decode
_unpack_ref = msgspec.msgpack.Decoder(int).decode
_dtypes: dict[str, np.dtype[Any]] = {}
_names: dict[np.dtype[Any], Any] = {}


class Encoded(NamedTuple):
    """A value, ready for a frame."""

    body: bytes
    flags: int
    refs: bytes  # held by this host until somebody accepts them
    inline: Sequence[memoryview | bytes]
    inline_bytes: int
    lent: tuple[Any, ...] = ()  # those of the Refs that the user made


class _Blob:
    """Bytes that leave the message."""

    __slots__ = ("data", "kind")

    def __init__(self, data: memoryview, kind: int) -> None:
        self.data = data
        self.kind = kind


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


# ---------------------------------------------------------------- writing


class _Outgoing:
    """One value on its way into a frame."""

    __slots__ = (
        "flags",
        "host",
        "inline",
        "inline_bytes",
        "known",
        "lent",
        "movable",
        "place",
        "places",
        "refs",
        "threshold",
        "transfer",
        "value",
        "written",
    )

    def __init__(
        self,
        host: Attachment,
        places: dict[type, Place],
        place: Place | None,
        transfer: Transfer,
        threshold: int,
        value: list[Any] | None,
    ) -> None:
        self.host = host
        self.places = places
        self.place = place  # None: the other end reaches none of this host's
        self.transfer = transfer
        self.threshold = threshold
        self.value = value  # whose arrays may change hands; None: they may not
        self.movable: dict[int, bool] | None = None
        self.flags = 0
        self.refs = b""
        self.inline: list[memoryview | bytes] = []
        self.inline_bytes = 0
        self.lent: list[Any] = []
        self.written: list[tuple[Any, Any]] = []  # what stands in the message, and for what
        self.known: dict[int, list[Any]] | None = None  # the same, when all is written once more

    def add(self, value: Any) -> Any:
        """Return what stands in the message for a value that msgpack cannot hold."""
        if self.known is not None and (known := self.known.get(id(value))):
            return known.pop()
        if isinstance(value, np.ndarray):
            extension = self._array(value)
        elif isinstance(value, Moved):
            extension = self._moved(value)
        elif isinstance(value, _Blob):
            return self._blob(value)
        elif isinstance(value, Buffers.classes):
            buffer: Any = value
            extension = self._blob(_Blob(memoryview(buffer), VIEW))
        elif type(value) in self.places or isinstance(value, Ref):
            extension = msgspec.msgpack.Ext(REF, _pack(self._lend(value)))
        elif isinstance(value, np.generic) and not isinstance(
            plain := value.item(), (np.generic, complex)
        ):
            return plain
        else:
            raise CannotSend(
                f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: use plain values, dataclasses, "
                "msgspec structs, arrays and buffers, or serializer='pickle'"
            )
        self.written.append((value, extension))
        return extension

    def begin_again(self) -> None:
        """Write the whole value once more; what has been taken care of stays as it is."""
        self.known = {}
        for value, extension in reversed(self.written):
            self.known.setdefault(id(value), []).append(extension)

    def _by_ref(self, nbytes: int) -> bool:
        if self.transfer == "auto":
            return nbytes > 0 and nbytes >= self.threshold and self.place is not None
        if self.transfer == "value" or not nbytes:
            return False
        if self.place is None:
            raise CannotSend(
                f"transfer={self.transfer!r}: there is no memory that both ends reach; "
                "'auto' sends by value then"
            )
        return True

    def _ref(self, ref: Any) -> int:
        assert self.place is not None
        self.refs += self.place.token(ref)
        crash_point("value_placed")
        return len(self.refs) // REF_BYTES - 1

    def _lend(self, ref: Any) -> int:
        if self.place is None or self.places.get(type(ref)) is not self.place:
            raise CannotSend(
                f"{ref!r} leads to memory that the other end does not reach: send the data itself"
            )
        place = self._ref(ref)
        self.lent.append(ref)
        return place

    def _inline(self, data: memoryview) -> int:
        gap = -self.inline_bytes % ALIGNMENT
        if gap:
            self.inline.append(bytes(gap))
        place = self.inline_bytes + gap
        self.inline.append(
            data if data.nbytes else b"\0"
        )  # that there is an inline part says: extensions
        self.inline_bytes = place + (data.nbytes or 1)
        return -1 - place

    def _array(self, array: np.ndarray[Any, Any]) -> msgspec.msgpack.Ext:
        dtype = array.dtype
        if dtype.hasobject:
            raise CannotSend(f"an array of {dtype} holds Python objects: use serializer='pickle'")
        if isinstance(array, np.ma.MaskedArray):
            raise CannotSend("a masked array is two arrays: send its data and its mask")
        nbytes, shape = array.nbytes, array.shape
        name = _names.get(dtype) or _name_of(dtype)
        place = None
        if self._by_ref(nbytes):
            try:
                place = self._ref(self._ref_to(array))
            except _NO_ROOM:
                if self.transfer != "auto" or nbytes > frames.MAX_FRAME_BYTES // 2:
                    raise
        if place is None:
            place = self._inline(_bytes_of(np.ascontiguousarray(array)))
        return msgspec.msgpack.Ext(ARRAY, _pack((place, nbytes, name, shape)))

    def _ref_to(self, array: np.ndarray[Any, Any]) -> Any:
        place = self.place
        assert place is not None
        if self.transfer != "copy" and array.flags.c_contiguous and place.holds(array):
            # Only the value that is being sent refers to it: nobody will miss it.
            if self.value is not None and sys.getrefcount(array) <= _LONELY[self._in_field(array)]:
                buffer = buffer_of_lonely(array)
                if buffer is not None and buffer.host is place.host:
                    return move_whole(array, buffer).ref
            return place.share(_bytes_of(array))
        return place.copy(array)

    def _in_field(self, array: np.ndarray[Any, Any]) -> int:
        """Return which count of references says that nobody else holds an array: 0 to 2, see _LONELY."""
        if self.movable is None:
            assert self.value is not None
            self.movable = lonely_arrays(self.value, _LONELY_CONTAINER)
        in_field = self.movable.get(id(array))
        return 2 if in_field is None else int(in_field)

    def _moved(self, moved: Moved) -> msgspec.msgpack.Ext:
        dtype, nbytes = moved.dtype, moved.ref.nbytes
        here = self.place
        if here is None:
            return self._moved_by_value(moved)
        if self.places.get(type(moved.ref)) is not here:  # from where the other end reaches
            moved.ref = here.copy(self.host.view_ref(moved.ref).numpy())
        place = self._lend(moved.ref)
        if dtype is None:
            return msgspec.msgpack.Ext(BLOB, _pack((place, nbytes, VIEW)))
        name = _names.get(dtype) or _name_of(dtype)
        return msgspec.msgpack.Ext(ARRAY, _pack((place, nbytes, name, moved.shape)))

    def _moved_by_value(self, moved: Moved) -> msgspec.msgpack.Ext:
        """Send the bytes; there is nothing to send them by. If the call fails, they are where they were."""
        nbytes = moved.ref.nbytes
        data = np.empty(nbytes, "u1")
        copy = moved.ref.clone()
        data[:] = self.host.view_ref(copy).numpy()
        place = self._inline(_bytes_of(data))
        if moved.dtype is None:
            self.flags |= BLOBS
            return msgspec.msgpack.Ext(BLOB, _pack((place, nbytes, VIEW)))
        name = _names.get(moved.dtype) or _name_of(moved.dtype)
        return msgspec.msgpack.Ext(ARRAY, _pack((place, nbytes, name, moved.shape)))

    def _blob(self, blob: _Blob) -> msgspec.msgpack.Ext:
        self.flags |= BLOBS
        data = blob.data
        place = None
        if self._by_ref(data.nbytes):
            try:
                assert self.place is not None
                if self.transfer != "copy" and self.place.holds(data):
                    place = self._ref(self.place.share(data))
                else:
                    place = self._ref(self.place.copy(np.frombuffer(data, "u1")))
            except _NO_ROOM:
                if self.transfer != "auto" or data.nbytes > frames.MAX_FRAME_BYTES // 2:
                    raise
        if place is None:
            place = self._inline(data)
        return msgspec.msgpack.Ext(BLOB, _pack((place, data.nbytes, blob.kind)))


def _name_of(dtype: np.dtype[Any]) -> Any:
    """Return what stands for a type in a message: its short name, or the list of its fields."""
    try:
        name = dtype.str if dtype.names is None else np.lib.format.dtype_to_descr(dtype)
        if _dtype(msgspec.msgpack.decode(_pack(name))) != dtype:
            raise ValueError("it has no name that others can read")
    except (ValueError, TypeError, RemoteProtocolError) as error:
        raise CannotSend(f"an array of {dtype}: {error}") from None
    if len(_names) < 256:
        _names[dtype] = name
    return name


class _Here(threading.local):
    """What the hooks of this thread work for. Pickles call code of users, which may call services: set, then put back."""

    outgoing: _Outgoing | None = None
    incoming: _Incoming | None = None


_here = _Here()


def _add(value: Any) -> Any:
    return _here.outgoing.add(value)  # type: ignore[union-attr]


_encode_hooked = msgspec.msgpack.Encoder(enc_hook=_add).encode
_encode_plain = msgspec.msgpack.Encoder().encode


def _encode(value: Any, outgoing: _Outgoing) -> bytes:
    before = _here.outgoing
    _here.outgoing = outgoing
    try:
        return _encode_hooked(value)
    finally:
        _here.outgoing = before


def _count_lonely() -> tuple[tuple[int, int, int], int]:
    """Return how many references there are, seen from _ref_to, when only the value being encoded refers to something.

    To an array that is an element, one that is in the field of a dataclass, one that is not to be moved; and to a container.
    """
    seen: list[int] = []
    limits: list[int] = []

    class Probe(_Outgoing):
        __slots__ = ()

        def _ref_to(self, array: np.ndarray[Any, Any]) -> Any:
            seen.append(sys.getrefcount(array))
            assert self.value is not None
            limits.append(next((n for n in range(1, 9) if lonely_arrays(self.value, n)), 0))
            raise OutOfFrames

    for made in (lambda: [np.zeros(1)], lambda: Example(np.zeros(1))):
        box = [made()]
        _encode(box, Probe(None, {}, box, "auto", 0, box))  # type: ignore[arg-type]
    return (seen[0], seen[1], 0), limits[0]


_BLOBS = (bytes, bytearray, memoryview)
_NATIVE = (*_BLOBS, datetime.datetime)  # that msgpack has types of its own for


def _without_blobs(value: Any, limit: int) -> Any:
    """Return plain values in which everything of limit bytes and more is a _Blob, and what msgpack cannot hold itself."""
    kept: dict[int, Any] = {}
    tokens: list[bytes] = []

    def keep(item: Any) -> bytes:
        if isinstance(item, np.generic):
            return item.item()  # type: ignore[no-any-return]
        token = bytes([len(tokens) & 0xFF]) * 24  # new, so its id is its own
        tokens.append(token)
        kept[id(token)] = item
        return token

    plain = msgspec.to_builtins(value, builtin_types=_NATIVE, enc_hook=keep)
    return _replace(plain, kept, limit)


def _replace(value: Any, kept: dict[int, Any], limit: int) -> Any:
    if isinstance(value, _BLOBS):
        if id(value) in kept:
            return kept[id(value)]
        if memoryview(value).nbytes < limit:
            return value
        kind = (
            BYTES
            if isinstance(value, bytes)
            else BYTEARRAY
            if isinstance(value, bytearray)
            else VIEW
        )
        return _Blob(_plain_view(value), kind)
    if isinstance(value, dict):
        return {
            _replace(key, kept, sys.maxsize): _replace(item, kept, limit)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_replace(item, kept, limit) for item in value]
    return value


def _plain_view(value: bytes | bytearray | memoryview) -> memoryview:
    """Return a view of bytes in one dimension."""
    view = memoryview(value)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    with contextlib.suppress(TypeError):  # not contiguous, or elements that Python does not know
        return view.cast("B")
    return memoryview(view.tobytes())


# ---------------------------------------------------------------- reading


class _Incoming:
    """One frame whose value is being read."""

    __slots__ = ("failure", "frame", "host")

    def __init__(self, host: Attachment, frame: Frame) -> None:
        self.host = host
        self.frame = frame
        self.failure: Exception | None = None

    def read(self, code: int, data: memoryview) -> Any:
        try:
            if code == ARRAY:
                return self._array(*_unpack_array(data))
            if code == BLOB:
                return self._blob(*_unpack_blob(data))
            if code == REF:
                ref = self.host.take_ref(self._ref(_unpack_ref(data)))
                crash_point("value_accepted")
                return ref
            raise RemoteProtocolError(f"a value of unknown extension type {code}")
        except DmError as error:  # msgspec would wrap it
            self.failure = error
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError, OverflowError) as error:
            self.failure = RemoteProtocolError(f"an extension that cannot be read: {error}")
        except Exception as error:
            self.failure = error
        raise self.failure

    def _ref(self, place: int) -> bytes:
        if not 0 <= place < self.frame.nr_refs:
            raise RemoteProtocolError(f"a value in Ref {place} of {self.frame.nr_refs}")
        return bytes(self.frame.refs[place * REF_BYTES : (place + 1) * REF_BYTES])

    def _inline(self, place: int, nbytes: int) -> int:
        frame = self.frame
        if not nbytes:
            return 0  # there may be no inline part at all
        at = frame.inline_at + (-1 - place)
        if not frame.inline_at or nbytes < 0 or at + nbytes > len(frame.data):
            raise RemoteProtocolError(
                f"a value of {nbytes} bytes at {-1 - place} of the inline part"
            )
        return at

    def _array(
        self, place: int, nbytes: int, name: Any, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        dtype = _dtype(name)
        size = extent = dtype.itemsize
        for length in shape:
            if length < 0:
                raise RemoteProtocolError(f"an array of shape {shape}")
            size *= length
            extent *= length or 1
        if size != nbytes or extent > MAX_EXTENT or len(shape) > MAX_DIMENSIONS:
            raise RemoteProtocolError(f"an array of {dtype}, shape {shape} in {nbytes} bytes")
        if place < 0:
            at = self._inline(place, nbytes)
            whole = np.frombuffer(self.frame.data, "u1")
            array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, buffer=whole, offset=at)
            return array
        buffer = self.host.view_ref(self._ref(place))
        crash_point("value_viewed")
        if buffer.nbytes != nbytes:
            raise RemoteProtocolError(f"an array of {nbytes} bytes in a Ref to {buffer.nbytes}")
        received: np.ndarray[Any, Any] = buffer.numpy(dtype, shape)
        return received

    def _blob(self, place: int, nbytes: int, kind: int) -> bytes | bytearray | memoryview:
        if place < 0:
            at = self._inline(place, nbytes)
            view = memoryview(self.frame.data)[at : at + nbytes]
        else:
            buffer = self.host.view_ref(self._ref(place))
            crash_point("value_viewed")
            if buffer.nbytes != nbytes:
                raise RemoteProtocolError(f"{nbytes} bytes in a Ref to {buffer.nbytes}")
            view = memoryview(buffer)
        return bytes(view) if kind == BYTES else bytearray(view) if kind == BYTEARRAY else view


def _dtype(name: Any) -> np.dtype[Any]:
    known = _dtypes.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    if isinstance(name, str) and len(name) > LONGEST_NAME:
        raise RemoteProtocolError(f"an array of unknown type {name:.20}...")
    try:
        dtype = (
            np.dtype(name) if isinstance(name, str) else np.lib.format.descr_to_dtype(_descr(name))
        )
    except Exception as error:  # numpy raises nearly anything for these
        raise RemoteProtocolError(f"an array of unknown type {name!r:.80}: {error}") from None
    if dtype.hasobject:
        raise RemoteProtocolError(f"an array of {dtype}, which holds objects")
    if dtype.subdtype is not None or not dtype.itemsize:
        raise RemoteProtocolError(f"an array of {dtype}, whose elements are arrays or nothing")
    if isinstance(name, str) and len(_dtypes) < 256:
        _dtypes[name] = dtype
    return dtype


def _descr(name: Any) -> Any:
    """Turn lists back into the tuples that numpy wants."""
    if isinstance(name, list):
        return [
            tuple(
                _descr(part)
                if isinstance(part, list) and i == 1
                else tuple(part)
                if isinstance(part, list)
                else part
                for i, part in enumerate(field)
            )
            if isinstance(field, list)
            else field
            for field in name
        ]
    return name


def _read(code: int, data: memoryview) -> Any:
    incoming = _here.incoming
    if incoming is None:
        raise RuntimeError("an extension in a message that has nothing outside of it")
    return incoming.read(code, data)


def _check_custom(wanted: Any, value: Any) -> Any:
    """Tell msgspec whether a value is of a type that it does not know."""
    origin: Any = typing.get_origin(wanted) or wanted
    fits: bool = isinstance(origin, type) and isinstance(value, origin)
    if not fits:
        raise ValueError(
            f"Expected `{getattr(origin, '__name__', origin)}`, got `{type(value).__name__}`"
        )
    if origin is np.ndarray and (args := typing.get_args(wanted)):
        scalars = typing.get_args(args[1])
        if (
            scalars
            and isinstance(scalars[0], type)
            and not issubclass(value.dtype.type, scalars[0])
        ):
            raise ValueError(f"Expected an array of `{scalars[0].__name__}`, got `{value.dtype}`")
    return value


class Reader:
    """Reads values of one type."""

    def __init__(self, wanted: Any = Any) -> None:
        self.wanted = wanted
        self._decode = msgspec.msgpack.Decoder(
            wanted, ext_hook=_read, dec_hook=_check_custom
        ).decode

    def read(self, host: Attachment, frame: Frame) -> Any:
        """Return the value of a frame; accepts the Refs that it uses.

        Raises:
            msgspec.ValidationError: it is not of the wanted type.
            RemoteProtocolError: it cannot be read.
            RefConsumed, BadRef: a Ref in it is not to be had.
        """
        if not (frame.nr_refs or frame.inline_at or frame.flags & SPECIAL_FLAGS):
            return self._read_plain(frame)
        before = _here.incoming
        incoming = _here.incoming = _Incoming(host, frame)
        try:
            if frame.flags & SPECIAL_FLAGS:
                return self._read_blobs(frame)
            return self._decode(frame.body)
        except msgspec.ValidationError:
            if incoming.failure is not None:
                raise incoming.failure from None
            raise
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"a message that cannot be read: {error}") from None
        finally:
            _here.incoming = before

    def _read_plain(self, frame: Frame) -> Any:
        """Read what has all its bytes in the message, as most small calls do."""
        try:
            return self._decode(frame.body)
        except msgspec.ValidationError:
            raise
        except (
            msgspec.DecodeError,
            RuntimeError,
            UnicodeDecodeError,
        ) as error:  # RecursionError is one
            raise RemoteProtocolError(f"a message that cannot be read: {error}") from None

    def _read_blobs(self, frame: Frame) -> Any:
        plain = _decode_plain(frame.body)
        _here.incoming = None
        if not frame.flags & PICKLED:
            return msgspec.convert(
                plain, self.wanted, builtin_types=_NATIVE, dec_hook=_check_custom
            )
        if not isinstance(plain, list) or len(plain) != 2 or not isinstance(plain[1], list):
            raise RemoteProtocolError("a pickle without its list of buffers")
        try:
            value = pickle.loads(plain[0], buffers=plain[1])
        except Exception as error:
            raise RemoteProtocolError(
                f"a pickle that cannot be read: {type(error).__name__}: {error}"
            ) from error
        return value


_decode_plain = msgspec.msgpack.Decoder(ext_hook=_read).decode


_LONELY, _LONELY_CONTAINER = _count_lonely()


# ---------------------------------------------------------------- both

_UNSENDABLE = (
    TypeError,
    ValueError,
    OverflowError,
    RecursionError,
    AttributeError,
    BufferError,
    pickle.PicklingError,
)


def _take_back(
    host: Attachment,
    places: dict[type, Place],
    refs: bytes | bytearray,
    lent: list[Any] | tuple[Any, ...],
) -> None:
    if lent:
        theirs = set()
        for ref in lent:
            with contextlib.suppress(DmError):  # used up by somebody else
                theirs.add(places[type(ref)].token(ref))
                ref.accept()  # from now on dropped when forgotten, as if it had never been sent
        every = (bytes(refs[at : at + REF_BYTES]) for at in range(0, len(refs), REF_BYTES))
        refs = b"".join(ref for ref in every if ref not in theirs)
    if refs:
        host.drop_refs(refs)


class Marshaller:
    """Writes values for one host's messages."""

    def __init__(self, host: Attachment, threshold: int) -> None:
        self.host = host
        self.threshold = threshold
        self.places = host.find_places()

    def place(self, reach: int) -> Place | None:
        """Return the place that is preferred among those of this host that the other end reaches."""
        for place in self.places.values():
            if place.bit & reach:
                return place
        return None

    def plain(self, value: Any, transfer: Transfer) -> bytes | None:
        """Return the body of a value that needs nothing outside of the message; None: use write().

        Half of the cost of a small call would be finding out what write() has to find out.
        """
        try:
            body = _encode_plain(value)
        except _UNSENDABLE:
            return None  # write() says why, if it cannot either
        if transfer == "auto":
            return body if len(body) < self.threshold else None
        return body if transfer == "value" or len(body) < REF_BYTES else None

    def write(
        self,
        value: Any,
        transfer: Transfer = "auto",
        serializer: Serializer = "msgpack",
        *,
        may_move: bool = False,
        reach: int = POOL,
    ) -> Encoded:
        """Return a value as the parts of a frame.

        Args:
            value: plain values, dataclasses, msgspec structs, arrays, buffers; anything picklable with "pickle".
            transfer: see the head of this file.
            serializer: how to write it.
            reach: where Refs may lead to, POOL and SERVERS.
            may_move: nobody will use the value, a list, afterwards; arrays in it that nobody else refers to change hands.

        Raises:
            CannotSend: it cannot be written.
            OutOfFrames: by Ref was asked for, and DM has no room.
        """
        outgoing = _Outgoing(
            self.host,
            self.places,
            self.place(reach),
            transfer,
            self.threshold,
            value if may_move else None,
        )
        try:
            if serializer == "pickle":
                body = self._pickled(value, outgoing)
            else:
                body = _encode(value, outgoing)
                if transfer != "value" and len(body) > (
                    self.threshold if transfer == "auto" else REF_BYTES
                ):
                    body = self._again_without_blobs(value, outgoing, body)
        except BaseException as error:
            _take_back(self.host, self.places, outgoing.refs, outgoing.lent)
            if isinstance(error, _UNSENDABLE) and not isinstance(error, DmError):
                raise CannotSend(f"this value cannot be sent: {error}") from error
            raise
        return Encoded(
            body,
            outgoing.flags,
            outgoing.refs,
            outgoing.inline,
            outgoing.inline_bytes,
            tuple(outgoing.lent) if outgoing.lent else (),
        )

    def take_back(self, encoded: Encoded) -> None:
        """Undo write() for a value that did not leave: the user's own Refs are as before, the others are dropped."""
        if encoded.refs:
            _take_back(self.host, self.places, encoded.refs, encoded.lent)
            crash_point("refs_taken_back")

    def _again_without_blobs(self, value: Any, outgoing: _Outgoing, body: bytes) -> bytes:
        """Large bytes are in the body: write it again with those outside."""
        limit = outgoing.threshold if outgoing.transfer == "auto" else 1
        plain = _without_blobs(value, limit)
        if not _has_blob(plain):
            return body
        outgoing.begin_again()
        return _encode(plain, outgoing)

    def _pickled(self, value: Any, outgoing: _Outgoing) -> bytes:
        outside: list[pickle.PickleBuffer] = []
        raw = pickle.dumps(value, 5, buffer_callback=outside.append)
        outgoing.flags |= PICKLED
        blobs = [_Blob(buffer.raw(), VIEW) for buffer in outside]
        return _encode((raw, blobs), outgoing)


def _has_blob(value: Any) -> bool:
    if isinstance(value, _Blob):
        return True
    if isinstance(value, dict):
        return any(_has_blob(item) for item in value.values())
    return isinstance(value, list) and any(_has_blob(item) for item in value)

"""Who else holds an array in DM: whether it may change hands, and move(), which makes it do so.

Moving takes memory from under whoever still looks at it. So it is done only when nobody does, as far as references tell:

- from the array down to its Buffer, nothing may have more references than in an array that was just made (slices hold the
  base, memoryviews the memory);
- to be moved without having been asked for, an array has to be an element of containers that nobody else holds, and nobody
  may hold the array or its Buffer either.

How many references that is depends on the interpreter. It is counted when this module is imported, on the same path.

Paper: none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np

from .._native import Buffer, Ref
from ..errors import BadAddress, BufferInUse

__all__ = [
    "AnyRef",
    "Buffers",
    "Example",
    "Moved",
    "buffer_of_lonely",
    "lonely_arrays",
    "move",
    "move_whole",
    "pass_on",
]


class Buffers:
    """The classes of memory that arrays lie in, and of Refs: the pool's, and those of memory servers once they are used."""

    classes: tuple[type[Any], ...] = (Buffer,)
    refs: tuple[type[Any], ...] = (Ref,)


class _AnyRefType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Buffers.refs)


if TYPE_CHECKING:
    AnyRef: TypeAlias = Ref  # those of memory servers are used in the same way
else:

    class AnyRef(metaclass=_AnyRefType):
        """A Ref of either memory, the pool or memory servers: for annotations of fields, where Ref means the pool's.

        A parameter that is annotated with Ref takes either as well.
        """


class Moved:
    """An array or buffer that was given away: it can be sent once. Made by :func:`move`.

    When a call fails before it leaves this process, the data is still here: send the same object again, or map its ``ref``.
    """

    __slots__ = ("dtype", "ref", "shape")

    def __init__(self, ref: Any, dtype: np.dtype[Any] | None, shape: tuple[int, ...]) -> None:
        self.ref = ref
        self.dtype = dtype  # None: a Buffer
        self.shape = shape

    def __repr__(self) -> str:
        return f"<Moved {self.ref.nbytes} bytes>"


# ---------------------------------------------------------------- from an array down to its Buffer


class _Counts(NamedTuple):
    """How many references there are to what stands between an array and its Buffer."""

    base: int
    view: int
    memory: int  # all memoryviews made of one share it, and the Buffer counts them as one
    owner: int


def _counts(array: np.ndarray[Any, Any]) -> _Counts:
    base: Any = array.base
    view = base.base
    return _Counts(
        sys.getrefcount(base),
        sys.getrefcount(view),
        sys.getrefcount(gc.get_referents(view)[0]),
        sys.getrefcount(view.obj),
    )


def _count_a_fresh_one() -> _Counts:
    # As Buffer.numpy() makes them.
    return _counts(np.ndarray((1,), "u1", buffer=np.frombuffer(memoryview(bytearray(1)), "u1")))


_FRESH = _count_a_fresh_one()


def _shows_a_buffer_whole(array: np.ndarray[Any, Any]) -> bool:
    """Tell whether an array is what Buffer.numpy() made, and the only memoryview of the Buffer is the array's."""
    base: Any = array.base
    view: Any = base.base if type(base) is np.ndarray else None
    buffer: Any = view.obj if type(view) is memoryview else None
    if not isinstance(buffer, Buffers.classes) or buffer.freed or buffer.views != 1:
        return False
    whole = array.nbytes == buffer.nbytes and array.flags.c_contiguous
    return whole and array.__array_interface__["data"][0] == buffer.address


def _counts_to_buffer(array: np.ndarray[Any, Any]) -> _Counts | None:
    """Return the counts of an array that shows a Buffer whole and is its only view; None: it does not or is not."""
    # By a function of its own: what its variables refer to must not be counted.
    if not _shows_a_buffer_whole(array):
        return None
    counts = _counts(array)
    if counts.base > _FRESH.base or counts.view > _FRESH.view or counts.memory > _FRESH.memory:
        return None
    return counts


def _buffer_of(array: np.ndarray[Any, Any]) -> Any:
    buffer: Any = array.base.base.obj  # type: ignore[union-attr]
    return buffer


def buffer_of_lonely(array: np.ndarray[Any, Any]) -> Any:
    """Return the Buffer of an array that is its only view, when nobody but the array holds it."""
    if type(array) is not np.ndarray or weakref.getweakrefcount(array):
        return None
    counts = _counts_to_buffer(array)
    return None if counts is None or counts.owner > _FRESH.owner else _buffer_of(array)


# ---------------------------------------------------------------- giving away

_EMPTY = (1, (0,), np.dtype("u1"), False, b"")


def move(target: Any) -> Moved:
    """Give an array (or Buffer) in DM away, to be sent without sharing: ``service.method(move(array))``.

    The array is empty afterwards. No page is protected or counted, and the receiver gets exclusive memory, whatever the
    size. What is not sent is freed.

    Args:
        target: an array that shows all of a Buffer, such as Host.empty, zeros, array and RPC make; or a Buffer.

    Raises:
        BadAddress: not in DM, or a part only.
        BufferInUse: other views on the memory are alive; nothing was changed. Views of which numpy keeps no account are not
            noticed: those of another class (``array.view(np.recarray)``), as_strided, DLPack.
    """
    if isinstance(target, Buffers.classes):
        return Moved(target.host.create_ref(target, move=True), None, (target.nbytes,))
    # No variable more for the target: _TARGET counts them.
    if not isinstance(target, np.ndarray) or _counts_to_buffer(target) is None:
        base = getattr(getattr(target, "base", None), "base", None)
        if type(base) is memoryview and isinstance(base.obj, Buffers.classes):
            raise BufferInUse(
                "move: other views on this array's memory are alive, or it shows a part of it only"
            )
        raise BadAddress(
            "move: this is no array in DM; make it with host.empty() or host.array(), or send it as it is"
        )
    if sys.getrefcount(target) > _TARGET and _has_memoryviews(target):
        raise BufferInUse("move: a memoryview of this array is alive")
    return move_whole(target, _buffer_of(target))


def pass_on(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | Moved:
    """Return what to send instead of an array that was received and is not needed here any more.

    ``service.method(pass_on(array))`` hands over the Ref that the array came by, as move() does. One that came in the message
    has none, and one that is still looked at keeps it: those are returned as they are, and sent as any other array.

    Paper: IV.
    """
    # Asked through its references alone: an array whose buffer was asked for is one that memoryviews may show.
    if type(array) is not np.ndarray or _counts_to_buffer(array) is None:
        return array
    if _has_memoryviews(array):
        return array
    return move_whole(array, _buffer_of(array))


def move_whole(array: np.ndarray[Any, Any], buffer: Any) -> Moved:
    """Move the Buffer that an array shows whole; the array is empty afterwards, so that nothing reaches the memory."""
    moved = Moved(buffer.host.move_viewed(buffer), array.dtype, array.shape)
    np.ndarray.__setstate__(array, _EMPTY)  # type: ignore[arg-type]
    return moved


_Memory = type(gc.get_referents(memoryview(b""))[0])
_TARGET = 3  # references to what move() is called with: a variable of the caller's, move()'s own, getrefcount()'s


def _find_export_word() -> int | None:
    """Return where in an ndarray numpy notes that its memory was exported; None: not to be seen with this numpy."""
    array: Any = np.zeros(1)

    def words() -> list[int]:
        nr_words = np.ndarray.__basicsize__ // 8
        return list((ctypes.c_size_t * nr_words).from_address(id(array)))

    before = words()
    with memoryview(array):
        after = words()
    changed = [i for i in range(2, len(before)) if before[i] != after[i]]
    return 8 * changed[0] if len(changed) == 1 else None


_EXPORT_WORD = _find_export_word()


def _has_memoryviews(array: np.ndarray[Any, Any]) -> bool:
    """Tell whether memoryviews of the array itself are alive, which the Buffer does not count."""
    word = _EXPORT_WORD
    if word is not None and not ctypes.c_size_t.from_address(id(array) + word).value:
        return False  # there never was one, as for nearly all arrays
    return any(isinstance(holder, _Memory) for holder in gc.get_referrers(array))


# ---------------------------------------------------------------- arrays that nobody but a value holds


def lonely_arrays(value: list[Any], limit: int) -> dict[int, bool]:
    """Find the arrays in a value whose containers nobody else holds, however deep.

    Context: called by the hook of the encoder that writes the value.

    Args:
        value: a list of the caller's own; it may be held, what is in it must not.
        limit: most references that each container may have, seen from here.

    Returns:
        dict: id of each array that was found once, and whether it is in a field of a dataclass.
    """
    found: dict[int, bool] = {}
    twice: set[int] = set()

    def visit(item: Any, in_dataclass: bool) -> None:
        kind = type(item)
        if kind is np.ndarray:
            if id(item) in found:
                twice.add(id(item))
            found[id(item)] = in_dataclass
        elif sys.getrefcount(item) > limit or weakref.getweakrefcount(item):
            return
        elif kind is list or kind is tuple:
            for element in item:
                visit(element, False)
        elif kind is dict:
            for element in item.values():
                visit(element, False)
        elif isinstance(item, msgspec.Struct):
            for name in kind.__struct_fields__:
                element = getattr(item, name)  # a reference more, as that of the loops above
                visit(element, False)
        elif dataclasses.is_dataclass(kind):
            if hasattr(item, "__dict__") and sys.getrefcount(vars(item)) > _LONELY_DICT:
                return
            for field in dataclasses.fields(kind):
                element = getattr(item, field.name, None)
                visit(element, True)

    for element in value:
        visit(element, False)
    return {key: in_field for key, in_field in found.items() if key not in twice}


@dataclasses.dataclass
class Example:
    """A value with one field."""

    item: Any


def _count_a_lonely_dict() -> int:
    example = Example(1)
    return sys.getrefcount(vars(example))


_LONELY_DICT = _count_a_lonely_dict()

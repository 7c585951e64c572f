"""A call on its way through a forwarder, as the function sees it that decides about it.

It reads what stands in the message: plain values. Arrays, large bytes and Refs stay outside, are not accepted, and read as
None; a struct with the first fields of the caller's is the way to leave them out.

Paper: VI-B.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ..errors import RemoteProtocolError, WrongArguments
from . import frames
from .frames import PICKLED

__all__ = ["Passing"]

Wanted = TypeVar("Wanted")


def _nothing(code: int, data: memoryview) -> None:
    """Stand for what is outside of the message."""


_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
_apart = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


def _decoder(wanted: Any) -> msgspec.msgpack.Decoder[Any]:
    known = _decoders.get(wanted)
    if known is None:
        known = _decoders[wanted] = msgspec.msgpack.Decoder(wanted, ext_hook=_nothing)
    return known


class Passing:
    """A call that a forwarder is about to pass on.

    Attributes:
        method: its name.
        time_left: seconds, as the caller said; None: as long as it takes.
    """

    __slots__ = ("_body", "_flags", "_meta", "method", "time_left")

    def __init__(self, method: str, flags: int, left_us: int, meta: bytes, body: bytes) -> None:
        self.method = method
        self.time_left = left_us * 1e-6 if left_us else None
        self._flags = flags
        self._meta = meta
        self._body = body

    @property
    def metadata(self) -> dict[str, str]:
        """What the caller sent along.

        Raises:
            RemoteProtocolError: it cannot be read.
        """
        return frames.read_meta_bytes(self._meta)

    def first(self, wanted: type[Wanted]) -> Wanted:
        """Return the first argument.

        Args:
            wanted: its type. A struct with array_like=True may have fewer fields than what was sent.

        Raises:
            WrongArguments: it is not of that type, there is none, or it is a pickle.
        """
        if self._flags & PICKLED:
            raise WrongArguments(f"{self.method}: pickled arguments are not read on the way")
        try:
            arguments = _apart(self._body)
            if not arguments:
                raise WrongArguments(f"{self.method}: called without arguments")
            first: Wanted = _decoder(wanted).decode(arguments[0])
        except msgspec.ValidationError as error:
            raise WrongArguments(f"{self.method}: {error}") from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"a message that cannot be read: {error}") from None
        return first

"""Errors that arrive: ERROR frames to exceptions."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Sequence

from ..errors import (
    AccessDenied,
    BadRef,
    CallCancelled,
    DeadlineExceeded,
    DmError,
    InterfaceMismatch,
    Overloaded,
    PeerLost,
    RefConsumed,
    RemoteError,
    ServiceNotFound,
    ServiceStopping,
    UnknownMethod,
    WrongArguments,
)
from . import frames
from .frames import Code, Frame

__all__ = ["error_of"]

_kinds: dict[tuple[type[RemoteError], str], type[RemoteError]] = {}


def _remote_kind(names: Sequence[str]) -> type[RemoteError]:
    """Return RemoteError, or a class that is also of the built-in type that the method raised."""
    for name in names:
        if name == "StopIteration":  # cannot be raised into a coroutine
            continue
        key = (RemoteError, name)
        if key in _kinds:
            return _kinds[key]
        kind = getattr(builtins, name, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or kind is Exception:
            continue
        with contextlib.suppress(TypeError):  # layouts may conflict
            made = type(
                f"Remote{name}", (RemoteError, kind), {"__module__": RemoteError.__module__}
            )
            made("")  # some want more arguments than a text
            _kinds[key] = made
            return made
    return RemoteError


_PLAIN: dict[int, type[DmError]] = {
    Code.UNKNOWN_METHOD: UnknownMethod,
    Code.BAD_ARGUMENTS: WrongArguments,
    Code.OVERLOADED: Overloaded,
    Code.DEADLINE: DeadlineExceeded,
    Code.CANCELLED: CallCancelled,
    Code.STOPPING: ServiceStopping,
    Code.DENIED: AccessDenied,
    Code.NOT_ALLOWED: AccessDenied,
    Code.VERSION: InterfaceMismatch,
    Code.PEER: PeerLost,
    Code.UNKNOWN_SERVICE: ServiceNotFound,
}


def error_of(frame: Frame, service: str, method: str) -> DmError:
    """Return the exception that an ERROR frame stands for."""
    body = frames.read_error(frame)
    where = f"{service}.{method}: "
    if frame.method in _PLAIN:
        return _PLAIN[frame.method](where + body.message)
    if frame.method == Code.BAD_REF:
        kind = RefConsumed if body.type.endswith("RefConsumed") else BadRef
        return kind(where + body.message)
    error = _remote_kind(body.builtins)(f"{where}{body.type}: {body.message}")
    error.remote_type = body.type
    error.remote_traceback = body.traceback
    if body.traceback and hasattr(error, "add_note"):
        error.add_note(f"On the server:\n{body.traceback.rstrip()}")
    return error

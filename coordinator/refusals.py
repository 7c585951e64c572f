"""Which status stands for which exception, in both directions."""

from __future__ import annotations

from dmrpc_cxl.errors import (
    CoordinatorRefused,
    DmError,
    HostFenced,
    MisuseError,
    OutOfFrames,
    RemoteProtocolError,
    ServiceExists,
    ServiceNotFound,
    ServiceTableFull,
)

from .ledger import NoHostSlot, OverQuota
from .messages import Status


class Refused(CoordinatorRefused):
    """The coordinator answered with a status that has no exception of its own."""

    def __init__(self, status: Status, text: str) -> None:
        """Say which status, and why."""
        super().__init__(text)
        self.status = status

    def __reduce__(self) -> tuple[type[Refused], tuple[Status, str]]:
        """Pickle: an exception's own way keeps only what its base class was given."""
        return Refused, (self.status, str(self))


_STATUS_OF: tuple[tuple[type[DmError], Status], ...] = (  # the first that fits
    (OverQuota, Status.QUOTA),
    (OutOfFrames, Status.NO_FRAMES),
    (NoHostSlot, Status.NO_HOST_SLOT),
    (HostFenced, Status.FENCED),
    (ServiceNotFound, Status.NOT_FOUND),
    (ServiceExists, Status.EXISTS),
    (ServiceTableFull, Status.TABLE_FULL),
    (RemoteProtocolError, Status.BAD_REQUEST),
    (MisuseError, Status.BAD_REQUEST),
)
_ERROR_OF: dict[Status, type[DmError]] = {
    Status.QUOTA: OverQuota,
    Status.NO_FRAMES: OutOfFrames,
    Status.NO_HOST_SLOT: NoHostSlot,
    Status.FENCED: HostFenced,
    Status.NOT_FOUND: ServiceNotFound,
    Status.EXISTS: ServiceExists,
    Status.TABLE_FULL: ServiceTableFull,
}


def status_of(error: DmError) -> Status:
    """Return the status that tells a peer of this exception."""
    if isinstance(error, Refused):
        return error.status
    return next((status for kind, status in _STATUS_OF if isinstance(error, kind)), Status.INTERNAL)


def error_of(status: Status, text: str) -> DmError:
    """Return the exception for an answer with this status."""
    kind = _ERROR_OF.get(status)
    return kind(text) if kind else Refused(status, text)

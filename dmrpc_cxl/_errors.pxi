# _errors.pxi - the one place where a status of native code becomes an exception. Included by _native.pyx.
#
#     cdef dm_error err = no_error()
#     with nogil:
#         status = dm_something(..., &err)
#     raise_status(status, &err, "something")        # returns 0 when status is no error

import os as _os

from dmrpc_cxl import errors as _errors

from dmrpc_cxl._layout cimport *


cdef inline dm_error no_error() noexcept nogil:
    """Return an error that names nothing; a zeroed struct would name frame 0."""
    cdef dm_error err
    dm_error_init(&err)
    return err


# Exception and what to say when native code left no text.
cdef dict _EXCEPTIONS = {
    DM_ERR_BAD_ADDRESS: (_errors.BadAddress, "not the start of a range of this host"),
    DM_ERR_BAD_SIZE: (_errors.BadSize, "zero, or beyond the range or the device"),
    DM_ERR_BAD_REF: (_errors.BadRef, "malformed, forged, or of another fabric"),
    DM_ERR_REF_CONSUMED: (
        _errors.RefConsumed, "the Ref was mapped, dropped or accepted by somebody else before"
    ),
    DM_ERR_TOO_MANY_REFS: (_errors.TooManyRefs, "a refcount would overflow"),
    DM_ERR_CLOSED: (_errors.HostClosed, "closed"),
    DM_ERR_FORKED: (
        _errors.ForkedError, "called in a forked child; attach again in the child, after exec or spawn"
    ),
    DM_ERR_BUSY: (_errors.BufferInUse, "still in use"),
    DM_ERR_NOT_A_DEVICE: (_errors.NotADevice, "not a G-FAM device"),
    DM_ERR_TRUNCATED: (_errors.DeviceTruncated, "shorter than its superblock says"),
    DM_ERR_VERSION: (_errors.DeviceVersionMismatch, "formatted by another layout version"),
    DM_ERR_CORRUPT: (_errors.DeviceCorrupt, "the superblock is damaged"),
    DM_ERR_OUT_OF_FRAMES: (_errors.OutOfFrames, "no free frames"),
    DM_ERR_NO_REF_SLOT: (_errors.RefTableFull, "every entry of the Ref table is in use"),
    DM_ERR_NO_ADDRESS_SPACE: (_errors.AddressSpaceFull, "the VMA area has no free range of that size"),
    DM_ERR_NO_SERVICE_SLOT: (_errors.ServiceTableFull, "the device's service table is full"),
    DM_ERR_REPLACED: (_errors.CoordinatorReplaced, "another coordinator has taken over"),
    DM_ERR_DEVICE_FULL: (_errors.DeviceFull, "the file system that holds the device is full"),
    DM_ERR_UFFD_DENIED: (
        _errors.UserfaultfdUnavailable,
        "userfaultfd is not permitted: run with CAP_SYS_PTRACE, or allow access to /dev/userfaultfd, "
        "or set sysctl vm.unprivileged_userfaultfd=1",
    ),
    DM_ERR_UFFD_FEATURE: (
        _errors.UserfaultfdUnavailable,
        "this kernel's userfaultfd cannot write-protect shared memory; Linux 5.19 or later can",
    ),
    DM_ERR_SYSTEM: (_errors.SystemCallFailed, "a system call failed"),
    DM_ERR_NO_MEMORY: (MemoryError, "no memory"),
    DM_ERR_DESCRIPTOR_LOST: (
        _errors.DescriptorLost, "a file descriptor of the DM layer was closed behind its back"
    ),
    DM_ERR_COORDINATOR_LOST: (_errors.CoordinatorLost, "the coordinator cannot be reached"),
    DM_ERR_COORDINATOR_REFUSED: (_errors.CoordinatorRefused, "the coordinator refused"),
    DM_ERR_PROTOCOL: (
        _errors.RemoteProtocolError, "the other side sent something the protocol does not allow"
    ),
    DM_ERR_DEADLINE: (_errors.DeadlineExceeded, "no answer before the deadline"),
    DM_ERR_FENCED: (_errors.HostFenced, "this host was declared dead by the coordinator"),
    DM_ERR_RING_CLOSED: (_errors.RingClosed, "closed"),
    DM_ERR_PEER_GONE: (_errors.PeerLost, "the process at the other end is gone"),
}

# A refusal that has an exception of its own.
cdef dict _REFUSALS = {
    DM_WIRE_NO_FRAMES: _errors.OutOfFrames,
    DM_WIRE_FENCED: _errors.HostFenced,
    DM_WIRE_NOT_FOUND: _errors.ServiceNotFound,
    DM_WIRE_EXISTS: _errors.ServiceExists,
    DM_WIRE_TABLE_FULL: _errors.ServiceTableFull,
    DM_WIRE_QUOTA: _errors.OverQuota,
    DM_WIRE_NO_HOST_SLOT: _errors.NoHostSlot,
}


cdef object _exception(int status, dm_error *err, object operation):
    cdef str message
    if status not in _EXCEPTIONS:
        return SystemError(f"{operation}: native code returned status {status}, which is none")
    kind, default = _EXCEPTIONS[status]
    if status == DM_ERR_COORDINATOR_REFUSED:
        kind = _REFUSALS.get(err.wire_status, kind)
    elif status == DM_ERR_OUT_OF_FRAMES and err.wire_status == DM_WIRE_QUOTA:
        kind = _errors.OverQuota
    message = f"{operation}: {err.text.decode('utf-8', 'replace') if err.text[0] else default}"
    if err.address:
        message += f" (address {err.address:#x})"
    if err.frame != DM_NO_FRAME:
        message += f" (frame {err.frame})"
    if err.syscall != NULL:
        message += f"; {err.syscall.decode()}: {_os.strerror(err.sys_errno)}"
    if err.sys_errno and issubclass(kind, OSError):
        return kind(err.sys_errno, message)
    return kind(message)


cdef int raise_status(int status, dm_error *err, object operation) except -1:
    """Raise what status and err say, or return 0 when status is no error.

    The exception's text names operation, address, frame and system call as far as they are known.
    """
    if status >= 0:
        return 0
    raise _exception(status, err, operation)

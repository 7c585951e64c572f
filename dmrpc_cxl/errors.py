"""Every exception DmRPC raises, in one tree.

The first level says whose fault it is::

    DmError
    ├── MisuseError                 the caller's
    │   ├── BadAddress (ValueError)         not the start of a range of this host; double free
    │   ├── BadSize (ValueError)            zero, or beyond the range
    │   ├── BadRef (ValueError)             malformed, forged, or of another fabric
    │   ├── RefConsumed (ValueError)        already mapped, dropped, or accepted by somebody else
    │   ├── BufferInUse (BufferError)       views on the buffer are alive
    │   ├── TooManyRefs (OverflowError)     a refcount would overflow
    │   ├── CannotSend (TypeError)          no message can hold this value
    │   ├── HostClosed (ValueError)         the host is detached
    │   ├── RingClosed (ValueError)         the ring or wait set is closed, or closed for sending
    │   └── ForkedError                     called in a forked child
    ├── DeviceError                 the device's
    │   ├── DeviceNotFound (FileNotFoundError)
    │   ├── DeviceExists (FileExistsError)  a live fabric is in the way
    │   ├── NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt
    │   ├── OutOfFrames (MemoryError)
    │   │   └── OverQuota                   this host holds as many as it may
    │   ├── NoHostSlot                      the device has as many hosts as it was made for
    │   ├── RefTableFull (MemoryError)
    │   ├── ServiceTableFull (MemoryError)
    │   ├── AddressSpaceFull (MemoryError)
    │   └── DeviceFull (OSError)            /dev/shm has no room
    ├── EnvironmentFault            the machine's or its settings'
    │   ├── UserfaultfdUnavailable (PermissionError)
    │   ├── DescriptorLost (OSError)        closed behind our back
    │   ├── CoordinatorReplaced             told to a coordinator that was thought dead
    │   └── SystemCallFailed (OSError)
    └── PeerError                   another process's
        ├── CoordinatorLost (ConnectionError)
        ├── CoordinatorRefused              it answered with an error
        ├── ProtocolViolation               bytes that do not follow the protocol
        │   ├── LocalProtocolError          ours
        │   └── RemoteProtocolError         theirs
        ├── DeadlineExceeded (TimeoutError)
        ├── HostFenced                      this host was declared dead
        ├── ServiceNotFound (LookupError)
        ├── ServiceExists (ValueError)
        └── CallError                       a remote procedure call gave no result
            ├── RemoteError                     the method raised; also of the same built-in type
            ├── UnknownMethod (AttributeError)
            ├── WrongArguments (TypeError)
            ├── InterfaceMismatch
            ├── Overloaded
            ├── CallCancelled
            ├── AccessDenied (PermissionError)
            └── PeerLost (ConnectionError)
                └── ServiceStopping
"""

from __future__ import annotations


class DmError(Exception):
    """Root of everything DmRPC raises on purpose."""


# --------------------------------------------------------------------------- misuse


class MisuseError(DmError):
    """The caller asked for something that is not allowed."""


class BadAddress(MisuseError, ValueError):
    """Not an address of this host's DM, or not the start of a range; also a double free."""


class BadSize(MisuseError, ValueError):
    """A size of zero, or one that reaches beyond the range or the device."""


class BadRef(MisuseError, ValueError):
    """Bytes that are no Ref, a forged Ref, or one of another fabric."""


class RefConsumed(MisuseError, ValueError):
    """The Ref was mapped, dropped, or accepted by another holder before."""


class BufferInUse(MisuseError, BufferError):
    """Memory cannot be freed or moved while views on it are alive."""


class TooManyRefs(MisuseError, OverflowError):
    """A frame's refcount would overflow."""


class HostClosed(MisuseError, ValueError):
    """The host was detached from its fabric."""


class RingClosed(MisuseError, ValueError):
    """The ring or wait set is closed, or the ring is closed for sending: a send stopped within a frame."""


class ForkedError(MisuseError):
    """A forked child used its parent's host. Attach again in the child, after exec or spawn."""


# --------------------------------------------------------------------------- device


class DeviceError(DmError):
    """Something about the G-FAM device."""


class DeviceNotFound(DeviceError, FileNotFoundError):
    """No device of that name."""


class DeviceExists(DeviceError, FileExistsError):
    """A device of that name exists, and a live fabric may be using it."""


class NotADevice(DeviceError):
    """The file is not a G-FAM device."""


class DeviceTruncated(DeviceError):
    """The file is shorter than its superblock says."""


class DeviceVersionMismatch(DeviceError):
    """The device was formatted by another layout version."""


class DeviceCorrupt(DeviceError):
    """The superblock's checksum or geometry is wrong."""


class OutOfFrames(DeviceError, MemoryError):
    """Neither this host nor the coordinator has enough free frames; nothing was changed."""


class OverQuota(OutOfFrames):
    """The host holds as many frames as it may."""


class NoHostSlot(DeviceError):
    """Every host slot of the device is taken."""


class ServiceTableFull(DeviceError, MemoryError):
    """The device's service table has no room for the name and its endpoint."""


class RefTableFull(DeviceError, MemoryError):
    """Every entry of the device's Ref table is in use."""


class AddressSpaceFull(DeviceError, MemoryError):
    """The VMA area has no free range of that size."""


class DeviceFull(DeviceError, OSError):
    """The file system that holds the device has no room left."""


# --------------------------------------------------------------------------- environment


class EnvironmentFault(DmError):
    """The machine, its kernel or its settings do not allow it."""


class UserfaultfdUnavailable(EnvironmentFault, PermissionError):
    """userfaultfd is missing, lacks a feature, or is not permitted; the message says how to allow it."""


class DescriptorLost(EnvironmentFault, OSError):
    """A file descriptor of the DM layer was closed behind its back."""


class CoordinatorReplaced(EnvironmentFault):
    """Another coordinator serves the device since; this one may change nothing any more."""


class SystemCallFailed(EnvironmentFault, OSError):
    """A system call failed in a way that has no exception of its own."""


# --------------------------------------------------------------------------- peers


class PeerError(DmError):
    """Another process failed, vanished or misbehaved."""


class CoordinatorLost(PeerError, ConnectionError):
    """The coordinator cannot be reached, or the connection to it broke."""


class CoordinatorRefused(PeerError):
    """The coordinator answered with an error."""


class ProtocolViolation(PeerError):
    """Bytes on a connection that do not follow the protocol."""


class LocalProtocolError(ProtocolViolation):
    """This side tried to send something the protocol does not allow."""


class RemoteProtocolError(ProtocolViolation):
    """The other side sent something the protocol does not allow."""


class DeadlineExceeded(PeerError, TimeoutError):
    """No answer before the deadline."""


class HostFenced(PeerError):
    """This host was declared dead by the coordinator and must not touch the fabric any more."""


class ServiceNotFound(PeerError, LookupError):
    """No service of that name is published."""


class ServiceExists(PeerError, ValueError):
    """A live host has already published a service of that name."""


# --------------------------------------------------------------------------- remote procedure calls


class CallError(PeerError):
    """A call did not give a result."""


class RemoteError(CallError):
    """The method raised. Is also of the same built-in type: ``except ValueError`` works.

    Attributes:
        remote_type: qualified name of what was raised.
        remote_traceback: its traceback, as text.
    """

    remote_type: str = ""
    remote_traceback: str = ""


class UnknownMethod(CallError, AttributeError):
    """The service has no method of that name."""


class WrongArguments(CallError, TypeError):
    """The arguments do not fit the method's parameters."""


class CannotSend(MisuseError, TypeError):
    """A value that the serializer in use cannot put into a message."""


class InterfaceMismatch(CallError):
    """Client and server do not mean the same service, or speak versions that do not fit."""


class Overloaded(CallError):
    """The server has as many calls as it takes; try again later, or elsewhere."""


class CallCancelled(CallError):
    """The call was cancelled."""


class PeerLost(CallError, ConnectionError):
    """The other end of the connection died, closed it, or cannot be reached."""


class ServiceStopping(PeerLost):
    """The service is being stopped and takes no new calls."""


class AccessDenied(CallError, PermissionError):
    """The fabric's secret is wrong, or the service does not allow this."""

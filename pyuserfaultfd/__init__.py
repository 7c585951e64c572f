"""userfaultfd for Python: page faults of your own choosing, handled by your own code.

Linux can hand the page faults in a range of memory to a program: it is told of a touched page that
is missing, write-protected or not yet mapped, and the touching thread sleeps until the program has
supplied the page. Pure Python, no dependencies, Linux only.

Map of the package:

    UserFaultFD              the descriptor: register, resolve faults, read events   _uffd.py
                             its life: open, adopt, hand over, close                 _descriptor.py
    supported_features       what the running kernel can do                          _descriptor.py
    PageFault Fork Remap     what it reports; ``Event`` is any of them               events.py
    Remove Unmap
    address_of MemoryRange   from buffers to addresses                               memory.py
    Feature RegisterMode     flags, with the kernel's names                          _abi.py
    Ioctl Method PAGE_SIZE
    Waiting                  how many threads sleep in a fault                       _system.py
    UserfaultfdError ...     the exception tree                                      errors.py

**A Python thread must not serve the faults of its own process**: the thread that faults keeps the
GIL while it sleeps, so the one that should help it never runs. Serve them from another process, or
from a thread that needs no Python. README.md shows how.
"""

from ._abi import PAGE_SIZE, Feature, Ioctl, Method, RegisterMode
from ._descriptor import supported_features
from ._system import Waiting
from ._uffd import UserFaultFD
from .errors import (
    AlreadyMapped,
    ClosedError,
    FeatureUnavailable,
    InvalidDescriptor,
    InvalidRange,
    NotRegistered,
    NotSupported,
    OutOfMemory,
    PartialResult,
    PermissionDenied,
    ProcessGone,
    RangeBusy,
    UnknownEvent,
    UserfaultfdError,
)
from .events import Event, Fork, PageFault, Remap, Remove, Unmap
from .memory import MemoryRange, address_of

__all__ = [
    "PAGE_SIZE",
    "AlreadyMapped",
    "ClosedError",
    "Event",
    "Feature",
    "FeatureUnavailable",
    "Fork",
    "InvalidDescriptor",
    "InvalidRange",
    "Ioctl",
    "MemoryRange",
    "Method",
    "NotRegistered",
    "NotSupported",
    "OutOfMemory",
    "PageFault",
    "PartialResult",
    "PermissionDenied",
    "ProcessGone",
    "RangeBusy",
    "RegisterMode",
    "Remap",
    "Remove",
    "UnknownEvent",
    "Unmap",
    "UserFaultFD",
    "UserfaultfdError",
    "Waiting",
    "address_of",
    "supported_features",
]

"""Types of the native module: the only boundary between Python and C."""

from typing import Any, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer as Buffer_
from typing_extensions import Self

# ---------------------------------------------------------------- device (_device.pxi)

COUNTERS: tuple[tuple[str, str], ...]
"""(name, description) of every host counter, in device order."""
WIRE: dict[str, Any]
"""The coordinator protocol, read from csrc/wire.h.

``magic``, ``version``, ``max_payload``: numbers. ``types``, ``status``: name without prefix -> number.
``structs``: header, hello, hello_reply, register, registered, rejoin, grant, recall, run -> (format
for `struct.Struct`, names of its fields).
"""
LAYOUT: dict[str, int]
"""Constants of csrc/layout.h, without DM_: sizes, HOST_*, REF_*, INTENT_*, PTE_*."""

def geometry(data_bytes: int, page_size: int, max_hosts: int, max_refs: int) -> dict[str, int]:
    """Compute the geometry fields of a superblock, by name; raises BadSize."""

def format_device(
    fd: int, name: str, data_bytes: int, page_size: int, max_hosts: int, max_refs: int
) -> None:
    """Make a device of an open file that is empty or has geometry()["device_bytes"] bytes.

    Allocates the tables (not page tables, not frames) and writes the superblock, magic last.
    """

def allocate(fd: int, offset: int, size: int) -> int: ...

class Device:
    """A mapped and verified G-FAM file: what the coordinator and the tools need of it."""

    def __init__(self, fd: int, writable: bool = True) -> None:
        """Verify and map; fd stays the caller's.

        Raises NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt.
        """

    def __enter__(self) -> Device: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def close(self) -> None:
        """Unmap; twice is allowed. Raises BufferInUse while another thread is inside a call."""

    def fileno(self) -> int:
        """Return its own descriptor of the file, good until close(); fcntl.flock takes the Device."""

    @property
    def writable(self) -> bool:
        """Whether it was opened to be changed."""

    @property
    def superblock(self) -> dict[str, Any]:
        """Fields as in struct dm_superblock; secret is bytes, the coordinator's are read now."""

    def prefault(self, first: int, nr_frames: int) -> None:
        """Allocate and touch frames now; contents stay. Raises DeviceFull."""

    def hosts(self) -> list[dict[str, Any]]:
        """List the entries that are not FREE, as host() returns them."""

    def host(self, host_id: int) -> dict[str, Any]:
        """Read an entry in any state: fields as in struct dm_host_entry, plus "host".

        "intent" and "counters" are dicts. A FREE entry keeps the incarnation of its last host.
        """

    def refs(self) -> list[dict[str, Any]]:
        """List the Ref entries that are not FREE.

        entry, state, exclusive, holder, generation, creator, length, page_offset, nr_pages,
        nr_runs, nr_overflow.
        """

    def frame(self, pfn: int) -> tuple[int, int, int]:
        """Return (refcount, owner, sequence)."""

    def free_runs(self, owner: int) -> list[tuple[int, int]]:
        """List (first frame, count) of what owner may hand out, ascending."""

    def transfer(self, pfn: int, count: int, owner_from: int, owner_to: int) -> int:
        """Change the owner of free frames, up to the first that is in use or not owner_from's.

        Returns how many changed hands.
        """

    def start_coordinator(
        self, pid: int, start_time: int, unix_path: str, tcp_host: str, tcp_port: int
    ) -> int:
        """Enter the coordinator and return its epoch. The caller excludes a second one."""

    def stop_coordinator(self, epoch: int) -> bool:
        """Take it out; False, and nothing changed, when a later coordinator has taken over."""

    def activate_host(
        self, host_id: int, pid: int, start_time: int, incarnation: int, name: str, frame_limit: int
    ) -> None:
        """Go from FREE to ACTIVE with an empty page table.

        Raises BadSize, BufferInUse (not FREE), DeviceFull.
        """

    def set_host_state(self, host_id: int, expect: int, state: int) -> bool:
        """Swap one of LAYOUT["HOST_*"] for another; False when the state was not expect."""

    def reclaim_host(self, host_id: int) -> dict[str, int]: ...
    def audit(self) -> dict[str, Any]:
        """Account for every frame: exact on a quiescent fabric, else perhaps transient.

        nr_frames, pool, free ({host: frames}), in_use, mapped_pages, hole_pages, live_refs,
        ref_pages, overflow_frames, in_flight, nr_violations, violations (the first 64, as
        (frame or None, text)).
        """

# ---------------------------------------------------------------- host (_host.pxi)

# numpy's stubs give ndarray the buffer protocol from Python 3.12 on only.
_InDm: TypeAlias = Buffer_ | npt.NDArray[Any]

class Ref:
    """A transferable, single-holder claim on a run of frames."""

    @property
    def host(self) -> Host: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(data: Buffer_, host: Host | None = None) -> Ref: ...
    def accept(self) -> Ref: ...
    def clone(self) -> Ref: ...
    def drop(self) -> bool: ...

class Buffer:
    """A mapping in DM, writable, with the buffer protocol."""

    @property
    def host(self) -> Host: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def views(self) -> int: ...
    @property
    def freed(self) -> bool: ...
    @property
    def exclusive(self) -> bool: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Buffer: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def numpy(
        self,
        dtype: npt.DTypeLike = "uint8",
        shape: int | tuple[int, ...] | None = None,
        *,
        offset: int = 0,
    ) -> npt.NDArray[Any]: ...
    def free(self) -> None: ...

class Host:
    """A process attached to a fabric."""

    def __init__(
        self,
        device_fd: int,
        fabric: str,
        name: str,
        *,
        use_tcp: bool = False,
        strict: bool = False,
        reads_allocate: bool = False,
        user_mode_only: bool = False,
        low: int = 0,
        high: int = 0,
        batch: int = 0,
        copy_around: int = 512,
        deadline: float = 5.0,
    ) -> None: ...
    @property
    def fabric(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def handler_tid(self) -> int: ...
    @property
    def detached(self) -> bool: ...
    def ralloc(self, size: int, *, lazy: bool = False, zero: bool = True) -> Buffer: ...
    def rfree(self, target: Buffer | int) -> None: ...
    def create_ref(
        self,
        target: _InDm | int | tuple[int, int],
        size: int | None = None,
        *,
        move: bool = False,
    ) -> Ref: ...
    def map_ref(
        self, ref: Ref | Buffer_, *, copy: bool = False, reserve: bool = False
    ) -> Buffer: ...
    def view_ref(self, ref: Ref | Buffer_) -> Buffer: ...
    def ref_is_held(self, data: Buffer_) -> bool: ...
    def drop_refs(self, data: Buffer_) -> int: ...
    def contains(self, target: _InDm | int) -> bool: ...
    def request(self, kind: int, payload: bytes = b"", deadline: float = 0.0) -> bytes: ...
    def stats(self) -> dict[str, int]: ...
    def detach(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

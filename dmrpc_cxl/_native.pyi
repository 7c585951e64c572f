"""Types of the native module: the only boundary between Python and C."""

from collections.abc import Sequence
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

    def changing(self) -> tuple[int, bool]:
        """Return the host entry, or 0, and whether the service table, that a predecessor was changing."""

    @property
    def fence_epoch(self) -> int:
        """The epoch that every change through this object depends on; 0: none. May be set."""

    @fence_epoch.setter
    def fence_epoch(self, epoch: int) -> None: ...
    @property
    def epoch(self) -> int:
        """The coordinators' epoch now."""

    def services(self) -> list[dict[str, Any]]:
        """List the service table by serial number, damaged entries included.

        slot, serial, host, incarnation, damaged, name, endpoint; name and endpoint are bytes.
        """

    def publish(
        self, host_id: int, incarnation: int, name: bytes, endpoint: bytes
    ) -> tuple[int, int]:
        """Add a service and return (slot, serial). Raises BadSize, ServiceTableFull."""

    def withdraw(self, slot: int, serial: int) -> None:
        """Free the entry of the service table with that serial number."""

    def owned(self) -> dict[int, int]:
        """Count the frames whose words name each host, in use or free."""

    def activate_host(
        self, host_id: int, pid: int, start_time: int, incarnation: int, name: str, frame_limit: int
    ) -> None:
        """Go from FREE to ACTIVE with an empty page table.

        Raises BadSize, BufferInUse (not FREE), DeviceFull.
        """

    def set_host_state(self, host_id: int, expect: int, state: int) -> bool:
        """Swap one of LAYOUT["HOST_*"] for another; False when the state was not expect."""

    def reclaim_host(self, host_id: int) -> dict[str, int]: ...
    def forget_refs(self) -> int:
        """Free every Ref entry, counts untouched: for a fabric in which nobody lives."""

    def holdings(self) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
        """List (host, page, frame, count) of page tables and (entry, holder, frame, count) of Refs."""

    def audit(self) -> dict[str, Any]:
        """Account for every frame: exact on a quiescent fabric, else perhaps transient.

        nr_frames, pool, free ({host: frames}), coming_home (of these, not taken in), in_use, mapped_pages, hole_pages, live_refs,
        ref_pages, overflow_frames, in_flight, nr_violations, violations (the first 64, as
        (frame or None, text)).
        """

class Scrub:
    """Accounting for every frame of a device in use, in slices."""

    def __init__(self, device: Device) -> None: ...
    def step(self, seconds: float) -> bool:
        """Go on with the look for about so long; True when it is complete."""

    def settle(self, min_looks: int, repair: bool = False) -> bool:
        """Make certain of suspects, and repair; False when hosts were at work and nothing is known."""

    @property
    def looks(self) -> int:
        """Number of looks completed."""

    @property
    def accounting(self) -> dict[str, Any]:
        """What the last complete look counted."""

    @property
    def suspects(self) -> list[dict[str, Any]]:
        """Frames and Refs that the last look found wrong."""

    @property
    def nr_overlooked(self) -> int:
        """Number of suspects that were too many to keep."""

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
    def accept(self, *, anew: bool = False) -> Ref: ...
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
    def fabric_id(self) -> int: ...
    @property
    def secret(self) -> bytes: ...
    def move_viewed(self, b: Buffer) -> Ref: ...
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
    def charge(self, nbytes: int) -> None: ...
    @property
    def emulates_latency(self) -> bool: ...
    def _latency_set(self, extra_ns: float, overlap: int) -> None: ...
    def _forget_given(self) -> None: ...
    def _latency_counts(self) -> dict[str, Any]: ...
    def request(self, kind: int, payload: bytes = b"", deadline: float = 0.0) -> bytes: ...
    def stats(self) -> dict[str, int]: ...
    def detach(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

def latency_measured() -> tuple[float, float]: ...
def latency_error(extra_ns: float) -> float: ...

# ---------------------------------------------------------------- rings (_ring.pxi)

DEF_CAPACITY: int
DEF_MAX_FRAME: int

def begin_frame(size: int) -> bytearray: ...
def grow_frame(frame: bytearray, size: int) -> None: ...

class Ring:
    """One end of a connection to another process through shared memory.

    A frame is bytes whose first 4 say how many they are (little-endian), at least 40. One thread may
    send while another receives; two of the same kind need the caller's lock. Every call on a closed
    ring raises RingClosed, and RemoteProtocolError when the peer wrote into the shared memory what
    it must not.
    """

    @staticmethod
    def create(capacity: int = ..., max_frame: int = ...) -> Ring:
        """Make a pair of rings, and be its server; capacity is a power of two, per direction."""

    @staticmethod
    def attach(memfd: int, my_bell: int, peer_bell: int, max_frame: int = ...) -> Ring:
        """Be the client of a pair that another process made.

        The descriptors are duplicated; the caller closes its own, whatever comes of it. Raises
        RemoteProtocolError unless the memory is sealed and of a ring, and the bells are eventfds.
        """

    @property
    def fds(self) -> tuple[int, int, int]:
        """(memory, my bell, peer's bell): the other side attaches with the last two exchanged."""

    @property
    def bell_fd(self) -> int:
        """My bell: readable once it has rung, until drain_bell."""

    @property
    def capacity(self) -> int: ...
    @property
    def max_frame(self) -> int: ...
    @property
    def peer_gone(self) -> bool:
        """Whether peer_fd has ended, as far as wait or a blocked send has seen."""

    @property
    def peer_spoke(self) -> bool:
        """Whether the last wait came back since peer_fd has something to read."""

    @property
    def closed(self) -> bool: ...
    @property
    def spin_us(self) -> int: ...
    @spin_us.setter
    def spin_us(self, value: float) -> None: ...
    def send(self, parts: Buffer_ | Sequence[Buffer_], timeout: float | None = None) -> None:
        """Send what the parts hold together, and wait for room if need be.

        Raises DeadlineExceeded, or PeerLost when peer_fd has ended. If nothing had gone out, nothing
        has changed. Otherwise the stream ends in a torn frame, the ring is closed for sending, the
        text says so, and later sends raise RingClosed.
        """

    def try_send(self, parts: Buffer_ | Sequence[Buffer_], skip: int = 0) -> int:
        """Write what fits, from byte `skip` of the whole on, and return how many bytes that was.

        If that was not all, our bell rings once half the ring is free.
        """

    def recv(self) -> bytearray | None:
        """Return the next frame, or None if it is not complete yet."""

    def has_data(self) -> bool:
        """Say whether there are bytes that recv has not taken yet."""

    def arm(self) -> bool:
        """Have our bell rung when data comes. True: there is some already, so it will not be."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for data, and return whether there is some.

        False when the time is up, or when peer_gone or peer_spoke say why. Data comes first.
        """

    def set_peer_fd(self, fd: int) -> None:
        """Look at a socket connected to the peer, or its pidfd, while waiting; -1: at nothing.

        It stays the caller's, who takes it back with -1, or closes the ring, before closing it.
        """

    def drain_bell(self) -> None:
        """Make bell_fd unreadable until the bell rings again; before recv, never after it."""

    def stats(self) -> dict[str, int]:
        """Return bytes_sent, bytes_received, bells_rung, sleeps, spins_won, spins_lost, space_waits."""

    def close(self) -> None:
        """Let go of memory and descriptors; calls in other threads come back with RingClosed."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

class WaitSet:
    """Rings and descriptors, waited for by several threads at once.

    A thread that got a ring's key takes its own lock for that connection, calls recv until None,
    sends what is waiting to be sent, and calls arm; if that says True it goes on reading. In between
    the ring is not reported for data, but may be for room after a short try_send.
    """

    def add_ring(self, ring: Ring, key: int) -> None:
        """Watch a ring, and arm it: it is reported once it has data, also if it has some now."""

    def add_fd(self, fd: int, key: int, edge: bool = True) -> None:
        """Watch a descriptor: each event is reported once, or (edge=False) while it is readable."""

    def remove(self, what: Ring | int) -> None:
        """Watch a ring or a descriptor no longer; others may be waiting. A ring may be closed before."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait, and return the key of one that is ready; -1 for a kick, None when the time is up."""

    def kick(self, n: int = 1) -> None:
        """Make n calls of wait return -1, now or later."""

    def set_spin_us(self, value: float) -> None:
        """Say how long one thread may look at the rings before it sleeps; 0: not at all."""

    def stats(self) -> dict[str, int]:
        """Return sleeps, spins_won, spins_lost."""

    def close(self) -> None:
        """Let go of everything; waiting threads come back with RingClosed."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

FRAME_LIMITS: dict[str, int]

class Frame:
    @property
    def kind(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def nr_refs(self) -> int: ...
    @property
    def call_id(self) -> int: ...
    @property
    def time_left_us(self) -> int: ...
    @property
    def method(self) -> int: ...
    @property
    def meta_bytes(self) -> int: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def inline_at(self) -> int: ...
    @property
    def data(self) -> bytearray | bytes | memoryview: ...
    @property
    def body(self) -> bytes | memoryview: ...
    @property
    def refs(self) -> memoryview: ...
    @property
    def meta(self) -> memoryview: ...

def parse_frame(data: bytearray | bytes | memoryview) -> Frame: ...
def frame_head(
    kind: int,
    call_id: int,
    flags: int = 0,
    refs: bytes | bytearray = b"",
    meta: bytes = b"",
    body: bytes = b"",
    method: int = 0,
    time_left_us: int = 0,
    inline_bytes: int = 0,
) -> bytes: ...

RELAY_TIMEOUT: int
RELAY_KICK: int
RELAY_FD: int
RELAY_ENDED: int
RELAY_BROKE: int
RELAY_LEAVING: int
RELAY_CALL: int

class Relay:
    """The connections of a load balancer, and the loop that passes frames on between them.

    One thread runs and changes it; MisuseError in another one while it runs. kick and the counters are for all.
    """

    def __init__(
        self,
        max_waiting: int,
        max_peers: int,
        max_backlog: int,
        overloaded: bytes,
        unreachable: bytes,
        *,
        in_turn: bool = False,
        asks: bool = False,
    ) -> None:
        """Make one without connections.

        Args:
            max_waiting: calls without reply; more are answered with the frame `overloaded`.
            max_peers: connections.
            max_backlog: bytes kept for one that does not read; it is dropped after that.
            unreachable: ERROR frame for calls when there is no backend.
            in_turn: backends get calls strictly in turn, whatever their load.
            asks: run returns at every call, to be answered by pass_on or refuse.
        """

    def add(
        self, ring: Ring | None, fd: int, backend: bool, max_frame: int, rest: bytes = b""
    ) -> int:
        """Take over a connection, and return its key: a ring and the socket that ends with it, or a socket alone.

        The descriptors stay the caller's; rest was read from the socket already.
        """

    def remove(self, key: int, lost: bytes) -> int:
        """Forget a connection and see to its calls; return how many calls this backend was given.

        A client's calls are cancelled. A backend's are answered with the ERROR frame `lost`.
        """

    def leave_out(self, key: int) -> None:
        """Give a backend no more calls."""

    def watch(self, fd: int) -> None:
        """Have run return when a descriptor is readable."""

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no longer; before it is closed."""

    def run(self, timeout: float | None = None) -> tuple[int, int, str]:
        """Pass frames on until there is something for the caller: what, key or descriptor, text.

        RELAY_FD: a watched descriptor is readable. RELAY_ENDED, RELAY_BROKE: a connection is to be removed; in the second
        case its peer may be told why. RELAY_LEAVING: a backend takes no more calls. RELAY_CALL: a client has called, and run
        says so again until that is answered.
        """

    def call(self) -> tuple[int, int, int, bytes, bytes]:
        """Return (method, flags, time_left_us, metadata, body) of the call that RELAY_CALL is about; both are copies."""

    def pass_on(self, backend: int = 0) -> None:
        """Give that call to a backend, by its key; 0: to one by policy."""

    def refuse(self, error: bytes) -> None:
        """Answer that call with an ERROR frame."""

    def kick(self) -> None:
        """Make run return, now or when it is called next."""

    def forwarded(self, key: int) -> int:
        """Return how many calls a backend was given; 0 once it is removed."""

    @property
    def nr_forwarded(self) -> int: ...
    @property
    def bytes_forwarded(self) -> int: ...
    @property
    def nr_waiting(self) -> int: ...
    def close(self) -> None:
        """Let go of everything but the connections' own descriptors. Idempotent."""

# ---------------------------------------------------------------- crash points (_crash.pxi)

CRASH_POINTS: dict[str, str]
"""What each label of csrc/crash.h says has been done, in the order of that file."""
CRASH_RECORD_BYTES: int
"""Size of the file that counts passes and deaths."""

def crash_point(label: str) -> None:
    """Say that the step of that label has been taken."""

def crash_at(label: str, passes: int = 1, record: str | None = None) -> None:
    """Let this process kill itself at the passes-th time it comes to a label; "none": only count.

    Raises KeyError: no such label.
    """

def crash_stop_at(label: str, passes: int = 1) -> None:
    """Let this process, if it is armed, stop itself at the passes-th time it comes to a label.

    Raises KeyError: no such label.
    """

def crash_record(data: Buffer_) -> tuple[dict[str, int], dict[str, int]]:
    """Return ({label: passes}, {label: deaths}) of the bytes of a record."""

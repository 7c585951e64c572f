"""Types of the native module: memory servers and their clients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

from typing_extensions import Buffer, Self

# ---------------------------------------------------------------- the wire (_wire.pxi)

COUNTERS: tuple[tuple[str, str], ...]
"""(name, description) of every counter of a shard."""
WIRE: dict[str, Any]
"""csrc/net_wire.h: numbers, and ``ops``, ``flags``, ``status`` by name.

``structs``: hello, welcome, request, answer, ref, audit -> (format for `struct.Struct`, names of its
fields).
"""

def error_of(status: int, operation: str) -> Exception:
    """Make the exception that a status stands for."""

# ---------------------------------------------------------------- the client (_link.pxi)

OUTCOME_BROKEN: int
OUTCOME_LOST: int
OUTCOME_CLOSED: int

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

class Link:
    """A data connection to one shard, and the calls that wait for it. Survives its sockets."""

    def __init__(
        self,
        server: int,
        shard: int,
        slice_bytes: int,
        max_calls: int,
        reopen: Callable[[Link, int], None],
    ) -> None: ...
    @property
    def server(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def slice_bytes(self) -> int: ...
    @property
    def reopen(self) -> Callable[[Link, int], None]: ...
    def resume(self, fd: int) -> None: ...
    def fail(self, outcome: int) -> None: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    @property
    def generation(self) -> int: ...
    def duplicate(self) -> tuple[int, int]: ...
    def open_bell(self) -> int: ...
    def pump(self) -> int: ...
    def stats(self) -> dict[str, int]: ...

class Call(Generic[_T_co]):
    """An operation under way, or done."""

    def done(self) -> bool:
        """Tell whether there is an answer, without waiting."""

    def result(self, timeout: float | None = None) -> _T_co:
        """Wait for the answer, and return or raise what it is."""

    def begin(self) -> int: ...
    def give_up(self) -> None: ...
    @property
    def lane(self) -> Link: ...
    @property
    def deadline_ns(self) -> int: ...

class Ref:
    """A transferable, single-holder claim on pages of a memory server."""

    @property
    def client(self) -> Client: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def server(self) -> int: ...
    @property
    def shard(self) -> int: ...
    def __len__(self) -> int: ...
    def to_bytes(self) -> bytes: ...
    @staticmethod
    def from_bytes(data: Buffer, client: Client | None = None) -> Ref: ...
    def accept(self) -> Ref: ...
    def clone(self) -> Ref: ...
    def drop(self) -> bool: ...

class Operations:
    """The calls of a client, whoever waits for them and how."""

    @property
    def client(self) -> Client: ...

class Client(Operations):
    """What every client has: links, and turns."""

    def __init__(self, patience: float) -> None: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def owner(self) -> int: ...
    max_transfer: int
    def open_link(self, server: int, shard: int, deadline_ns: int) -> Link | None: ...
    def set_link(self, server: int, shard: int, link: Link | None) -> None: ...
    def set_rota(self, rota: Iterable[tuple[int, int]], turn: int) -> None: ...
    def set_closed(self) -> list[Link]: ...
    def open_links(self) -> list[Link]: ...
    def ralloc(
        self,
        size: int,
        *,
        server: int | None = None,
        shard: int | None = None,
        timeout: float | None = None,
    ) -> int: ...
    def rfree(self, address: int, *, timeout: float | None = None) -> None: ...
    def rread(
        self, address: int, into: Buffer, size: int | None = None, *, timeout: float | None = None
    ) -> None: ...
    def read(self, address: int, size: int, *, timeout: float | None = None) -> bytearray: ...
    def rwrite(self, address: int, data: Buffer, *, timeout: float | None = None) -> None: ...
    def create_ref(
        self,
        address: int,
        size: int,
        *,
        move: bool = False,
        copy: bool = False,
        timeout: float | None = None,
    ) -> Ref: ...
    def map_ref(
        self, ref: Ref | Buffer, *, read_only: bool = False, timeout: float | None = None
    ) -> int: ...
    def accept_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> None: ...
    def clone_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> Ref: ...
    def drop_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> bool: ...
    def ref_is_held(self, ref: Ref | Buffer, *, timeout: float | None = None) -> bool: ...
    @overload
    def put(
        self,
        data: Buffer,
        *,
        keep: Literal[False] = False,
        server: int | None = None,
        shard: int | None = None,
        timeout: float | None = None,
    ) -> Ref: ...
    @overload
    def put(
        self,
        data: Buffer,
        *,
        keep: Literal[True],
        server: int | None = None,
        shard: int | None = None,
        timeout: float | None = None,
    ) -> tuple[Ref, int]: ...
    @overload
    def get(
        self,
        ref: Ref | Buffer,
        into: None = None,
        *,
        offset: int = 0,
        size: int | None = None,
        keep: bool = False,
        timeout: float | None = None,
    ) -> bytearray: ...
    @overload
    def get(
        self,
        ref: Ref | Buffer,
        into: Buffer,
        *,
        offset: int = 0,
        size: int | None = None,
        keep: bool = False,
        timeout: float | None = None,
    ) -> None: ...
    def ping(self, server: int = 0, shard: int = 0, *, timeout: float | None = None) -> None: ...
    def shard_stats(
        self, server: int = 0, shard: int = 0, *, timeout: float | None = None
    ) -> dict[str, int]: ...
    def shard_audit(
        self, server: int = 0, shard: int = 0, *, timeout: float | None = None
    ) -> dict[str, int]: ...

class Pipeline(Operations):
    """Calls that are sent without waiting for answers; each gives a Call, whose result() waits."""

    def __init__(self, client: Client) -> None: ...
    def flush(self) -> None: ...
    def wait(self) -> None: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def ralloc(
        self,
        size: int,
        *,
        server: int | None = None,
        shard: int | None = None,
        timeout: float | None = None,
    ) -> Call[int]: ...
    def rfree(self, address: int, *, timeout: float | None = None) -> Call[None]: ...
    def rread(
        self, address: int, into: Buffer, size: int | None = None, *, timeout: float | None = None
    ) -> Call[None]: ...
    def read(self, address: int, size: int, *, timeout: float | None = None) -> Call[bytearray]: ...
    def rwrite(self, address: int, data: Buffer, *, timeout: float | None = None) -> Call[None]: ...
    def create_ref(
        self,
        address: int,
        size: int,
        *,
        move: bool = False,
        copy: bool = False,
        timeout: float | None = None,
    ) -> Call[Ref]: ...
    def map_ref(
        self, ref: Ref | Buffer, *, read_only: bool = False, timeout: float | None = None
    ) -> Call[int]: ...
    def accept_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> Call[None]: ...
    def clone_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> Call[Ref]: ...
    def drop_ref(self, ref: Ref | Buffer, *, timeout: float | None = None) -> Call[bool]: ...
    def ref_is_held(self, ref: Ref | Buffer, *, timeout: float | None = None) -> Call[bool]: ...
    def put(
        self,
        data: Buffer,
        *,
        keep: bool = False,
        server: int | None = None,
        shard: int | None = None,
        timeout: float | None = None,
    ) -> Call[Any]: ...
    def get(
        self,
        ref: Ref | Buffer,
        into: Buffer | None = None,
        *,
        offset: int = 0,
        size: int | None = None,
        keep: bool = False,
        timeout: float | None = None,
    ) -> Call[Any]: ...
    def ping(
        self, server: int = 0, shard: int = 0, *, timeout: float | None = None
    ) -> Call[None]: ...
    def shard_stats(
        self, server: int = 0, shard: int = 0, *, timeout: float | None = None
    ) -> Call[dict[str, int]]: ...
    def shard_audit(
        self, server: int = 0, shard: int = 0, *, timeout: float | None = None
    ) -> Call[dict[str, int]]: ...

class Deferred(Operations):
    """Calls that a Python object sends: launch(call) says what becomes of each, and is what they return."""

    def __init__(self, client: Client, launch: Callable[[Call[Any]], Any]) -> None: ...
    def __getattr__(self, name: str) -> Callable[..., Any]: ...

# ---------------------------------------------------------------- the server (_server.pxi)

class Server:
    """A memory server in this process: threads in C, which need no GIL."""

    lock_error: int
    def __init__(
        self,
        listeners: Sequence[int],
        secret: bytes,
        *,
        pool_bytes: int,
        server: int = 0,
        shards: int = 1,
        page_bytes: int = 4096,
        max_processes: int = 1024,
        max_strangers: int = 256,
        hello_ms: int = 5000,
        vanished_s: int = 30,
        lock_pool: bool = True,
        populate: bool = True,
        eager: bool = False,
        time_translation: bool = False,
        **limits: int,
    ) -> None: ...
    @property
    def locked_bytes(self) -> int: ...
    @property
    def slice_bytes(self) -> int: ...
    @property
    def nr_processes(self) -> int: ...
    def close(self) -> None: ...

class Shard:
    """One shard without threads and sockets: bytes of requests in, bytes of answers out."""

    def __init__(self, pages: int, *, page_bytes: int = 4096, **limits: int) -> None: ...
    def connect(self, pid: int, session: int = 0) -> None: ...
    def depart(self, pid: int) -> None: ...
    def expire(self, seconds: float) -> None: ...
    def feed(self, pid: int, data: bytes, window: int = ...) -> tuple[bytes, bool]: ...

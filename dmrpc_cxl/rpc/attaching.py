"""Joining a fabric, with the memory that a process has: the pool, memory servers, or both.

Paper: IV.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from ..errors import MisuseError
from .host import Host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dmrpc_net.host import NetHost
    from dmrpc_net.memory import Fetch

__all__ = ["Memories", "attach"]

Memories: TypeAlias = Literal["cxl", "net"]


@overload
def attach(
    fabric: str,
    *,
    dm: Literal["cxl"] | None = None,
    servers: str | Sequence[str] | None = None,
    memory_secret: bytes | str | os.PathLike[str] | None = None,
    fetch: Fetch = "whole",
    **options: Any,
) -> Host: ...
@overload
def attach(
    fabric: str,
    *,
    dm: Literal["net"],
    servers: str | Sequence[str] | None = None,
    memory_secret: bytes | str | os.PathLike[str] | None = None,
    fetch: Fetch = "whole",
    **options: Any,
) -> NetHost: ...


def attach(
    fabric: str,
    *,
    dm: Memories | None = None,
    servers: str | Sequence[str] | None = None,
    memory_secret: bytes | str | os.PathLike[str] | None = None,
    fetch: Fetch = "whole",
    **options: Any,
) -> Host | NetHost:
    """Join a fabric.

    Args:
        fabric: its name, as given to ``dmrpc fabric create``.
        dm: where large data goes. "cxl": to the pool, by loads and stores. "net": to memory servers; the device is not
            mapped, and of the options only name, transport and deadline count. None: what the environment variable
            DMRPC_DM says, else "cxl".
        servers: addresses of memory servers, as for :func:`dmrpc_net.attach`. With "cxl": use them as well, for calls
            to and from hosts without the pool. None: with "net" those of DMRPC_MEMORY, with "cxl" none.
        memory_secret: the servers' secret or its file; None: that in DMRPC_MEMORY_SECRET.
        fetch: when the bytes of arrays from memory servers come: "whole" or "touched" when they are looked at, "now"
            with the message; see :mod:`dmrpc_net.memory`.
        options: see :meth:`Host.attach`.

    Returns:
        Host or NetHost: attached; a context manager that detaches.

    Raises:
        DeviceNotFound, CoordinatorLost, and others: see Host.attach.
        ServerLost, AccessDenied: memory servers that cannot be used.
        MisuseError: no servers are known.
    """
    dm = dm or os.environ.get("DMRPC_DM") or "cxl"  # type: ignore[assignment]
    if dm not in ("cxl", "net"):
        raise MisuseError(f"dm: 'cxl' or 'net', not {dm!r}")
    if dm == "cxl" and servers is None:
        return Host.attach(fabric, **options)
    from dmrpc_net.host import MixedHost, NetHost
    from dmrpc_net.memory import Memory

    deadline = options.get("deadline", 5.0)
    memory = Memory.attach(servers, secret=memory_secret, deadline=deadline, fetch=fetch)
    try:
        if dm == "cxl":
            host = MixedHost.attach(fabric, **options)
            host.memory = memory
            return host
        return NetHost(
            fabric,
            options.get("name") or f"pid-{os.getpid()}",
            memory,
            transport=options.get("transport", "unix"),
            deadline=deadline,
        )
    except BaseException:
        memory.close()
        raise

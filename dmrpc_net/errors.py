"""What memory servers and their clients raise beside the exceptions of :mod:`dmrpc_cxl.errors`.

DmError
├── MisuseError
│   └── ReadOnly (PermissionError)      a store to a range that was mapped read-only
└── PeerError
    ├── PidTaken                        two processes were given one id; attach tries again
    └── CallError
        └── PeerLost (ConnectionError)
            ├── ServerLost                  a memory server is gone, and what it held of ours
            └── AnswerLost                  carried out, but with what result nobody knows any more
"""

from __future__ import annotations

from dmrpc_cxl.errors import MisuseError, PeerError, PeerLost

__all__ = ["AnswerLost", "PidTaken", "ReadOnly", "ServerLost"]


class ReadOnly(MisuseError, PermissionError):
    """The range was mapped read-only."""


class PidTaken(PeerError):
    """Another process has the same process id at a server."""


class ServerLost(PeerLost):
    """A memory server died, or let go of this process: its addresses mean nothing any more."""


class AnswerLost(PeerLost):
    """The connection broke after the request was carried out, and its answer cannot be had again."""

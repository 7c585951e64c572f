"""DmRPC over memory servers: explicit reads and writes of pages that a server process holds.

A map of the package:

==============  ========================================================================================
``client``      attach, Client: the paper's Table II over the network, and what becomes of connections
``aio``         the same calls for asyncio
``memory``      the servers as the memory of a host: arrays that are fetched when they are looked at
``host``        hosts for services that have it instead of the pool, or beside it
``server``      the command ``dmrpc net-server``
``greeting``    the first words on a connection
``errors``      what is raised beside the exceptions of ``dmrpc_cxl.errors``
``_native``     the server's threads and the client's connections, in C (csrc/)
==============  ========================================================================================
"""

from __future__ import annotations

from ._native import COUNTERS, Call, Pipeline, Ref
from .client import Client, attach
from .errors import AnswerLost, ReadOnly, ServerLost

__all__ = [
    "COUNTERS",
    "AnswerLost",
    "Call",
    "Client",
    "Pipeline",
    "ReadOnly",
    "Ref",
    "ServerLost",
    "attach",
]

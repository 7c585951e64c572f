"""Variants over memory servers: the same services as those of ``rpc``, on hosts that have no pool.

- `net`: by Ref to a memory server. The receiver fetches what it looks at; its stores are to its own memory.
- `net-copy`: the same, with a server that copies pages whenever a Ref is made of them.

The server has a thread for each shard, one here, and its CPU time counts. *fresh* puts the bytes at the server in each request.
*pre-shared* puts them there once or twice; afterwards each request makes another Ref of the same pages.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from ...net_stage import memory_server
from ...rpc_stage import serve
from ..runner import Runner
from .base import Parties, Writing
from .rpc import Writer, write_block


class ByServer(Writing):
    """By Ref to a memory server."""

    name = "net"
    says = "by Ref (DmRPC-net)"
    colour = "#2a9d5c"
    marker = "D"
    transfer = "ref"
    modes: ClassVar[tuple[str, ...]] = ("fresh", "pre-shared")
    server_options: ClassVar[tuple[str, ...]] = ()

    def start(self, runner: Runner) -> Parties:
        on, client, writer = runner.on, f"{self.name}-client", f"{self.name}-writer"
        with contextlib.ExitStack() as stack:
            here, pid = stack.enter_context(memory_server(*self.server_options))
            where: dict[str, Any] = {
                "dm": "net",
                "servers": list(here.addresses),
                "memory_secret": here.secret,
            }
            on.start(client, **where)
            on.start(writer, serve, Writer, **where)

            def pids() -> dict[str, int]:
                return {f"{self.name}-server": pid}

            runner.foreign.append(pids)
            stack.callback(runner.foreign.remove, pids)
            arguments: dict[str, Any] = {"service": writer, "transfer": self.transfer}
            return Parties(
                client,
                (writer, "coordinator"),
                write_block,
                arguments,
                pids=pids,
                stop=stack.pop_all().close,
            )


class ByCopyingServer(ByServer):
    """By Ref to a memory server that copies pages when a Ref is made of them."""

    name = "net-copy"
    says = "by Ref (DmRPC-net), copied at once"
    colour = "#9bc53d"
    marker = "d"
    modes: ClassVar[tuple[str, ...]] = ("pre-shared",)
    server_options: ClassVar[tuple[str, ...]] = ("--copy",)

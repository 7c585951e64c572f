"""Variants of the RPC layer: the same services, connections and processes, another way for the argument.

- `value`: in the message, at every hop.
- `cxl`: by Ref, stores are copy-on-write.
- `cxl-copy`: by Ref, but what lies in DM is copied when its Ref is made.

Modes. *fresh*: the argument is an ordinary array; it is copied into DM and that copy is given away. *shared*: the caller writes
into a DM buffer of its own, made for this request, keeps it while the receiver stores to its pages, and frees it.
*pre-shared*: the same, but the buffer was written once, before.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ...rpc_stage import client_of, serve
from ..blocks import Block, one_by_one, windowed
from ..runner import Runner
from .base import Parties, Writing
from .work import Bytes, Requests, overwrite

CLIENT, WRITER, ONE_PAGE_WRITER = "client", "writer", "one-page-writer"


class Writer:
    """Stores to a share of the blocks that it is sent."""

    def write(self, block: np.ndarray[Any, Any], pages: int, nbytes: int, value: int) -> int:
        return overwrite(block, pages, nbytes, value)


def write_block(
    host: Any,
    service: str,
    transport: str,
    transfer: str,
    mode: str,
    size: int,
    pages: int,
    nbytes: int,
    window: int = 1,
    charged: bool = False,
) -> Block:
    """Return a block of requests to a Writer; charged: tell the model of slower memory what is written into DM here."""
    client = client_of(host, service, transport).using(transfer=transfer)
    method = client.write if window == 1 else client.future.write
    requests = Requests(size, pages, same=mode == "pre-shared")
    held: list[Bytes] = []
    if mode == "pre-shared":
        held.append(host.array(requests.sources[0]))

    def fresh() -> Any:
        block, value = requests.next()
        return method(block, pages, nbytes, value)

    def shared() -> Any:
        block, value = requests.next()
        array = host.empty(size, "u1")
        np.copyto(array, block)
        if charged:
            host.charge(size)
        return method(array, pages, nbytes, value)

    def pre_shared() -> Any:
        value = requests.next()[1]
        return method(held[0], pages, nbytes, value)

    request = {"fresh": fresh, "shared": shared, "pre-shared": pre_shared}[mode]
    made = (
        one_by_one(request, requests.expected)
        if window == 1
        else windowed(request, requests.expected, window)
    )
    made.close = held.clear
    return made


class _OverRpc(Writing):
    """What the variants of the RPC layer share."""

    writer = WRITER
    options: ClassVar[dict[str, Any]] = {}  # of the writer's attach()

    def start(self, runner: Runner) -> Parties:
        on = runner.on
        if CLIENT not in on.peers:
            on.start(CLIENT)
        if self.writer not in on.peers:
            on.start(self.writer, serve, Writer, **self.options)
        return Parties(
            CLIENT,
            (self.writer, "coordinator"),
            write_block,
            {"service": self.writer, "transfer": self.transfer},
        )


class ByValue(_OverRpc):
    """The RPC layer with references turned off: the baseline."""

    name = "value"
    says = "by value"
    colour = "#8c8c8c"
    marker = "s"
    transfer = "value"
    modes = ("fresh",)


class ByRef(_OverRpc):
    """The RPC layer as it is: by Ref."""

    name = "cxl"
    says = "by Ref (DmRPC-CXL)"
    colour = "#0b6fb8"
    transfer = "ref"
    modes: ClassVar[tuple[str, ...]] = ("fresh", "shared", "pre-shared")


class OnePage(ByRef):
    """By Ref, and a fault copies the page that is stored to and no other."""

    name = "cxl-1"
    says = "by Ref, one page a fault"
    colour = "#62b1e3"
    marker = "v"
    modes = ("shared", "pre-shared")
    writer = ONE_PAGE_WRITER
    options: ClassVar[dict[str, Any]] = {"copy_around": 1}


class EagerCopy(_OverRpc):
    """By Ref, but what is in DM is copied when its Ref is made."""

    name = "cxl-copy"
    says = "by Ref, copied at once"
    colour = "#e08214"
    marker = "^"
    transfer = "copy"
    modes = ("shared", "pre-shared")

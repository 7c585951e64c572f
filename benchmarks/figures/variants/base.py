"""What a variant has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..runner import Runner


class Variant(ABC):
    """One way to get an argument to a service.

    Attributes:
        name: short, as in tables and files.
        says: what it is, in a legend.
        colour, marker: the same in all plots.
        modes: how the data may come: "fresh", "pre-shared" ...
        transfer: for services of the RPC layer, how its clients send arrays; None: it is no mode of the RPC layer.
    """

    name: ClassVar[str]
    says: ClassVar[str]
    colour: ClassVar[str]
    marker: ClassVar[str] = "o"
    modes: ClassVar[tuple[str, ...]] = ("fresh", "pre-shared")
    transfer: ClassVar[str | None] = None

    def why_not(self) -> str:
        """Say why it cannot be measured here; nothing if it can."""
        return ""


class Writing(Variant):
    """A variant that can send a block to somebody who stores to a share of it."""

    @abstractmethod
    def start(self, runner: Runner) -> Parties:
        """Start the processes of this variant, and return who they are."""


class Parties:
    """Who takes part in sending blocks.

    Args:
        client: name of the process that sends.
        processes: names of the others.
        factory: factory(host, size=, mode=, pages=, nbytes=, window=, **arguments) makes a block of requests there.
        pids: processes that came into being without us: children of the named ones.
        stop: ends what was started beyond the named processes.
        over_rpc: requests go through the RPC layer; the factory takes transport= as well.
    """

    def __init__(
        self,
        client: str,
        processes: tuple[str, ...],
        factory: Callable[..., Any],
        arguments: dict[str, Any] | None = None,
        pids: Callable[[], Mapping[str, int]] | None = None,
        stop: Callable[[], None] | None = None,
        over_rpc: bool = True,
    ) -> None:
        self.client = client
        self.processes = processes
        self.factory = factory
        self.arguments = arguments or {}
        self.pids = pids
        self.stop = stop
        self.over_rpc = over_rpc

"""The processes: which there are, for the launcher, and what each of them runs.

    hosts(args)     the seven hosts of a run, for dmrpc_cxl.fabric.launcher; benchmarks start the roles as they like
    firewall, balancer, processor, worker, store
                    what a host runs: a function that gets an attached Host, arguments in sys.argv

Besides its service each host has a desk, "desk-NAME": the client asks there what was counted, and the host ends when nobody
attends to it any more. So all end with the client, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client as Coordinator
from dmrpc_cxl.fabric.place import Place
from dmrpc_cxl.fabric.topology import HostSpec, Program
from dmrpc_cxl.rpc.endpoint import Transport

from .variants import VARIANTS

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 30.0  # for the others to come up
MAX_WINDOW = 64
STORE_BYTES = 256 << 20
NR_PROCESSORS = 2
TRANSCODER, COMPRESSOR = "transcoder", "compressor"
WORKERS = (TRANSCODER, COMPRESSOR)


def processors(number: int = NR_PROCESSORS) -> tuple[str, ...]:
    """Return the names of the image processors."""
    return tuple(f"processor-{place}" for place in range(1, number + 1))


# ---------------------------------------------------------------- the launcher's side


def hosts(args: Sequence[str] = (), nr_processors: int = NR_PROCESSORS) -> tuple[HostSpec, ...]:
    """Make the hosts of a run: the client, which gets the arguments, and the services.

    Args:
        args: for session.py; what concerns the services is read here as well.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_service_options(parser)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=[])
    options, _ = parser.parse_known_args(list(args))
    transport = ("--transport", options.transport)
    names = processors(nr_processors)
    kinds = [VARIANTS[name] for name in options.variants if name in VARIANTS]
    more = sorted({role for kind in kinds for role in kind.needs})

    def host(name: str, role: str, *words: str, module: str = "hosts") -> HostSpec:
        argv = (sys.executable, "-m", "dmrpc_cxl.fabric.call", f"examples.image_pipeline.{module}:{role}")
        return HostSpec(name, (Program((*argv, *words), (("PYTHONPATH", str(CHECKOUT)),)),))

    return (
        host("client", "main", *args, "--processors", str(nr_processors), module="session"),
        host("firewall", "firewall", *transport),
        host("balancer", "balancer", *transport, *names),
        *(host(name, "processor", *transport) for name in names),
        *(host(name, "worker", *transport) for name in WORKERS),
        *(host(name, name, *transport) for name in more),
    )


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all hosts of a run have to agree about."""
    parser.add_argument(
        "--transport",
        choices=("auto", "ring", "tcp"),
        default="auto",
        help="between the services; auto: rings where they reach  [default: auto]",
    )


# ---------------------------------------------------------------- a host's side


class Account(msgspec.Struct):
    """What a host has counted."""

    counts: dict[str, int]
    bytes_forwarded: int = 0
    """Of the calls and replies that it passed on."""


class Desk:
    """What a host tells about itself; it is over when nobody attends to it."""

    def __init__(self, account: Callable[[], Account]) -> None:
        self._account = account
        self.over = threading.Event()

    def account(self) -> Account:
        """Return what was counted so far."""
        return self._account()

    async def attend(self) -> None:
        """Last as long as the caller stays: a call is cancelled when its connection ends."""
        try:
            await asyncio.Event().wait()
        finally:
            self.over.set()


def wait_for(host: dmrpc_cxl.Host, *names: str) -> None:
    """Wait until these services are published: all hosts of a run start at once.

    Raises:
        ServiceNotFound: one of them does not come.
    """
    with Coordinator.to(host.fabric, tcp=Place.of_environment().transport == "tcp") as coordinator:
        for name in names:
            coordinator.wait_for_service(name, SECONDS)


@contextlib.contextmanager
def serving_until_left(host: dmrpc_cxl.Host, account: Callable[[], Account]) -> Iterator[None]:
    """Serve the desk around a block, and wait behind it until nobody attends."""
    desk = Desk(account)
    with host.serve(desk, name=f"desk-{host.name}", threads=1):
        yield
        desk.over.wait()


def _arguments(*more: tuple[Any, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=Place.of_environment().host_name)
    add_service_options(parser)
    for name, options in more:
        parser.add_argument(name, **options)
    return parser.parse_args()


def _forward(
    host: dmrpc_cxl.Host,
    backends: Sequence[str],
    transport: Transport,
    counts: Callable[[], dict[str, int]],
    **options: Any,
) -> int:
    """Pass requests on under this host's name until nobody attends."""
    wait_for(host, *backends)
    with dmrpc_cxl.Forwarder(
        host, host.name, backends, transport=transport, **options
    ) as forwarder:
        account = lambda: Account(counts(), forwarder.bytes_forwarded)  # noqa: E731
        with serving_until_left(host, account):
            pass
    return 0


def firewall(host: dmrpc_cxl.Host) -> int:
    """Check who sends requests, and pass them on to the balancer."""
    from .services import Firewall
    from .users import UserTable

    check = Firewall(UserTable.of_fabric(host.secret))
    return _forward(host, ["balancer"], _arguments().transport, check.counts, route=check)


def balancer(host: dmrpc_cxl.Host) -> int:
    """Pass requests on to the image processors named on the command line, strictly in turn."""
    options = _arguments(("names", {"nargs": "+"}))
    return _forward(host, options.names, options.transport, dict, policy="round-robin")


def processor(host: dmrpc_cxl.Host) -> int:
    """Pass requests on to the service for what they ask for."""
    from .services import ImageProcessor
    from .work import Op

    pick = ImageProcessor({Op.TRANSCODE: TRANSCODER, Op.COMPRESS: COMPRESSOR})
    return _forward(host, WORKERS, _arguments().transport, pick.counts, route=pick)


def worker(host: dmrpc_cxl.Host) -> int:
    """Transcode or compress, by this host's name."""
    from .services import Worker
    from .work import Op

    options = _arguments(
        ("--threads", {"type": int, "default": 2, "metavar": "N"}),
        ("--die-at", {"type": int, "metavar": "N", "help": "SIGKILL itself with the Nth picture in hand"}),
    )
    op = Op.TRANSCODE if host.name == TRANSCODER else Op.COMPRESS
    service = Worker(host, op, die_at=options.die_at)
    with host.serve(service, name=host.name, threads=options.threads):
        with serving_until_left(host, lambda: Account(service.counts())):
            pass
    print(f"{service.counts().get('pictures', 0)} pictures")
    return 0


def store(host: dmrpc_cxl.Host) -> int:
    """Keep objects, for the variant of that name."""
    from .store import NAME, ObjectStore

    _arguments()
    service = ObjectStore(STORE_BYTES)
    with host.serve(service, name=NAME, threads=2):
        with serving_until_left(host, lambda: Account({"objects": service.nr_objects()})):
            pass
    return 0

"""Starting each service in the process that asks for it. hosts.py does so for the launcher; tests and benchmarks as they like.

    for name in reversed(service_names()):      # so each finds those that it calls
        running[name] = start(host_of[name], name, transport="tcp")
    ...
    running[name].stop()

Names say what a service is: "firewall", "balancer", "processor-1", ..., "transcoder", "compressor", "store".
"""

from __future__ import annotations

import dmrpc_cxl
from dmrpc_cxl.rpc.endpoint import Transport

from ..serving.running import Account, Running
from .services import Firewall, ImageProcessor, Worker
from .store import NAME as STORE
from .store import ObjectStore
from .users import UserTable
from .variants import VARIANTS
from .work import Op

__all__ = ["Account", "Running", "called_by", "processor_names", "service_names", "start"]

FIREWALL, BALANCER, PROCESSOR = "firewall", "balancer", "processor"
WORKERS = {"transcoder": Op.TRANSCODE, "compressor": Op.COMPRESS}
NR_PROCESSORS = 2
WORKER_THREADS = 2
STORE_BYTES = 256 << 20


def processor_names(number: int = NR_PROCESSORS) -> tuple[str, ...]:
    """Return the names of the image processors."""
    return tuple(f"{PROCESSOR}-{place}" for place in range(1, number + 1))


def service_names(
    nr_processors: int = NR_PROCESSORS, variants: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the names of all services, each before those that it calls, with those that the variants need besides."""
    more = sorted({name for variant in variants for name in VARIANTS[variant].needs})
    return (FIREWALL, BALANCER, *processor_names(nr_processors), *WORKERS, *more)


def called_by(name: str, nr_processors: int = NR_PROCESSORS) -> tuple[str, ...]:
    """Return the names of the services that one calls."""
    if name == FIREWALL:
        return (BALANCER,)
    if name == BALANCER:
        return processor_names(nr_processors)
    return tuple(WORKERS) if name.startswith(PROCESSOR) else ()


def start(
    host: dmrpc_cxl.Host,
    name: str,
    *,
    transport: Transport = "auto",
    nr_processors: int = NR_PROCESSORS,
    threads: int = WORKER_THREADS,
    die_at: int | None = None,
) -> Running:
    """Start a service under its name; those that it calls must run.

    Args:
        transport: of its connections to those.
        nr_processors: that the balancer deals requests out to.
        threads: of a worker: pictures at once.
        die_at: of a worker: see Worker.

    Raises:
        ValueError: there is no such service.
        ServiceNotFound, PeerLost: one that it calls cannot be reached.
    """
    behind = called_by(name, nr_processors)
    if name == FIREWALL:
        check = Firewall(UserTable.of_fabric(host.secret))
        forwarder = dmrpc_cxl.Forwarder(host, name, behind, transport=transport, route=check)
        return Running(forwarder, check.counts)
    if name == BALANCER:
        return Running(
            dmrpc_cxl.Forwarder(host, name, behind, transport=transport, policy="round-robin")
        )
    if name.startswith(PROCESSOR):
        pick = ImageProcessor({op: worker for worker, op in WORKERS.items()})
        forwarder = dmrpc_cxl.Forwarder(host, name, behind, transport=transport, route=pick)
        return Running(forwarder, pick.counts)
    if name in WORKERS:
        worker = Worker(host, WORKERS[name], die_at)
        return Running(host.serve(worker, name=name, threads=threads), worker.counts)
    if name == STORE:
        store = ObjectStore(STORE_BYTES)
        return Running(
            host.serve(store, name=name, threads=2), lambda: {"objects": store.nr_objects()}
        )
    raise ValueError(
        f"no service {name!r}: one of {', '.join(service_names(variants=tuple(VARIANTS)))}"
    )

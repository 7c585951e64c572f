"""Starting each service in the process that asks for it. hosts.py does so for the launcher; tests and benchmarks as they like.

    for name in reversed(process_names()):      # so each finds those that it calls
        running[name] = start(host_of[name], name, stores=Stores("memory"))
    ...
    running[name].stop()

Names say what a process is: "load-balancer", "proxy", "php-fpm", "compose-post", ... What is behind php-fpm serves under two names:
its own, with typed methods, and "NAME/front", with the one method that a request comes by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.rpc.endpoint import Transport

from ..serving.running import Account, Counting, Running
from . import services, storage
from .records import Kind
from .stores import Stores
from .variants import VARIANTS

LOAD_BALANCER, PROXY, PHP_FPM, POST_STORAGE = "load-balancer", "proxy", "php-fpm", "post-storage"
MOVERS = (LOAD_BALANCER, PROXY, PHP_FPM)
HELPERS = ("text", "url-shorten", "user-mention", "unique-id", "media", "user")
"""What a compact set has in one process, "helpers"."""
FRONT = {
    Kind.COMPOSE: "compose-post",
    Kind.HOME_TIMELINE: "home-timeline",
    Kind.USER_TIMELINE: "user-timeline",
    Kind.REGISTER: "user",
    Kind.FOLLOW: "social-graph",
}
CALLS = {
    LOAD_BALANCER: (PROXY,),
    PROXY: (PHP_FPM,),
    PHP_FPM: tuple(f"{name}/front" for name in FRONT.values()),
    "compose-post": ("text", "user", "media", "unique-id", POST_STORAGE, "user-timeline", "home-timeline"),
    "home-timeline": (POST_STORAGE, "social-graph"),
    "user-timeline": (POST_STORAGE,),
    "social-graph": ("user",),
    "text": ("url-shorten", "user-mention"),
    "user-mention": ("user",),
}  # fmt: skip
"""Which service calls which; what is called stands behind who calls it in service_names()."""
THREADS = 8
PATIENCE_SECONDS = 2.0


def service_names() -> tuple[str, ...]:
    """Return the names of all services, each before those that it calls."""
    return (
        *MOVERS, "compose-post", "home-timeline", "user-timeline", "social-graph", *HELPERS, POST_STORAGE,
    )  # fmt: skip


def process_names(*, compact: bool = False) -> tuple[str, ...]:
    """Return the names of the processes, each before those that it calls; compact: with the helpers in one."""
    if not compact:
        return service_names()
    kept = [name for name in service_names() if name not in HELPERS]
    return (*kept[:-1], "helpers", kept[-1])


def services_in(process: str) -> tuple[str, ...]:
    """Return the services that run in a process."""
    return HELPERS if process == "helpers" else (process,)


def called_by(process: str) -> tuple[str, ...]:
    """Return the names that must be published before a process can start its services."""
    inside = services_in(process)
    called = [other for name in inside for other in CALLS.get(name, ())]
    return tuple(dict.fromkeys(other for other in called if other not in inside))


class Process:
    """What runs in one process."""

    def __init__(self) -> None:
        self._parts: list[Running] = []
        self._endings: list[Callable[[], None]] = []
        self.http_port = 0
        """Where the load balancer listens for HTTP; 0: nowhere."""

    def add(self, part: Running) -> None:
        """Add a part; what was added last ends first."""
        self._parts.append(part)

    def at_end(self, ending: Callable[[], None]) -> None:
        """Have something called when all parts have ended."""
        self._endings.append(ending)

    def account(self) -> Account:
        """Return what all parts have counted."""
        total = Account({})
        for part in self._parts:
            one = part.account()
            total.counts.update(one.counts)
            total.bytes_forwarded += one.bytes_forwarded
        return total

    def stop(self) -> None:
        """End everything."""
        for part in reversed(self._parts):
            part.stop()
        for ending in reversed(self._endings):
            ending()


class _Starting:
    """Starts services of one process."""

    def __init__(
        self,
        host: dmrpc_cxl.Host,
        process: Process,
        transport: Transport,
        stores: Stores,
        http: dict[str, Any] | None,
        patience: float,
    ) -> None:
        self._patience = patience
        self._http = http
        self._host = host
        self._process = process
        self._transport = transport
        self._stores = stores

    def _client(self, name: str, kind: type[Any]) -> Any:
        return self._host.connect(
            name, kind, transport=self._transport, connect_timeout=self._patience
        )

    def _posts(self) -> dict[str, Any]:
        client = self._host.connect(
            POST_STORAGE,
            storage.PostStorage,
            transport=self._transport,
            connect_timeout=self._patience,
        )
        return {
            name: client.using(transfer=variant.transfer)  # type: ignore[attr-defined]
            for name, variant in VARIANTS.items()
        }

    def start(self, name: str) -> None:
        """Start a service."""
        if name in MOVERS:
            self._start_mover(name)
            return
        made = self._make(name)
        counts = made.counts if isinstance(made, Counting) else dict
        self._serve(made, name, counts)
        if name in FRONT.values():
            self._serve(services.Entrance(made.handle), f"{name}/front")
        if isinstance(made, storage.PostStorage):
            self._process.at_end(made.evict)

    def _serve(self, made: Any, name: str, counts: Callable[[], dict[str, int]] = dict) -> None:
        end = self._host.serve(made, name=name, threads=THREADS)
        self._process.add(Running(end, counts))

    def _start_mover(self, name: str) -> None:
        options: dict[str, Any] = {"transport": self._transport}
        counts: Callable[[], dict[str, int]] = dict
        if name == PHP_FPM:
            route = services.Dispatcher({kind: f"{one}/front" for kind, one in FRONT.items()})
            options["route"], counts = route, route.counts
        forwarder = dmrpc_cxl.Forwarder(self._host, name, CALLS[name], **options)
        self._process.add(Running(forwarder, counts))
        if name == LOAD_BALANCER and self._http is not None:
            from .web import Web  # which needs a package more

            how = {"transport": self._transport, "patience": self._patience, **self._http}
            web = Web(self._host, **how)
            self._process.http_port = web.port
            self._process.at_end(web.stop)

    def _make(self, name: str) -> Any:
        client, stores = self._client, self._stores
        if name == POST_STORAGE:
            return storage.PostStorage(self._host, stores)
        if name == "user":
            return storage.UserService(stores)
        if name == "media":
            return services.MediaService()
        if name == "unique-id":
            return services.UniqueId(self._host.id)
        if name == "user-mention":
            return services.UserMentions(client("user", storage.UserService))
        if name == "url-shorten":
            return services.UrlShorten(stores)
        if name == "text":
            return services.TextService(
                client("url-shorten", services.UrlShorten),
                client("user-mention", services.UserMentions),
            )
        if name == "social-graph":
            return storage.SocialGraph(stores, client("user", storage.UserService))
        if name == "user-timeline":
            return storage.UserTimeline(stores, self._posts())
        if name == "home-timeline":
            graph = client("social-graph", storage.SocialGraph)
            return storage.HomeTimeline(stores, self._posts(), graph)
        if name == "compose-post":
            return services.ComposePost(
                text=client("text", services.TextService),
                user=client("user", storage.UserService),
                media=client("media", services.MediaService),
                unique_id=client("unique-id", services.UniqueId),
                posts=self._posts(),
                user_timeline=client("user-timeline", storage.UserTimeline),
                home_timeline=client("home-timeline", storage.HomeTimeline),
            )
        raise ValueError(f"no service {name!r}: one of {', '.join(service_names())}")


def start(
    host: dmrpc_cxl.Host,
    process: str,
    *,
    stores: Stores | None = None,
    transport: Transport = "auto",
    http: dict[str, Any] | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Process:
    """Start the services of a process; those that they call elsewhere must run.

    Args:
        stores: where they keep things, closed when the process ends; None: in memory.
        transport: of their connections.
        http: of the load balancer: options of web.Web; None: no HTTP.
        patience: seconds to look for a service that was lost, before a request fails.

    Raises:
        ValueError: there is no such service.
        ServiceNotFound, PeerLost: one that they call cannot be reached.
    """
    made = Process()
    stores = stores or Stores()
    made.at_end(stores.close)
    starting = _Starting(host, made, transport, stores, http, patience)
    try:
        for name in reversed(services_in(process)):
            starting.start(name)
    except BaseException:
        made.stop()
        raise
    return made

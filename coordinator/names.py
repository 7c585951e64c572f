"""The name service: which live host offers which service, and where.

Pure. directory.py keeps them in the device; they vanish with the host that published them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dmrpc_cxl.errors import MisuseError, ServiceExists, ServiceNotFound

MAX_NAME_CHARACTERS = 255
MAX_NAMES_PER_HOST = 1024


class BadName(MisuseError, ValueError):
    """Not a name that a service can have, or more names than one host may publish."""


@dataclass(frozen=True)
class Service:
    """One published name."""

    name: str
    endpoint: Any
    """Where the service listens: whatever JSON value its host published."""
    host: int

    def as_json(self) -> dict[str, Any]:
        """Return the object that LOOKUP and LIST answer with."""
        return {"name": self.name, "endpoint": self.endpoint, "host": self.host}


def check_name(name: object) -> str:
    """Return `name` if a service can be called that.

    Raises:
        BadName: empty, too long, not text, or not printable.
    """
    if not isinstance(name, str):
        raise BadName("a service name is text")
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise BadName(f"a service name has 1 to {MAX_NAME_CHARACTERS} characters")
    if not name.isprintable():
        raise BadName("a service name consists of printable characters")
    return name


class Names:
    """All published names."""

    def __init__(self) -> None:
        """Begin empty."""
        self._services: dict[str, Service] = {}
        self._of_host: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._services)

    def __contains__(self, name: str) -> bool:
        """Tell whether somebody has published `name`."""
        return name in self._services

    def __iter__(self) -> Iterator[Service]:
        """Yield the services by name."""
        return (self._services[name] for name in sorted(self._services))

    def get(self, name: str) -> Service | None:
        """Return the service of that name, if anybody has published it."""
        return self._services.get(name)

    def check(self, name: str, host: int) -> None:
        """Check that `host` may publish `name`.

        Raises:
            ServiceExists: another live host has published the name.
            BadName: not a possible name, or the host has too many.
        """
        check_name(name)
        known = self._services.get(name)
        if known is not None and known.host != host:
            raise ServiceExists(f"service {name!r} is published by host {known.host}")
        mine = self._of_host.get(host, ())
        if name not in mine and len(mine) >= MAX_NAMES_PER_HOST:
            raise BadName(f"host {host} has published {MAX_NAMES_PER_HOST} names already")

    def publish(self, name: str, endpoint: Any, host: int) -> None:
        """Announce that `host` offers `name`; it may do so again, to change the endpoint.

        Raises:
            ServiceExists, BadName: as `check`.
        """
        self.check(name, host)
        self._services[name] = Service(name, endpoint, host)
        self._of_host.setdefault(host, set()).add(name)

    def check_owner(self, name: str, host: int) -> None:
        """Check that `host` has published `name`, or raise ServiceNotFound."""
        known = self._services.get(name)
        if known is None or known.host != host:
            raise ServiceNotFound(f"host {host} has not published a service {name!r}")

    def withdraw(self, name: str, host: int) -> None:
        """Take a name of `host` back.

        Raises:
            ServiceNotFound: the host has not published it.
        """
        self.check_owner(name, host)
        del self._services[name]
        self._of_host[host].discard(name)

    def lookup(self, name: str) -> Service:
        """Return the service of that name.

        Raises:
            ServiceNotFound: nobody has published it.
        """
        try:
            return self._services[name]
        except KeyError:
            raise ServiceNotFound(f"no service {name!r} is published") from None

    def with_prefix(self, prefix: str = "") -> list[Service]:
        """Return the services whose names begin with `prefix`, by name."""
        return [service for service in self if service.name.startswith(prefix)]

    def forget_host(self, host: int) -> list[str]:
        """Remove every name of a host that left or died. Returns them."""
        gone = sorted(self._of_host.pop(host, ()))
        for name in gone:
            del self._services[name]
        return gone

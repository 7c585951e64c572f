"""The name service, kept in the device: what is published outlives the coordinator.

The service table is the truth, `Names` what answers quickly. The table is written first: a crash in between loses the
answer, not the name, and who asks again is told that it has the name already. A name that is published anew by its
host gets a new entry, and the old one is freed then; of two that a crash left, the one with the higher serial
number counts.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from dmrpc_cxl._native import Device, crash_point

from .names import Names, Service

log = logging.getLogger(__name__)


class Directory:
    """All published names, in the device and in memory."""

    def __init__(self, device: Device, names: Names) -> None:
        """Begin with what an earlier coordinator left; entries of hosts that are gone are for `restore`."""
        self._device = device
        self._names = names
        self._entries: dict[str, tuple[int, int]] = {}  # name -> slot, serial

    def restore(self, incarnations: dict[int, int]) -> None:
        """Take over the table: names of these live hosts, each with its incarnation, stay; all others go."""
        for entry in self._device.services():  # by serial number: later ones replace earlier ones
            name = entry["name"].decode(errors="replace")
            place = entry["slot"], entry["serial"]
            known = self._names.get(name)
            usable = (
                not entry["damaged"]
                and incarnations.get(entry["host"]) == entry["incarnation"]
                and (known is None or known.host == entry["host"])
            )
            if entry["damaged"]:
                log.error("entry %d of the service table makes no sense; removed", entry["slot"])
            if not usable:
                self._device.withdraw(*place)
                continue
            if name in self._entries:
                self._device.withdraw(*self._entries[name])
            self._names.publish(name, json.loads(entry["endpoint"]), entry["host"])
            self._entries[name] = place

    def forget_strays(self) -> None:
        """Remove what stands in the table and is not known here: written by a predecessor that went on after a pause."""
        known = set(self._entries.values())
        for entry in self._device.services():
            if (entry["slot"], entry["serial"]) not in known:
                self._device.withdraw(entry["slot"], entry["serial"])

    def publish(self, name: str, endpoint: Any, host: int, incarnation: int) -> None:
        """Announce that `host` offers `name`.

        Raises:
            ServiceExists, BadName: as Names.publish.
            ServiceTableFull: the device has no room for it.
        """
        self._names.check(name, host)
        known = self._names.get(name)
        if known is not None and known.endpoint == endpoint:
            return  # asked again, since the answer was lost
        text = json.dumps(endpoint, separators=(",", ":")).encode()
        place = self._device.publish(host, incarnation, name.encode(), text)
        self._names.publish(name, endpoint, host)
        if name in self._entries:
            self._device.withdraw(*self._entries[name])
        self._entries[name] = place
        crash_point("published")

    def withdraw(self, name: str, host: int) -> None:
        """Take a name of `host` back.

        Raises:
            ServiceNotFound: the host has not published it.
        """
        self._names.check_owner(name, host)
        self._device.withdraw(*self._entries[name])
        del self._entries[name]
        self._names.withdraw(name, host)
        crash_point("withdrawn")

    def forget_host(self, host: int) -> None:
        """Remove every name of a host that left or died."""
        for name in self._names.forget_host(host):
            self._device.withdraw(*self._entries.pop(name))

    # ---------------------------------------------------------------- asking

    def __contains__(self, name: str) -> bool:
        """Tell whether somebody has published `name`."""
        return name in self._names

    def lookup(self, name: str) -> Service:
        """Return the service of that name, or raise ServiceNotFound."""
        return self._names.lookup(name)

    def with_prefix(self, prefix: str = "") -> list[Service]:
        """Return the services whose names begin with `prefix`, by name."""
        return self._names.with_prefix(prefix)

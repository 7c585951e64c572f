"""Where the launcher has put a program: the environment variables between the two, and joining the fabric.

==================  ==================================================
DMRPC_FABRIC        name of the fabric, for ``dmrpc_cxl.attach``
DMRPC_HOST_NAME     name of this host
DMRPC_HOST_INDEX    its place among the hosts, from 0
DMRPC_NR_HOSTS      number of hosts
DMRPC_TRANSPORT     how to reach the coordinator: unix or tcp
DMRPC_RUNTIME_DIR   folder for sockets, removed when the run is over
DMRPC_LOG_LEVEL     debug, info, warning or error
DMRPC_MEMORY        addresses of memory servers, with commas between,
                    for ``dmrpc_net.attach``; may be empty
DMRPC_MEMORY_SECRET file with their secret; may be empty
DMRPC_MEMORY_PIDS   their process ids, with commas between; may be empty
DMRPC_LATENCY       of the device that hosts emulate, such as 265ns; empty: none
==================  ==================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.errors import MisuseError

_PREFIX = "DMRPC_"


@dataclass(frozen=True)
class Place:
    """One host's place in a fabric; each field is an environment variable."""

    fabric: str
    host_name: str
    host_index: int
    nr_hosts: int
    transport: str
    runtime_dir: str
    log_level: str
    memory: str = ""
    memory_secret: str = ""
    latency: str = ""
    memory_pids: str = ""

    def as_environment(self) -> dict[str, str]:
        """Return the environment variables that say this."""
        return {
            _PREFIX + field.name.upper(): str(getattr(self, field.name)) for field in fields(self)
        }

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> Place:
        """Read the environment variables.

        Raises:
            MisuseError: this program was not started by the launcher.
        """
        try:
            text = {
                field.name: environ[_PREFIX + field.name.upper()]
                for field in fields(cls)
                if field.default is MISSING or _PREFIX + field.name.upper() in environ
            }
        except KeyError as error:
            raise MisuseError(
                f"{error.args[0]} is not set: start this program with `dmrpc fabric run --program ...`"
            ) from None
        index, number = int(text.pop("host_index")), int(text.pop("nr_hosts"))
        return cls(host_index=index, nr_hosts=number, **text)


def attach(**options: Any) -> dmrpc_cxl.Host:
    """Join the fabric that the launcher has started this program on.

    Args:
        options: for ``dmrpc_cxl.attach``; they win over what the launcher says.

    Raises:
        MisuseError: this program was not started by the launcher.
        DmError: as ``dmrpc_cxl.attach``.
    """
    place = Place.of_environment()
    host: dmrpc_cxl.Host = dmrpc_cxl.attach(
        place.fabric,
        **{
            "name": place.host_name,
            "transport": place.transport,
            "latency": place.latency or None,
            **options,
        },
    )
    if place.latency and host.latency is not None:
        print(f"latency {host.latency}", flush=True)  # the model says how wrong it is
    return host

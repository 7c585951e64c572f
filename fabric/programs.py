"""What the launcher is told to run, and how that becomes hosts. Pure.

A program is written as one line of text, in one of three forms, with a name before it or without::

    worker.py --fast            a Python file and its arguments
    photos.worker:main --fast   a function, called with an attached Host (see call.py), and its arguments
    ./worker --fast | tee log   anything else: a command for /bin/sh
    left=worker.py              the same, as the host "left"

Names begin with a small letter and have no capitals, so that `PATH=/opt/bin worker` stays a command.
The first two forms are run without a shell: quotes work, redirections do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.errors import MisuseError

from .topology import HostSpec, Program

DEMO = "examples.image_pipeline.hosts"
DEMO_HOSTS = 7
MIN_DEMO_HOSTS = 6
DEMO_NEEDS = ("PIL", "jinja2", "matplotlib", "skimage")
RESERVED = ("coordinator", "fabric")  # what the lines of others are prefixed with

_NAMED = re.compile(r"([a-z][a-z0-9._-]*)=(.*)", re.DOTALL)
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def parse_program(text: str) -> tuple[str, Program]:
    """Split a program's text into the host's name, empty if it has none, and what to run.

    Raises:
        MisuseError: nothing to run, a quote that does not end, or a name that cannot be.
    """
    match = _NAMED.fullmatch(text.strip())
    name, command = match.groups() if match else ("", text.strip())
    if name:
        _check_host_name(name)
    if not command.strip():
        raise MisuseError(f"program {text!r}: there is nothing to run")
    first = command.split(maxsplit=1)[0]
    if not first.endswith(".py") and not _FUNCTION.fullmatch(first):
        return name, Program(("/bin/sh", "-c", command))
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MisuseError(f"program {text!r}: {error}") from None
    if first.endswith(".py"):
        return name, Program((sys.executable, *words))
    return name, _function(*words)


def _function(*words: str) -> Program:
    return Program((sys.executable, "-m", "dmrpc_cxl.fabric.call", *words))


def _check_host_name(name: str) -> None:
    if name in RESERVED:
        raise MisuseError(f"host name {name!r}: the launcher uses it, choose another one")
    if len(name) >= LAYOUT["NAME_BYTES"]:
        raise MisuseError(
            f"host name {name!r} has {len(name)} bytes, at most {LAYOUT['NAME_BYTES'] - 1} fit"
        )


def hosts_of(programs: Sequence[str], nr_hosts: int | None) -> tuple[HostSpec, ...]:
    """Make hosts of programs: each program is a host, and a single one as many as are asked for.

    A program without a name is called host-1, host-2, ..., by its place; copies of a program with a name
    NAME-1, NAME-2, ...

    Raises:
        MisuseError: several programs and another number of hosts, or as parse_program.
    """
    parsed = [parse_program(text) for text in programs]
    if nr_hosts is not None and nr_hosts < 1:
        raise MisuseError(f"{nr_hosts} hosts: at least one is needed")
    if len(parsed) == 1:
        name, program = parsed[0]
        if nr_hosts is None:
            return (HostSpec(name or "host-1", (program,)),)
        return tuple(
            HostSpec(f"{name or 'host'}-{number}", (program,)) for number in range(1, nr_hosts + 1)
        )
    if nr_hosts not in (None, len(parsed)):
        raise MisuseError(
            f"{len(parsed)} programs for {nr_hosts} hosts: give one program for all hosts, or one for each"
        )
    return tuple(
        HostSpec(name or f"host-{place}", (program,))
        for place, (name, program) in enumerate(parsed, 1)
    )


def demo_hosts(checkout: Path, nr_hosts: int | None, args: Sequence[str]) -> tuple[HostSpec, ...]:
    """Make the hosts of examples/image_pipeline: that of the client gets args.

    Raises:
        MisuseError: too few hosts, or there are no examples in that folder.
    """
    nr_hosts = DEMO_HOSTS if nr_hosts is None else nr_hosts
    if nr_hosts < MIN_DEMO_HOSTS:
        raise MisuseError(
            f"{nr_hosts} hosts: the demonstration has a client, a firewall, a load balancer, two workers and at least "
            "one image processor"
        )
    if not (checkout / "examples" / "image_pipeline" / "hosts.py").exists():
        raise MisuseError("the demonstration is part of the checkout only: give --program")
    if missing := [name for name in DEMO_NEEDS if importlib.util.find_spec(name) is None]:
        raise MisuseError(
            f"the demonstration needs {', '.join(missing)}: pip install jinja2 matplotlib pillow scikit-image"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    made: tuple[HostSpec, ...] = importlib.import_module(DEMO).hosts(
        args, nr_hosts - MIN_DEMO_HOSTS + 1
    )
    return made

"""Run a function as a host: ``python -m dmrpc_cxl.fabric.call MODULE:FUNCTION [ARGUMENT...]``.

The function gets an attached Host and finds the arguments in sys.argv[1:]; what it returns is the exit
status, as for sys.exit. When it returns, the host leaves in order. When it raises, the process just
ends: the coordinator takes back what it held.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, cast

from dmrpc_cxl import Host

from .place import attach


def find(module: str, name: str) -> Callable[[Host], Any]:
    """Import a function, or exit and say that there is none; what fails inside the module is raised."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        sys.exit(f"{sys.argv[0]}: no module {error.name} in {os.getcwd()} or on the Python path")
    if not callable(found):
        sys.exit(f"{sys.argv[0]}: {module} has no function {name}")
    return cast("Callable[[Host], Any]", found)


def main() -> None:
    """Import the function, attach, call it, detach, exit."""
    if len(sys.argv) < 2 or ":" not in sys.argv[1]:
        sys.exit("usage: python -m dmrpc_cxl.fabric.call MODULE:FUNCTION [ARGUMENT...]")
    sys.argv = sys.argv[1:]
    module, _, name = sys.argv[0].partition(":")
    function = find(module, name)
    host = attach()
    status = function(host)
    gc.collect()  # views in reference cycles would keep the host from leaving
    host.detach()
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # asked to stop: a traceback says nothing
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

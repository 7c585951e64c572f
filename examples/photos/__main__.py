"""Run it: a fabric with a client, a load balancer and two workers. ``python -m examples.photos [OPTION...]``.

Options are the client's; more hosts, other workers: docs/running.md.
"""

import shlex
import sys

from dmrpc_cxl.fabric.commands import fabric

WORKERS = ("worker-1", "worker-2")

if __name__ == "__main__":
    programs = [
        f"client=examples.photos.client:main {shlex.join(sys.argv[1:])}",
        f"balancer=examples.photos.balancer:main {' '.join(WORKERS)}",
        *(f"{name}=examples.photos.worker:main" for name in WORKERS),
    ]
    options = [word for program in programs for word in ("--program", program)]
    fabric(["run", *options], prog_name="python -m examples.photos")

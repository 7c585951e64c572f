"""Run it: a fabric with a host for each service. ``python -m examples.social_network [LAUNCHER OPTION...] [-- OPTION...]``."""

import sys

from dmrpc_cxl.fabric.commands import fabric

from .hosts import programs

if __name__ == "__main__":
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    given = [word for program in programs(words[at + 1 :]) for word in ("--program", program)]
    fabric(["run", *words[:at], *given], prog_name="python -m examples.social_network")

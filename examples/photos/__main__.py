"""Run it: a fabric with four hosts. ``python -m examples.photos [-- OPTION...]``; --help lists more."""

import sys

from dmrpc_cxl.fabric.commands import fabric

if __name__ == "__main__":
    fabric(["run", *sys.argv[1:]], prog_name="python -m examples.photos")

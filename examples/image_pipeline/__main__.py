"""Run it: a fabric with seven hosts. ``python -m examples.image_pipeline [-- OPTION...]``; --help lists more."""

import sys

from dmrpc_cxl.fabric.commands import fabric

if __name__ == "__main__":
    fabric(["run", *sys.argv[1:]], prog_name="python -m examples.image_pipeline")

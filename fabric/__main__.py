"""Run ``dmrpc fabric`` as ``python -m dmrpc_cxl.fabric``."""

from .commands import fabric

if __name__ == "__main__":
    fabric(prog_name="python -m dmrpc_cxl.fabric")

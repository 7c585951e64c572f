"""The fabric: the G-FAM device file, what runs on it, and the tools to look at both.

Map of the package:

    device.py      create, open, verify, inspect, remove the file /dev/shm/NAME
    liveness.py    who lives in a fabric: processes told apart from their successors
    topology.py    what a launcher starts, and where the sockets are
    commands.py    ``dmrpc fabric ...``
    __main__.py    the same as ``python -m dmrpc_cxl.fabric``
"""

"""The fabric: the G-FAM device file, what runs on it, and the tools to look at both.

Map of the package:

    device.py      create, open, verify, inspect, remove the file /dev/shm/NAME
    services.py    the names that are published, as the device has them
    liveness.py    who lives in a fabric: processes told apart from their successors
    topology.py    what a launcher starts, and where the sockets are
    launcher.py    running a topology: device, coordinator, hosts, and the end of them all
    programs.py    what a host is to run, from the command line
    children.py    processes that do not outlive the launcher
    output.py      their lines on one output
    interrupts.py  signals to the launcher
    leftovers.py   what a launcher that was killed has left
    fsck.py        accounting for every frame, live or dead, and repairing
    check.py       ``dmrpc fsck``
    place.py       for programs: where the launcher has put them, and joining the fabric
    call.py        for programs: a function as a host
    run.py         ``dmrpc fabric run``
    commands.py    ``dmrpc fabric ...``
    __main__.py    the same as ``python -m dmrpc_cxl.fabric``
"""

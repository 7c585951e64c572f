# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""The only boundary between Python and C.

_errors.pxi  statuses become exceptions
_device.pxi  the device file, for the coordinator and the tools
_crash.pxi   where a process can be made to kill itself
_host.pxi    the DM layer of this process: Host, Buffer, Ref
_ring.pxi    frames through shared memory to another process: Ring, WaitSet
_frames.pxi  headers of RPC frames
_relay.pxi   frames passed on between connections: Relay
"""

include "_errors.pxi"
include "_device.pxi"
include "_crash.pxi"
include "_host.pxi"
include "_ring.pxi"
include "_frames.pxi"
include "_relay.pxi"

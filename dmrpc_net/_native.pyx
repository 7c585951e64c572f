# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""The boundary between Python and the C of memory servers and their clients.

_wire.pxi    what csrc/net_wire.h says, for Python; statuses become exceptions
_link.pxi    the client's side: Link, Call, Ref, and the operations
_pager.pxi   arrays whose bytes are fetched when somebody looks
_server.pxi  the server: its threads, and one shard without sockets
"""

include "_wire.pxi"
include "_link.pxi"
include "_pager.pxi"
include "_server.pxi"

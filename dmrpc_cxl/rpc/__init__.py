"""Remote procedure calls that pass large data by reference.

==================  ====================================================================================
``frames``          the wire protocol, without I/O
``marshal``         values to messages: by value or by Ref
``ownership``       who else holds an array: move(), pass_on()
``interface``       a service's methods, read off its class
``calls``           the call being served: deadline, cancellation, metadata
``channel``         one interface over rings in shared memory and TCP
``endpoint``        finding, connecting, shaking hands
``server``          serving
``client``, ``aio`` calling, from threads and from asyncio
``sync``            connections that threads share, futures
``link``            a service's methods, and reconnecting
``connection``      what all clients share; ``remote_errors``: exceptions that arrive
``forwarder``       a load balancer, or a gate, that passes calls on as they are; ``passing``: what it sees of one
``places``          where large data goes: the pool, or memory servers
``attaching``       joining a fabric; ``host``: all of it on the host
``objects``         any picklable object in DM
==================  ====================================================================================
"""

from .attaching import attach
from .calls import Call, current_call
from .client import Client, Outbound
from .forwarder import Forwarder
from .host import Host
from .marshal import Moved, move, pass_on
from .ownership import AnyRef
from .passing import Passing
from .server import Server
from .sync import CallFuture, first_done

__all__ = [
    "AnyRef",
    "Call",
    "CallFuture",
    "Client",
    "Forwarder",
    "Host",
    "Moved",
    "Outbound",
    "Passing",
    "Server",
    "attach",
    "current_call",
    "first_done",
    "move",
    "pass_on",
]

"""DmRPC over a pooled (CXL) memory device: what users import.

A map of the package:

==================  ====================================================================================
``host``            attach, Host: the paper's Table II and arrays that live in DM
``errors``          every exception, in one tree
``fabric``          making, checking and removing devices; launching a fabric
``coordinator``     the service that hands out page ownership in batches
``cli``             the ``dmrpc`` command
``_native``         the DM layer itself, in C (csrc/)
==================  ====================================================================================
"""

from .errors import DmError
from .host import Buffer, Host, Ref, attach

__all__ = ["Buffer", "DmError", "Host", "Ref", "__version__", "attach"]
__version__ = "0.1.0"

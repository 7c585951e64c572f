"""Imported by the nursery before it forks: see processes.py."""

import dmrpc_cxl
import dmrpc_cxl.rpc  # noqa: F401
import tests.crash.call_acts
import tests.crash.home_acts
import tests.crash.host_acts
import tests.crash.keeper
import tests.crash.processes  # noqa: F401

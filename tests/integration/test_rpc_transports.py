"""Rings within a network namespace, TCP between two; either can be forced."""

import subprocess
import sys
import textwrap

import pytest

from dmrpc_cxl.errors import PeerLost
from tests.rpc_services import Desk, Rpc

_CLIENT = textwrap.dedent(
    """
    import faulthandler, sys
    import dmrpc_cxl
    from dmrpc_cxl.errors import PeerLost
    faulthandler.dump_traceback_later(60, exit=True)
    fabric, address = sys.argv[1:]
    with dmrpc_cxl.attach(fabric) as host:
        try:
            host.connect("desk", transport="ring")
            print("rings")
        except PeerLost as error:
            print("no rings:", error)
        try:
            with host.connect("desk") as desk:
                print(desk, desk.echo("hello"))
        except PeerLost as error:
            print("not at all:", error)
    """
)


def test_auto_takes_rings_where_they_reach_and_either_can_be_forced(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk")
    for wanted, kind in (("auto", "ring"), ("ring", "ring"), ("tcp", "tcp")):
        desk = rpc.connect("desk", transport=wanted)
        assert desk.echo(1) == 1
        assert repr(desk) == f"<Client of 'desk', {kind}>"
    with pytest.raises(ValueError, match="transport"):
        rpc.connect("desk", transport="pigeon")


def test_a_forced_transport_that_is_not_there_is_named(rpc: Rpc) -> None:
    endpoint = rpc.serve(0, Desk, "desk", tcp=None)
    assert endpoint["tcp"] is None
    assert rpc.connect("desk").echo(1) == 1
    with pytest.raises(PeerLost, match="'desk' offers no TCP"):
        rpc.connect("desk", transport="tcp")
    rpc.host.publish("tcp only", {**rpc.serve(1, Desk, "two"), "ring": None})
    with pytest.raises(PeerLost, match="'tcp only' offers no rings"):
        rpc.connect("tcp only", transport="ring")
    rpc.host.withdraw("tcp only")


def _in_new_namespace(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run in a network namespace of its own, joined to this one by nothing, loopback up."""
    inside = "ip link set lo up && exec " + " ".join(f"'{word}'" for word in command)
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", inside],
        capture_output=True,
        check=False,
        text=True,
        timeout=90,
    )


def test_from_another_network_namespace_rings_do_not_reach(rpc: Rpc) -> None:
    tried = _in_new_namespace(["true"])
    if tried.returncode:
        pytest.skip(f"no network namespace here: {tried.stderr.strip()}")
    rpc.serve(0, Desk, "desk")
    done = _in_new_namespace([sys.executable, "-c", _CLIENT, rpc.fabric.name, ""])
    assert "no rings: 'desk' cannot be reached over rings" in done.stdout, done
    # The server listens on the loopback of this namespace: over there, nobody does.
    assert "not at all: 'desk' cannot be reached at" in done.stdout, done

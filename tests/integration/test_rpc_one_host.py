"""A service and its client in one process, and of one host: Refs that pass between them have one owner as well."""

from __future__ import annotations

import threading

import dmrpc_cxl
from dmrpc_cxl.rpc import Forwarder
from tests.fabrics import At, Fabric

NBYTES = 5000


class Shelf:
    def __init__(self, host: dmrpc_cxl.Host) -> None:
        self._host = host
        self.kept: list[dmrpc_cxl.Ref] = []
        self._seen = threading.Event()

    def give(self, value: int) -> dmrpc_cxl.Ref:
        buffer = self._host.ralloc(NBYTES)
        memoryview(buffer)[:] = bytes([value]) * NBYTES
        return self._host.create_ref(buffer, move=True)

    def keep(self, ref: dmrpc_cxl.Ref) -> int:
        self.kept.append(ref)
        return ref.nbytes

    def echo(self, ref: dmrpc_cxl.Ref) -> dmrpc_cxl.Ref:
        return ref


def filled(host: dmrpc_cxl.Host, value: int) -> dmrpc_cxl.Ref:
    return Shelf(host).give(value)


def shows(host: dmrpc_cxl.Host, ref: dmrpc_cxl.Ref, value: int) -> None:
    """Use a Ref up; it must show that value everywhere."""
    with host.map_ref(ref) as buffer:
        assert bytes(buffer) == bytes([value]) * NBYTES


def pass_on_within_one_host(at: At, through_a_forwarder: bool, transport: str) -> None:
    host = at.host
    shelf = Shelf(host)
    server = host.serve(shelf, name="shelf")
    ends = [server]
    name = "shelf"
    if through_a_forwarder:
        name = "both"
        ends.insert(0, Forwarder(host, name, ["shelf"]))
    client = host.connect(name, transport=transport)
    given, echoed = client.give(1), client.echo(filled(host, 2))
    kept = filled(host, 3)
    assert client.keep(kept) == NBYTES
    client.close()
    for end in ends:
        end.stop()  # whatever was not accepted is dropped now
    assert not kept.drop()  # it is the service's
    for value, ref in enumerate((given, echoed, shelf.kept.pop()), 1):
        shows(host, ref, value)


def test_refs_between_a_service_and_a_client_of_one_host_outlive_their_calls(
    fabric: Fabric,
) -> None:
    host = fabric.host()
    for through_a_forwarder in (False, True):
        for transport in ("ring", "tcp"):
            host.call(pass_on_within_one_host, through_a_forwarder, transport)

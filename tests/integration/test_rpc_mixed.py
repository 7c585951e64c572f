"""One programming model: the same service on hosts with the pool, without it and with both; what is chosen, what comes out."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import CannotSend, MisuseError, RemoteError
from dmrpc_cxl.rpc import Forwarder, move, pass_on
from tests.fabrics import At, HostProcess
from tests.net_fabrics import NetFabric, net_running
from tests.rpc_peers import LARGE, THRESHOLD, Parcel
from tests.standing import forget, until

KINDS = ["pool", "mixed", "net"]
SHARED = {"pool": {"pool"}, "mixed": {"pool", "net"}, "net": {"net"}}


class Work:
    """Does with arrays what services do."""

    def __init__(self, at: At) -> None:
        self._at = at

    def total(self, values: np.ndarray) -> float:
        return float(values.sum())

    def change(self, values: np.ndarray, where: int) -> np.ndarray:
        values[where] = 1
        return values

    def fresh(self, n: int) -> np.ndarray:
        made = self._at.host.empty(n, "u1")
        made[:] = 7
        return made

    def mixed(self, value: Any) -> Any:
        return {"back": value, "more": [np.arange(LARGE, dtype="u1"), b"x" * LARGE, "text", 3]}

    def pass_on(self, values: np.ndarray) -> Any:
        return self._at.next.total(pass_on(values))

    def size(self, ref: dmrpc_cxl.Ref) -> int:
        return ref.nbytes


@pytest.fixture(scope="module")
def both() -> Iterator[NetFabric]:
    with net_running(count=2) as both:
        yield both


@pytest.fixture(scope="module")
def hosts(both: NetFabric) -> dict[str, list[HostProcess]]:
    """Two of each kind."""
    return {kind: [getattr(both, kind)(), getattr(both, kind)()] for kind in KINDS}


@pytest.fixture(autouse=True)
def nothing_left(both: NetFabric, hosts: dict[str, list[HostProcess]]) -> Iterator[None]:
    yield
    for host in itertools.chain.from_iterable(hosts.values()):
        host.call(let_go)
    both.nothing_in_use()


def let_go(at: At) -> None:
    for name in ("front", "server", "next", "work"):
        end = at.__dict__.pop(name, None)
        if end is not None:
            getattr(end, "stop", getattr(end, "close", None))()
    forget(at)


def serve(at: At, name: str = "work") -> None:
    at.server = at.host.serve(Work(at), name=name, threshold=THRESHOLD)


def connect(at: At, name: str = "work", **options: Any) -> None:
    at.work = at.host.connect(name, Work, threshold=THRESHOLD, **options)


def everything(at: At, transfer: str) -> list[Any]:
    """Call all methods; return what came, for comparison."""
    work = at.work.using(transfer=transfer)
    array = at.host.array(np.arange(LARGE, dtype="u1"))
    changed = work.change(array, 5)
    got = work.mixed(array)
    moved = at.host.array(array)
    parcel = work.mixed(Parcel(array))
    return [
        work.total(array),
        changed.tobytes(),
        array.tobytes(),
        [got["back"].tobytes(), got["more"][0].tobytes(), *got["more"][1:]],
        work.fresh(LARGE).tobytes(),
        work.change(move(moved), 9).tobytes(),
        parcel["back"]["item"].tobytes(),
        work.total(np.arange(10)),
        work.total(array[::2]),
    ]


@pytest.mark.parametrize("client", KINDS)
@pytest.mark.parametrize("server", KINDS)
def test_results_are_the_same_whatever_memory_the_ends_have(
    hosts: dict[str, list[HostProcess]], server: str, client: str
) -> None:
    hosts[server][0].call(serve)
    hosts[client][1].call(connect)
    assert hosts[client][1].call(everything, "auto") == hosts[client][1].call(everything, "value")


def traffic(at: At, transfer: str = "auto") -> int:
    """Bytes in messages for two calls with a large array."""
    array = at.host.array(np.ones(LARGE, "u1"))
    before = sum(at.work.traffic)
    work = at.work.using(transfer=transfer)
    assert work.total(array) == LARGE
    assert work.fresh(LARGE).sum() == 7 * LARGE
    return int(sum(at.work.traffic) - before)


@pytest.mark.parametrize("client", KINDS)
@pytest.mark.parametrize("server", KINDS)
def test_large_data_leaves_the_message_when_there_is_memory_that_both_reach(
    both: NetFabric, hosts: dict[str, list[HostProcess]], server: str, client: str
) -> None:
    hosts[server][0].call(serve)
    hosts[client][1].call(connect)
    before = stored(both)
    nbytes = hosts[client][1].call(traffic)
    common = SHARED[server] & SHARED[client]
    assert (nbytes < LARGE) == bool(common)
    # The pool is preferred: a load costs less than a round trip.
    assert (stored(both) > before) == (common == {"net"})


def stored(both: NetFabric) -> int:
    both.audit()
    assert both._auditor is not None
    return int(both._auditor.stats()["bytes_written"])


def insist(at: At) -> None:
    with pytest.raises((CannotSend, RemoteError)):
        at.work.using(transfer="ref").total(np.ones(LARGE))
    with pytest.raises((CannotSend, RemoteError)):
        at.work.using(transfer="ref").fresh(LARGE)


def test_insisting_on_refs_that_the_other_end_cannot_follow_is_refused(
    hosts: dict[str, list[HostProcess]],
) -> None:
    hosts["net"][0].call(serve)
    hosts["pool"][1].call(connect)
    hosts["pool"][1].call(insist)


def send_a_ref(at: At) -> int:
    return int(at.work.size(at.host.create_ref(at.host.zeros(LARGE, "u1"))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_takes_a_ref_takes_one_of_either_memory(
    hosts: dict[str, list[HostProcess]], kind: str
) -> None:
    hosts[kind][0].call(serve)
    hosts[kind][1].call(connect)
    assert hosts[kind][1].call(send_a_ref) == LARGE


def test_a_ref_to_the_pool_is_not_sent_to_who_has_none(hosts: dict[str, list[HostProcess]]) -> None:
    hosts["net"][0].call(serve)
    hosts["mixed"][1].call(connect)
    with pytest.raises(CannotSend):
        hosts["mixed"][1].call(send_a_ref)


# ---------------------------------------------------------------- in between


def forward(at: At, *backends: str) -> None:
    at.front = Forwarder(at.host, "front", backends, policy="round-robin")


@pytest.mark.parametrize("middle", KINDS)
def test_a_forwarder_changes_nothing_whatever_memory_it_has(
    both: NetFabric, hosts: dict[str, list[HostProcess]], middle: str
) -> None:
    hosts["mixed"][0].call(serve)
    hosts[middle][1 if middle == "mixed" else 0].call(forward, "work")
    hosts["net"][1].call(connect, "front")
    before = stored(both)
    assert hosts["net"][1].call(traffic) < LARGE
    assert stored(both) > before


def test_a_forwarder_offers_what_all_of_its_backends_reach(
    both: NetFabric, hosts: dict[str, list[HostProcess]]
) -> None:
    hosts["mixed"][0].call(serve, "one")
    hosts["net"][0].call(serve, "two")
    hosts["pool"][0].call(forward, "one", "two")
    hosts["mixed"][1].call(connect, "front")
    before = stored(both)
    for _ in range(2):
        assert hosts["mixed"][1].call(traffic) < LARGE
    assert stored(both) > before


def connect_next(at: At) -> None:
    at.next = at.host.connect("second", Work, threshold=THRESHOLD)


def send_through(at: At) -> float:
    return float(at.work.pass_on(at.host.array(np.ones(LARGE, "u1"))))


@pytest.mark.parametrize("last", KINDS)
@pytest.mark.parametrize("first", ["net", "mixed"])
def test_what_is_passed_on_reaches_services_with_other_memory(
    hosts: dict[str, list[HostProcess]], first: str, last: str
) -> None:
    hosts[last][0].call(serve, "second")
    middle = hosts["mixed"][1]
    middle.call(serve)
    middle.call(connect_next)
    client = hosts[first][0] if last != first else hosts["net"][1]
    client.call(connect)
    assert client.call(send_through) == LARGE


def test_passing_on_what_nobody_looked_at_moves_no_bytes(
    both: NetFabric, hosts: dict[str, list[HostProcess]]
) -> None:
    extra = both.net()
    hosts["net"][0].call(serve, "second")
    extra.call(serve)
    extra.call(connect_next)
    hosts["net"][1].call(connect)
    before = stored(both), extra.call(fetched)
    assert hosts["net"][1].call(send_through) == LARGE
    assert (stored(both) - before[0], extra.call(fetched) - before[1]) == (LARGE, 0)
    extra.call(let_go)
    extra.leave()


def fetched(at: At) -> int:
    return int(at.host.stats()["bytes_fetched"])


# ---------------------------------------------------------------- a host without the pool


def names(at: At) -> list[str]:
    return sorted(service["name"] for service in at.host.services())


def test_names_of_a_host_without_the_pool_outlive_the_coordinator_and_end_with_the_host() -> None:
    with net_running() as both:
        one, other = both.net(), both.pool()
        one.call(serve)
        both.fabric.coordinator.kill()
        both.fabric.coordinator.wait()
        both.fabric.start_coordinator()
        assert other.call(names) == ["work"]
        assert one.call(names) == ["work"]  # over a new connection
        one.kill()
        until(lambda: not other.call(names))


def put_and_get(at: At, wire: bytes | None) -> Any:
    if wire is None:
        return at.host.put({"a": np.arange(LARGE), "b": [1, "two"]}).to_bytes()
    got = at.host.get(wire)
    return int(got["a"].sum()), got["b"]


def test_objects_are_put_and_got_without_the_pool(hosts: dict[str, list[HostProcess]]) -> None:
    wire = hosts["net"][0].call(put_and_get, None)
    assert hosts["net"][1].call(put_and_get, wire) == (sum(range(LARGE)), [1, "two"])


def test_the_memory_is_chosen_by_a_word(both: NetFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisuseError):
        dmrpc_cxl.attach(both.fabric.name, dm="tape")  # type: ignore[call-overload]
    monkeypatch.setenv("DMRPC_DM", "net")
    monkeypatch.setenv("DMRPC_MEMORY", ",".join(both.servers.addresses))
    monkeypatch.setenv("DMRPC_MEMORY_SECRET", str(both.servers.secret))
    with dmrpc_cxl.attach(both.fabric.name) as host:
        assert type(host).__name__ == "NetHost"

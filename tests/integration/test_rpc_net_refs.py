"""However a call of hosts without the pool ends, every page comes back to the memory servers.

The same as test_rpc_refs.py for Refs of the other kind; what hosts do is taken from there.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import PeerLost, RemoteError, WrongArguments
from tests.fabrics import At, HostProcess
from tests.integration.test_rpc_refs import (
    all_lost,
    begin,
    call_into_a_stop,
    cancel,
    close_client,
    connect_front,
    end,
    expect,
    forget_futures,
    forward,
    ignore,
    outcomes,
    refs_in_fields,
    start_to_stop,
    stop_forwarder,
    stopped,
    time_out,
    unsendable,
)
from tests.net_fabrics import NetFabric, StandingNetFabric, net_running
from tests.rpc_peers import (
    LARGE,
    connect,
    connections_reach,
    count_reaches,
    entered,
    go,
    idle,
    serve,
)

WAYS = ["ref", "move"]
Pair = tuple[NetFabric, HostProcess, HostProcess]


@pytest.fixture(scope="module")
def standing() -> Iterator[StandingNetFabric]:
    standing = StandingNetFabric({}, {})
    yield standing
    standing.close()


@pytest.fixture
def pair(standing: StandingNetFabric) -> Iterator[Pair]:
    """Servers, a host that serves a Depot, and one with a client of it, over TCP; every page is free afterwards."""
    with standing.use() as (both, (service, client)):
        service.call(serve, threads=2, queue=1)
        client.call(connect, transport="tcp")
        yield both, service, client
        service.call(go)
        client.call(end)
        service.call(end)


@pytest.fixture
def doomed() -> Iterator[Pair]:
    """The same, with hosts that may die."""
    with net_running() as both:
        service, client = both.net(), both.net()
        service.call(serve, threads=2)
        client.call(connect, transport="tcp")
        yield both, service, client


# ---------------------------------------------------------------- calls that end as they should, and that fail


def round_trip(at: At, way: str) -> None:
    array = at.host.array(np.arange(LARGE, dtype="u1"))
    got = at.depot.using(transfer=way).echo(array)
    assert (got == array).all()
    got[0] = 99
    assert array[0] == 0


@pytest.mark.parametrize("way", ["value", "ref", "copy", "auto"])
def test_an_array_comes_back_as_it_was_whichever_way_it_goes(pair: Pair, way: str) -> None:
    both, _, client = pair
    client.call(round_trip, way)
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["fail", "fail_late"])
def test_a_call_whose_method_raises_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    both, _, client = pair
    client.call(expect, way, method, RemoteError)
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
def test_a_call_whose_arguments_do_not_fit_gives_its_refs_back(pair: Pair, way: str) -> None:
    both, _, client = pair
    client.call(expect, way, "first", WrongArguments)
    both.nothing_in_use()
    client.call(expect, way, "take", WrongArguments)
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
def test_an_argument_that_nobody_looks_at_comes_back_and_is_not_fetched(
    pair: Pair, way: str
) -> None:
    both, service, client = pair
    before = service.call(fetched)
    client.call(ignore, way)
    both.nothing_in_use()
    assert service.call(fetched) == before


def fetched(at: At) -> int:
    return int(at.host.stats()["bytes_fetched"])


@pytest.mark.parametrize("way", WAYS)
def test_a_result_that_cannot_be_sent_gives_its_refs_back(pair: Pair, way: str) -> None:
    both, _, client = pair
    client.call(unsendable, way)
    both.nothing_in_use()


# ---------------------------------------------------------------- time-outs, cancelling, refusals


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["wait", "wait_whatever"])
def test_a_call_that_times_out_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    both, service, client = pair
    client.call(time_out, way, method)
    service.call(go)  # the reply finds nobody
    service.call(idle)
    client.call(ignore, way)  # reads it
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["wait", "wait_whatever"])
def test_a_cancelled_call_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    both, service, client = pair
    client.call(begin, way, 1, method)
    service.call(entered)
    client.call(cancel)
    service.call(go)
    service.call(idle)
    client.call(ignore, way)
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_to_a_caller_that_has_forgotten_its_future_gives_its_refs_back(
    pair: Pair, way: str
) -> None:
    both, service, client = pair
    client.call(begin, way)
    service.call(entered)
    client.call(forget_futures)
    service.call(go)
    service.call(idle)
    client.call(ignore, way)
    both.nothing_in_use()


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_is_refused_as_too_many_gives_its_refs_back(pair: Pair, way: str) -> None:
    both, service, client = pair
    client.call(begin, way, 12)
    service.call(count_reaches, "overloaded", 5)
    service.call(go)
    assert client.call(outcomes).count("Overloaded") >= 5
    client.call(forget_futures)
    service.call(idle)
    both.nothing_in_use()


@pytest.mark.parametrize("drain", [0, 20])
def test_calls_that_run_or_come_while_a_service_stops_give_their_refs_back(
    pair: Pair, drain: float
) -> None:
    both, service, client = pair
    client.call(begin, "ref")
    service.call(entered)
    service.call(start_to_stop, drain)
    client.call(call_into_a_stop, "ref")
    service.call(go)
    service.call(stopped)
    client.call(outcomes)
    client.call(forget_futures)
    both.nothing_in_use()


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 8])
def test_a_service_killed_while_calls_run_or_wait_gives_every_page_back(
    doomed: Pair, way: str, n: int
) -> None:
    both, service, client = doomed
    client.call(begin, way, n)
    service.call(entered, min(n, 2))
    service.kill()
    assert client.call(all_lost)
    client.call(end)
    both.nothing_in_use()


def ask_for_refs(at: At) -> None:
    at.futures = [at.depot.future.give(LARGE), at.depot.future.fresh(LARGE)]


def test_results_whose_service_died_before_they_were_read_are_lost_with_it(doomed: Pair) -> None:
    both, service, client = doomed
    client.call(ask_for_refs)
    service.call(idle)
    service.kill()
    both.nothing_in_use()
    assert client.call(all_lost)
    client.call(end)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_killed_with_calls_in_flight_gives_every_page_back(doomed: Pair, way: str) -> None:
    both, service, client = doomed
    client.call(begin, way, 6)
    service.call(entered, 2)
    client.kill()
    service.call(go)
    service.call(idle)
    service.call(connections_reach, 0)
    both.nothing_in_use()


def test_a_client_closed_with_calls_in_flight_gives_every_page_back(pair: Pair) -> None:
    both, service, client = pair
    client.call(begin, "ref")
    service.call(entered)
    client.call(close_client)
    assert client.call(all_lost)
    service.call(go)
    service.call(connections_reach, 0)
    service.call(idle)
    both.nothing_in_use()


def test_a_memory_server_killed_while_calls_wait_ends_them_with_typed_errors(doomed: Pair) -> None:
    both, service, client = doomed
    client.call(begin, "ref", 2, "wait")
    service.call(entered, 2)
    both.servers.servers[0].kill()
    service.call(go)
    kinds = client.call(outcomes)
    # What was never looked at may well go back by a Ref that nobody can follow any more.
    assert set(kinds) <= {"RemoteError", "PeerLost", "ServerLost", "NoneType"}, kinds
    assert client.call(lost_typed)
    client.call(forget_futures)
    both.servers.servers[0].start()
    client.call(works_again)


def lost_typed(at: At) -> bool:
    try:
        at.depot.using(transfer="ref").echo(np.ones(LARGE, "u1"))
    except (PeerLost, RemoteError):
        return True
    return False


def works_again(at: At) -> None:
    for _ in range(200):
        try:
            got = at.depot.using(transfer="ref").echo(np.ones(LARGE, "u1"))
        except (PeerLost, RemoteError):
            continue
        assert got.sum() == LARGE
        return
    raise AssertionError("the server is back, and not used")


# ---------------------------------------------------------------- through a forwarder, and as values


@pytest.mark.parametrize("way", WAYS)
def test_a_forwarder_killed_in_between_gives_every_page_back(way: str) -> None:
    with net_running() as both:
        service, middle, client = both.net(), both.net(), both.net()
        service.call(serve)
        middle.call(forward)
        client.call(connect_front, "tcp")
        client.call(ignore, way)
        client.call(begin, way, 3)
        service.call(entered, 1)
        middle.kill()
        assert client.call(all_lost)
        service.call(go)
        service.call(idle)
        client.call(end)
        both.nothing_in_use()


def test_a_forwarder_passes_refs_on_without_a_word_to_the_servers() -> None:
    with net_running() as both:
        service, middle, client = both.net(), both.net(), both.net()
        service.call(serve)
        middle.call(forward)
        client.call(connect_front, "tcp")
        client.call(ignore, "ref")
        before = middle.call(asked)
        for _ in range(5):
            client.call(ignore, "ref")
        assert middle.call(asked) == before
        client.call(end)
        middle.call(stop_forwarder)
        both.nothing_in_use()


def asked(at: At) -> int:
    return sum(link.stats()["calls"] for link in at.host.memory.client.open_links())


def refs_as_values(at: At) -> None:
    assert at.depot.take(at.host.create_ref(at.host.zeros(LARGE, "u1"))) == LARGE
    ref: Any = at.depot.give(LARGE)
    buffer = at.host.map_ref(ref)
    assert buffer.numpy().sum() == 0
    assert buffer.nbytes == LARGE


def test_a_ref_in_a_field_of_a_dataclass_is_one_of_either_memory(pair: Pair) -> None:
    both, _, client = pair
    client.call(refs_in_fields)
    both.nothing_in_use()


def test_a_ref_is_a_value_as_well(pair: Pair) -> None:
    both, _, client = pair
    client.call(refs_as_values)
    both.nothing_in_use()

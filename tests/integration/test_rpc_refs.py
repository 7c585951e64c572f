"""However a call ends, every frame comes back: a Ref in flight has one holder at each moment.

Each item is done with an array by value, by Ref, and given away by move(); over rings and TCP.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from dmrpc_cxl.errors import (
    CallCancelled,
    CannotSend,
    DeadlineExceeded,
    DmError,
    Overloaded,
    PeerLost,
    RefConsumed,
    RemoteError,
    WrongArguments,
)
from dmrpc_cxl.rpc import Forwarder, frames, move
from dmrpc_cxl.rpc.frames import Code, Kind
from tests.fabrics import At, Fabric, HostProcess
from tests.rpc_peers import (
    LARGE,
    RawClient,
    Slip,
    connect,
    connections_reach,
    count_reaches,
    entered,
    go,
    idle,
    serve,
)
from tests.standing import Standing, until

WAYS = ["value", "ref", "move"]
Pair = tuple[Fabric, HostProcess, HostProcess]


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing({}, {})
    yield standing
    standing.close()


@pytest.fixture(params=["ring", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(standing: Standing, kind: str) -> Iterator[Pair]:
    """A fabric, a host that serves a Depot, and one with a client of it; audited afterwards."""
    with standing.use() as (fabric, (service, client)):
        service.call(serve, threads=2, queue=1)
        client.call(connect, transport=kind)
        yield fabric, service, client
        service.call(go)
        client.call(end)
        service.call(end)


def end(at: At) -> None:
    at.__dict__.pop("futures", None)
    if hasattr(at, "server"):
        at.server.stop()
    else:
        at.depot.close()


def argument(at: At, way: str) -> Any:
    array = at.host.empty(LARGE, "u1")
    array[:] = 1
    return move(array) if way == "move" else array


def client_of(at: At, way: str, **options: Any) -> Any:
    return at.depot.using(transfer="value" if way == "value" else "ref", **options)


def nothing_in_use(fabric: Fabric) -> None:
    """Wait until no frame is held by anybody, nor any Ref alive."""
    fabric.wait_until(lambda audit: audit["in_use"] == audit["live_refs"] == 0, 5)


def live_refs(fabric: Fabric) -> int:
    return int(fabric.audit()["live_refs"])


# ---------------------------------------------------------------- calls that fail


def expect(at: At, way: str, method: str, kind: type[BaseException], *more: Any) -> None:
    try:
        getattr(client_of(at, way), method)(argument(at, way), *more)
    except kind:
        return
    raise AssertionError(f"no {kind}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["fail", "fail_late"])
def test_a_call_whose_method_raises_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    fabric, _, client = pair
    client.call(expect, way, method, RemoteError)
    nothing_in_use(fabric)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_whose_arguments_do_not_fit_gives_its_refs_back(pair: Pair, way: str) -> None:
    fabric, _, client = pair
    client.call(expect, way, "first", WrongArguments)
    nothing_in_use(fabric)
    client.call(expect, way, "take", WrongArguments)
    nothing_in_use(fabric)
    client.call(expect, way, "no_such_method", AttributeError)
    nothing_in_use(fabric)


@pytest.mark.parametrize("way", WAYS)
def test_an_argument_that_nobody_looks_at_comes_back(pair: Pair, way: str) -> None:
    fabric, _, client = pair
    client.call(ignore, way)
    nothing_in_use(fabric)


def ignore(at: At, way: str) -> None:
    client_of(at, way).nothing(argument(at, way))


@pytest.mark.parametrize("way", WAYS)
def test_a_result_that_cannot_be_sent_gives_its_refs_back(pair: Pair, way: str) -> None:
    fabric, _, client = pair
    client.call(unsendable, way)
    nothing_in_use(fabric)


def unsendable(at: At, way: str) -> None:
    try:
        client_of(at, way).unsendable(LARGE)
    except (RemoteError, CannotSend):
        return
    raise AssertionError


# ---------------------------------------------------------------- time-outs, cancelling


def time_out(at: At, way: str, method: str) -> None:
    try:
        getattr(client_of(at, way, timeout=0.05), method)(argument(at, way))
    except DeadlineExceeded:
        return
    raise AssertionError


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["wait", "wait_whatever"])
def test_a_call_that_times_out_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    fabric, service, client = pair
    client.call(time_out, way, method)
    service.call(go)  # the reply finds nobody
    service.call(idle)
    client.call(ignore, way)  # reads it
    nothing_in_use(fabric)


def begin(at: At, way: str, n: int = 1, method: str = "wait_whatever") -> None:
    at.futures = [getattr(client_of(at, way).future, method)(argument(at, way)) for _ in range(n)]


def cancel(at: At) -> None:
    assert at.futures[0].cancel()
    assert isinstance(at.futures[0].exception(), CallCancelled)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["wait", "wait_whatever"])
def test_a_cancelled_call_gives_its_refs_back(pair: Pair, way: str, method: str) -> None:
    fabric, service, client = pair
    client.call(begin, way, 1, method)
    service.call(entered)
    client.call(cancel)
    service.call(go)
    service.call(idle)
    client.call(ignore, way)
    nothing_in_use(fabric)


def forget_futures(at: At) -> None:
    at.futures.clear()


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_to_a_caller_that_has_forgotten_its_future_gives_its_refs_back(
    pair: Pair, way: str
) -> None:
    fabric, service, client = pair
    client.call(begin, way)
    service.call(entered)
    client.call(forget_futures)
    service.call(go)
    service.call(idle)
    client.call(ignore, way)
    nothing_in_use(fabric)


# ---------------------------------------------------------------- rejected


def outcomes(at: At) -> list[str]:
    return [type(future.exception()).__name__ for future in at.futures]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_is_refused_as_too_many_gives_its_refs_back(pair: Pair, way: str) -> None:
    fabric, service, client = pair
    client.call(begin, way, 12)  # two run, one or two wait
    service.call(count_reaches, "overloaded", 5)
    service.call(go)
    ends = client.call(outcomes)
    assert ends.count("NoneType") >= 2
    assert ends.count(Overloaded.__name__) >= 5
    client.call(forget_futures)
    service.call(idle)
    nothing_in_use(fabric)


def stop(at: At, drain: float = 10) -> None:
    at.server.stop(drain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drain", [0, 20])
def test_calls_that_run_or_come_while_a_service_stops_give_their_refs_back(
    pair: Pair, way: str, drain: float
) -> None:
    fabric, service, client = pair
    client.call(begin, way)
    service.call(entered)
    service.call(start_to_stop, drain)
    client.call(call_into_a_stop, way)
    service.call(go)
    service.call(stopped)
    client.call(outcomes)
    client.call(forget_futures)
    nothing_in_use(fabric)


def start_to_stop(at: At, drain: float) -> None:
    at.stopping = threading.Thread(target=at.server.stop, args=[drain])
    at.stopping.start()
    until(lambda: at.server._draining)


def stopped(at: At) -> None:
    at.stopping.join(30)
    assert not at.stopping.is_alive()


def call_into_a_stop(at: At, way: str) -> None:
    with contextlib.suppress(DmError):
        client_of(at, way, timeout=0.2).nothing(argument(at, way))


# ---------------------------------------------------------------- deaths


@pytest.fixture
def doomed(fabric: Fabric, kind: str) -> Pair:
    """The same, with hosts that may die."""
    service, client = fabric.host(), fabric.host()
    service.call(serve, threads=2)
    client.call(connect, transport=kind)
    return fabric, service, client


def all_lost(at: At) -> bool:
    lost = all(isinstance(future.exception(), PeerLost) for future in at.futures)
    at.futures.clear()
    return lost


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 8])
def test_a_service_killed_while_calls_run_or_wait_gives_every_frame_back(
    doomed: Pair, way: str, n: int
) -> None:
    fabric, service, client = doomed
    client.call(begin, way, n)
    service.call(entered, min(n, 2))
    service.kill()
    assert client.call(all_lost)
    client.call(end)
    nothing_in_use(fabric)


def ask_for_refs(at: At) -> None:
    """Ask for results by Ref, and do not read them."""
    at.futures = [at.depot.future.give(LARGE), at.depot.future.fresh(LARGE)]


def test_results_whose_service_died_before_they_were_read_are_lost_with_it(doomed: Pair) -> None:
    fabric, service, client = doomed
    client.call(ask_for_refs)
    service.call(idle)
    service.kill()
    fabric.wait_until(lambda _: len(fabric.host_states()) == 1)
    assert client.call(all_lost)
    client.call(end)
    nothing_in_use(fabric)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_killed_with_calls_in_flight_gives_every_frame_back(
    doomed: Pair, way: str
) -> None:
    fabric, service, client = doomed
    client.call(begin, way, 6)
    service.call(entered, 2)
    client.kill()
    service.call(go)
    service.call(idle)
    service.call(connections_reach, 0)
    nothing_in_use(fabric)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_killed_before_it_reads_its_replies_gives_every_frame_back(
    doomed: Pair, way: str
) -> None:
    fabric, service, client = doomed
    client.call(begin, way, 4, "echo")
    service.call(idle)
    client.kill()
    service.call(connections_reach, 0)
    nothing_in_use(fabric)


def close_client(at: At) -> None:
    at.depot.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_client_closed_with_calls_in_flight_gives_every_frame_back(pair: Pair, way: str) -> None:
    fabric, service, client = pair
    client.call(begin, way)
    service.call(entered)
    client.call(close_client)
    assert client.call(all_lost)
    service.call(go)
    service.call(connections_reach, 0)
    service.call(idle)
    nothing_in_use(fabric)


# ---------------------------------------------------------------- through a forwarder


def forward(at: At) -> None:
    at.forwarder = Forwarder(at.host, "front", ["depot"])


def connect_front(at: At, kind: str) -> None:
    connect(at, "front", transport=kind)
    at.depot = at.front


@pytest.mark.parametrize("way", WAYS)
def test_a_forwarder_killed_in_between_gives_every_frame_back(
    fabric: Fabric, kind: str, way: str
) -> None:
    service, middle, client = fabric.host(), fabric.host(), fabric.host()
    service.call(serve)
    middle.call(forward)
    client.call(connect_front, kind)
    client.call(ignore, way)
    client.call(begin, way, 3)
    service.call(entered, 1)
    middle.kill()
    assert client.call(all_lost)
    service.call(go)
    service.call(idle)
    client.call(end)
    nothing_in_use(fabric)


def stop_forwarder(at: At) -> None:
    at.forwarder.stop()


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_that_a_forwarder_cannot_deliver_is_handed_back(
    fabric: Fabric, kind: str, way: str
) -> None:
    service, middle, client = fabric.host(), fabric.host(), fabric.host()
    service.call(serve)
    middle.call(forward)
    client.call(connect_front, kind)
    client.call(begin, way)
    service.call(entered)
    client.kill()
    service.call(go)
    service.call(idle)
    nothing_in_use(fabric)
    middle.call(stop_forwarder)


# ---------------------------------------------------------------- Refs as values, and the same frame twice


def refs_as_values(at: At) -> None:
    assert at.depot.take(at.host.create_ref(at.host.zeros(LARGE, "u1"))) == LARGE
    ref = at.depot.give(LARGE)
    assert at.host.map_ref(ref).nbytes == LARGE
    ref = at.host.create_ref(at.host.zeros(LARGE, "u1"))
    at.depot.take(ref)
    try:
        at.depot.take(ref)
    except RefConsumed:
        return
    raise AssertionError("taken twice")


def test_a_ref_sent_as_a_value_is_the_receivers_and_can_be_sent_once(pair: Pair) -> None:
    fabric, _, client = pair
    client.call(refs_as_values)
    nothing_in_use(fabric)


def wire(at: At, n: int = LARGE) -> bytes:
    return at.host.create_ref(at.host.ralloc(n), move=True).to_bytes()


def drop(at: At, wires: bytes) -> int:
    return at.host.drop_refs(wires)


def array_body(n: int, place: int = 0) -> bytes:
    inner = msgspec.msgpack.encode((place, n, "|u1", (n,)))
    return msgspec.msgpack.encode([msgspec.msgpack.Ext(1, inner)])


def test_the_same_frame_sent_twice_uses_its_refs_once_and_ends_the_connection(
    pair: Pair, kind: str
) -> None:
    fabric, service, client = pair
    ref = client.call(wire)
    with RawClient(fabric, kind=kind) as raw:
        call = raw.call("total", 1, refs=ref, body=array_body(LARGE))
        raw.send(call, call)
        answers = raw.ends()
    assert [frame.kind for frame in answers] in (
        [Kind.REPLY, Kind.ERROR],
        [Kind.REPLY],
        [Kind.ERROR],
    )
    client.call(drop, ref)
    service.call(connections_reach, 1)
    client.call(ignore, "ref")
    nothing_in_use(fabric)


def test_a_ref_replayed_in_another_call_is_refused_and_nobody_loses_anything(
    pair: Pair, kind: str
) -> None:
    fabric, _service, client = pair
    ref = client.call(wire)
    with RawClient(fabric, kind=kind) as raw:
        raw.send(raw.call("total", 1, refs=ref, body=array_body(LARGE)))
        assert raw.recv().kind == Kind.REPLY
        raw.send(raw.call("total", 2, refs=ref, body=array_body(LARGE)))
        answer = raw.recv()
        assert (answer.kind, answer.method) == (Kind.ERROR, Code.BAD_REF)
        raw.send(raw.call("total", 3, refs=ref * 2, body=array_body(LARGE, 1)))
        assert raw.recv().method == Code.BAD_REF
    nothing_in_use(fabric)


def test_refs_that_a_frame_lists_and_no_value_uses_stay_their_senders(
    pair: Pair, kind: str
) -> None:
    fabric, _service, client = pair
    wires = b"".join(client.call(wire) for _ in range(5))
    with RawClient(fabric, kind=kind) as raw:
        raw.send(raw.call("total", 1, refs=wires, body=array_body(LARGE, 3)))
        assert raw.recv().kind == Kind.REPLY
    assert client.call(drop, wires) == 4
    nothing_in_use(fabric)


def test_a_reply_that_a_raw_client_never_takes_comes_back_when_it_hangs_up_or_discards(
    pair: Pair, kind: str
) -> None:
    fabric, _service, _client = pair
    with RawClient(fabric, kind=kind) as raw:
        flags = frames.Flag.REF
        body = msgspec.msgpack.encode([LARGE])
        raw.send(raw.call("fresh", 1, flags=int(flags), body=body))
        assert raw.recv().nr_refs == 1
        assert live_refs(fabric) == 1
        raw.send(frames.short(Kind.DISCARD, 1))
        until(lambda: live_refs(fabric) == 0)
        raw.send(raw.call("fresh", 2, flags=int(flags), body=body))
        assert raw.recv().nr_refs == 1
        assert live_refs(fabric) == 1
    nothing_in_use(fabric)


def test_a_thousand_replies_that_are_never_taken_all_come_back(pair: Pair, kind: str) -> None:
    fabric, _service, _client = pair
    with RawClient(fabric, kind=kind) as raw:
        body = msgspec.msgpack.encode([100])
        for i in range(1, 301):
            raw.send(raw.call("fresh", i, flags=int(frames.Flag.REF), body=body))
            assert raw.recv().nr_refs == 1
        assert live_refs(fabric) == 300
    nothing_in_use(fabric)


def nested(at: At, how: str, way: str) -> float:
    np.testing.assert_array_equal(
        getattr(client_of(at, way), how)("next", argument(at, way)), np.ones(LARGE, "u1")
    )
    return 0


@pytest.mark.parametrize("how", ["pass_on", "pass_on_moved"])
def test_a_service_that_only_passes_its_argument_on_touches_no_page(
    fabric: Fabric, kind: str, how: str
) -> None:
    last, middle, client = fabric.host(), fabric.host(), fabric.host()
    last.call(serve, "last")
    middle.call(connect_next, kind)
    middle.call(serve)
    client.call(connect, transport=kind)
    for way in ("ref", "move"):
        client.call(nested, how, way)
        before = middle.call(stats)
        client.call(nested, how, way)
        after = middle.call(stats)
        touched = {
            name: after[name] - before[name]
            for name in (
                "wp_faults",
                "missing_faults",
                "frames_copied",
                "bytes_copied",
                "ralloc_calls",
            )
        }
        assert not any(touched.values()), touched
        views = after["map_views"] - before["map_views"]
        # The argument and the result; frames that are shown already are not shown a second time.
        assert views == 2 if how == "pass_on_moved" else views >= 1
        if how == "pass_on_moved":
            assert after["views_materialised"] == before["views_materialised"]
    middle.call(close_next)
    client.call(end)
    nothing_in_use(fabric)


def connect_next(at: At, kind: str) -> None:
    connect(at, "last", transport=kind)
    at.next = at.last


def close_next(at: At) -> None:
    at.next.close()


def stats(at: At) -> dict[str, int]:
    return at.host.stats()


def refs_in_fields(at: At) -> None:
    array = at.host.array(np.arange(LARGE, dtype="u1"))
    slip: Any = at.depot.signed(Slip(at.host.create_ref(array), "me"))
    assert slip["name"] == "me, signed"
    back = at.host.map_ref(slip["ref"]).numpy()
    assert (back == np.asarray(array)).all()
    with pytest.raises(WrongArguments, match="AnyRef"):
        at.depot.signed({"ref": 5, "name": "me"})


def test_a_ref_in_a_field_of_a_dataclass_may_be_one_of_either_memory(pair: Pair) -> None:
    fabric, _, client = pair
    client.call(refs_in_fields)
    fabric.wait_until(lambda audit: not audit["live_refs"])

"""Results and arguments that change hands, and those that must not: nobody's memory is taken from under them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import BadAddress, BufferInUse, CannotSend, PeerLost, UnknownMethod
from dmrpc_cxl.rpc import move, pass_on
from tests.fabrics import At, HostProcess
from tests.rpc_peers import HELD, LARGE, connect, serve
from tests.standing import Standing, until

N = 4 * LARGE
FAULTS = ("wp_faults", "missing_faults")


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing({}, {})
    yield standing
    standing.close()


@pytest.fixture(params=["ring", "tcp"])
def pair(request: pytest.FixtureRequest, standing: Standing) -> Iterator[list[HostProcess]]:
    """A host that serves a Depot, and one with a client of it."""
    with standing.use() as (_, hosts):
        hosts[0].call(serve)
        hosts[1].call(connect, transport=request.param)
        yield hosts
        hosts[1].call(end)
        hosts[0].call(end)


def end(at: At) -> None:
    if hasattr(at, "server"):
        at.depot._go.set()
        at.server.stop()
    if hasattr(at, "depot") and not hasattr(at, "server"):
        at.depot.close()


def faults(at: At) -> int:
    stats = at.host.stats()
    return sum(stats[name] for name in FAULTS)


def overwrite(array: np.ndarray) -> None:
    array.reshape(-1).view("u1")[:] = 9


def arrays_in(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [
        array
        for item in items
        if not isinstance(item, (bytes, memoryview))
        for array in arrays_in(item)
    ]


# ---------------------------------------------------------------- results


def store_to_result(at: At, method: str, *arguments: Any) -> tuple[int, list[int]]:
    """Store to all arrays of a result; return the faults that took and the sums before."""
    arrays = arrays_in(getattr(at.depot, method)(*arguments))
    sums = [int(array.sum()) for array in arrays]
    before = faults(at)
    for array in arrays:
        overwrite(array)
    return faults(at) - before, sums


@pytest.mark.parametrize(
    "method", ["fresh", "fresh_nested", "fresh_with_bytes", "fresh_async", "fresh_parcel"]
)
def test_a_fresh_result_changes_hands_and_is_stored_to_without_a_fault(
    pair: list[HostProcess], method: str
) -> None:
    pair[1].call(store_to_result, method, N)  # windows are opened
    taken, sums = pair[1].call(store_to_result, method, N)
    assert (taken, set(sums)) == (0, {N})


def look_at_kept(at: At) -> list[int] | None:
    """Return the distinct values in what the service kept, and store there; None if it kept no array."""
    at.depot._go.set()
    kept = at.depot._kept
    if "thread" in kept:
        until(lambda: "b" in kept)
    value = kept.get("b", kept.get("a"))
    if at.depot._generator is not None:
        value = next(at.depot._generator)
    if callable(value):
        value = value()
    if value is None:
        return None
    if hasattr(value, "item") and not isinstance(value, np.ndarray):
        value = value.item
    if isinstance(value, (list, tuple)):
        value = value[0]
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, list):
        value = value[0]
    array = np.asarray(value)
    seen = np.unique(array.view("u1")).tolist()
    array[...] = 5
    return seen if array.nbytes >= N - 1 else [-array.nbytes]


def keep_result(at: At, how: str) -> list[int]:
    at.result = at.depot.held(how, N)
    [array] = arrays_in(
        [at.result["item"]] if isinstance(at.result, dict) and "item" in at.result else at.result
    )
    seen = np.unique(array).tolist()
    overwrite(array)
    return seen


def look_at_result(at: At) -> list[int]:
    [array] = arrays_in(
        [at.result["item"]] if isinstance(at.result, dict) and "item" in at.result else at.result
    )
    return np.unique(array).tolist()


@pytest.mark.parametrize("how", HELD)
def test_a_result_that_somebody_at_the_service_can_reach_never_changes_under_them(
    pair: list[HostProcess], how: str
) -> None:
    service, client = pair
    assert client.call(keep_result, how) == [1]
    kept = service.call(look_at_kept)
    assert kept == [1] or (how == "weakref" and kept is None)
    assert client.call(look_at_result) == [9]


def keep_by_interceptor(at: At) -> None:
    at.depot._kept["a"] = []

    def interceptor(call: Any, proceed: Any) -> Any:
        result = proceed()
        at.depot._kept["a"].append(result)
        return result

    at.server._runner._interceptors = (interceptor,)


def fetch(at: At, method: str) -> list[int]:
    at.result = getattr(at.depot, method)(N)
    overwrite(at.result)
    return [int(at.result[0])]


@pytest.mark.parametrize("method", ["fresh", "fresh_async"])
def test_a_result_that_an_interceptor_keeps_is_shared(pair: list[HostProcess], method: str) -> None:
    service, client = pair
    service.call(keep_by_interceptor)
    client.call(fetch, method)
    assert service.call(look_at_kept_list) == [1]


def look_at_kept_list(at: At) -> list[int]:
    value = at.depot._kept["a"][0]
    if not isinstance(value, np.ndarray):  # the coroutine
        return [1]
    return np.unique(value).tolist()


# ---------------------------------------------------------------- move()


def move_and_look(at: At) -> tuple[int, int, int]:
    array = at.host.empty(N, "u1")
    array[:] = 3
    alias = array
    total = at.depot.total(move(array))
    return int(total), array.size, alias.size


def test_a_moved_array_arrives_and_is_empty_at_the_caller(pair: list[HostProcess]) -> None:
    assert pair[1].call(move_and_look) == (3 * N, 0, 0)


def store_moved(at: At) -> int:
    costs = at.depot.store(move(at.host.zeros(N, "u1")), 7)
    return sum(costs[name] for name in FAULTS)


def test_a_receiver_stores_to_a_moved_array_without_a_fault(pair: list[HostProcess]) -> None:
    pair[1].call(store_moved)
    assert pair[1].call(store_moved) == 0


def refuse_to_move(at: At, how: str) -> list[Any]:
    array = at.host.empty(N, "u1")
    array[:] = 3
    base: Any = array.base
    other: Any = {
        "slice": lambda: array[5:],
        "reshaped": lambda: array.reshape(2, -1),
        "memoryview": lambda: memoryview(array),
        "slice of a memoryview": lambda: memoryview(array)[7:],
        "frombuffer": lambda: np.frombuffer(array, "u1"),
        "view of the buffer": lambda: memoryview(base.base.obj),
        "base": lambda: base,
        "view": lambda: base.base,
    }[how]()
    target = array[1:] if how == "part" else array
    with pytest.raises(BufferInUse):
        move(target)
    same = np.asarray(other)
    array[-1] = 4
    return [array.size, int(array[0]), int(np.asarray(other).reshape(-1)[-1]), same.size > 0]


@pytest.mark.parametrize(
    "how",
    [
        "slice",
        "reshaped",
        "memoryview",
        "slice of a memoryview",
        "frombuffer",
        "view of the buffer",
        "base",
        "view",
    ],
)
def test_move_refuses_while_other_views_live_and_changes_nothing(
    pair: list[HostProcess], how: str
) -> None:
    assert pair[1].call(refuse_to_move, how) == [N, 3, 4, True]


def move_after_views(at: At) -> int:
    array = at.host.zeros(N, "u1")
    with memoryview(array) as view:
        view[0] = 8
    array[10:20] = 1
    other = array  # noqa: F841 - another reference is no view
    return int(at.depot.total(move(array)))


def test_move_works_once_the_views_are_gone(pair: list[HostProcess]) -> None:
    assert pair[1].call(move_after_views) == 18


def move_wrong_things(at: At) -> None:
    array = at.host.zeros(N, "u1")
    for wrong in (np.zeros(N), b"abc", None, [array]):
        with pytest.raises(BadAddress):
            move(wrong)
    with pytest.raises(BufferInUse):
        move(array[1:])
    assert at.depot.total(move(array)) == 0


def test_move_refuses_what_is_no_array_in_dm_or_a_part(pair: list[HostProcess]) -> None:
    pair[1].call(move_wrong_things)


def pass_on_things(at: At) -> list[Any]:
    """Pass on what came by Ref, in a message, or is still looked at; return what was sent, and what arrived."""
    by_ref = at.depot.echo(at.host.array(np.full(N, 1, "u1")))
    by_value = at.depot.echo(np.full(10, 2, "u1"))
    looked_at = at.depot.echo(at.host.array(np.full(N, 3, "u1")))
    part = looked_at[5:]
    before = at.host.stats()
    sent = [pass_on(array) for array in (by_ref, by_value, looked_at, part)]
    totals = [at.depot.total(value) for value in sent]
    shared = at.host.stats()["create_ref_calls"] - before["create_ref_calls"]
    kinds = [type(value).__name__ for value in sent]
    return [kinds, totals, by_ref.size, shared, int(part[0])]


def test_what_was_received_is_passed_on_by_the_ref_it_came_by_if_any(
    pair: list[HostProcess],
) -> None:
    kinds, totals, left, shared, still = pair[1].call(pass_on_things)
    assert kinds == ["Moved", "ndarray", "ndarray", "ndarray"]
    assert totals == [N, 20, 3 * N, 3 * (N - 5)]
    assert (left, shared, still) == (0, 2, 3)


def move_in_vain(at: At, how: str) -> float:
    array = at.host.empty(N, "u1")
    array[:] = 2
    moved = move(array)
    if how == "unsendable":
        with pytest.raises(CannotSend):
            at.depot.two(moved, object())
    elif how == "unsendable, and large bytes":
        with pytest.raises(CannotSend):
            at.depot.two([moved, b"x" * N], [object()])
    elif how == "unknown method":
        with pytest.raises(UnknownMethod):
            at.depot.no_such_method(moved)
    else:
        at.depot.close()
        with pytest.raises(PeerLost):
            at.depot.total(moved)
        at.depot = at.host.connect("depot")
    return at.depot.total(moved)


@pytest.mark.parametrize(
    "how", ["unsendable", "unsendable, and large bytes", "unknown method", "closed client"]
)
def test_data_moved_into_a_call_that_never_left_can_be_sent_again(
    pair: list[HostProcess], how: str
) -> None:
    assert pair[1].call(move_in_vain, how) == 2 * N


def move_in_vain_and_forget(at: At) -> None:
    moved = move(at.host.zeros(N, "u1"))
    with pytest.raises(CannotSend):
        at.depot.two(moved, object())
    del moved
    ref = at.host.create_ref(at.host.zeros(N, "u1"))
    with pytest.raises(CannotSend):
        at.depot.two(ref, object())


def test_data_moved_into_a_call_that_never_left_is_freed_when_forgotten(
    pair: list[HostProcess],
) -> None:
    pair[1].call(move_in_vain_and_forget)


def bytes_and_arrays(at: At) -> list[Any]:
    array = at.host.empty(N, "u1")
    array[:] = 4
    result = at.depot.echo(
        [move(array), b"y" * N, at.host.array([5] * N, "u1"), {"a": bytearray(b"z" * N)}]
    )
    return [int(result[0].sum()), len(result[1]), int(result[2].sum()), bytes(result[3]["a"][:2])]


def test_large_bytes_beside_arrays_lose_nothing_of_them(pair: list[HostProcess]) -> None:
    assert pair[1].call(bytes_and_arrays) == [4 * N, N, 5 * N, b"zz"]


def send_and_free(at: At) -> None:
    buffer = at.host.ralloc(1000)
    assert at.depot.total(buffer.numpy()) == 0
    buffer.free()  # refuses while anything of ours still looks at it


def test_nothing_holds_an_argument_once_the_call_is_over(pair: list[HostProcess]) -> None:
    pair[1].call(send_and_free)

"""What callers are told when something goes wrong; interceptors and metadata."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import dmrpc_cxl.errors as errors
from dmrpc_cxl.errors import (
    AccessDenied,
    CannotSend,
    DmError,
    InterfaceMismatch,
    RemoteError,
    UnknownMethod,
    WrongArguments,
)
from dmrpc_cxl.rpc import Call, Outbound, frames
from tests.rpc_services import Desk, Point, Rpc, Typed


@pytest.mark.parametrize(
    ("what", "builtin", "remote_type", "text"),
    [
        ("plain", ValueError, "ValueError", "plain"),
        ("key", KeyError, "KeyError", "absent"),
        ("odd", Exception, "tests.rpc_services.OddError", "1 and 2"),
        ("unicode", ValueError, "UnicodeDecodeError", "invalid start byte"),
        ("huge", ValueError, "ValueError", "xxxxxxx"),
        ("exit", Exception, "SystemExit", "3"),
        ("interrupt", Exception, "KeyboardInterrupt", ""),
        ("stop", Exception, "StopIteration", ""),
        ("surrogate", Exception, "RuntimeError", "ValueError: file \\udcff"),
        ("unspeakable", Exception, "RuntimeError", "UnspeakableError"),
    ],
)
@pytest.mark.parametrize("method", ["raises", "raises_later"])
def test_whatever_a_method_raises_reaches_the_caller_and_the_server_lives(
    rpc: Rpc,
    transport: str,
    method: str,
    what: str,
    builtin: type[Exception],
    remote_type: str,
    text: str,
) -> None:
    rpc.serve(0, Desk, "desk", threads=1)
    desk = rpc.connect("desk", transport=transport, timeout=20)
    for _ in range(2):
        with pytest.raises(RemoteError) as caught:
            getattr(desk, method)(what)
        error = caught.value
        assert isinstance(error, builtin)
        assert text in str(error)
        if (what, method) != ("stop", "raises_later"):  # Python makes a RuntimeError of that
            assert error.remote_type == remote_type
        if what in ("plain", "odd", "key"):
            assert "in raises" in error.remote_traceback
            assert "tests/rpc_services.py" in error.remote_traceback
    assert desk.echo(1) == 1


def test_tracebacks_stay_at_home_when_the_server_says_so(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", tracebacks=False)
    desk = rpc.connect("desk", transport=transport)
    with pytest.raises(ValueError, match="secret") as caught:
        desk.raises("secret")
    assert caught.value.remote_traceback == ""  # type: ignore[attr-defined]


def test_unknown_methods_and_wrong_arguments_are_named(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Typed, "typed")
    typed = rpc.connect("typed", transport=transport)
    with pytest.raises(UnknownMethod, match=r"typed has no method 'absent'; it has add, "):
        typed.absent()
    with pytest.raises(WrongArguments, match=r"add: .*int.*`?a`?"):
        typed.add("one")
    with pytest.raises(WrongArguments, match=r"middle: .*line"):
        typed.middle({"begin": {"x": "far"}, "end": {"x": 1.0}})
    for call in (
        lambda: typed.add(),
        lambda: typed.add(1, 2, 3, 4),
        lambda: typed.add(1, d=4),
        lambda: typed.add(1, a=4),
        lambda: typed.add(1, c=4),
    ):
        with pytest.raises(WrongArguments, match=r"typed\.add\(self, a: int"):
            call()
    with pytest.raises(CannotSend):
        typed.loose(object())
    with pytest.raises(AttributeError):
        typed._hidden  # noqa: B018
    assert typed.add(1) == 111


def test_results_that_cannot_be_sent_are_the_callers_to_know(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)
    with pytest.raises(DmError, match="lock"):
        desk.unsendable()
    assert desk.echo(1) == 1


class Narrower:
    def add(self, a: int) -> int: ...  # type: ignore[empty-body]


class Renamed:
    def add(self, first: int, b: int = 0) -> int: ...  # type: ignore[empty-body]


class More:
    def add(self, a: int) -> int: ...  # type: ignore[empty-body]
    def absent(self) -> None: ...


def test_a_class_with_other_methods_is_refused_when_connecting(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Typed, "typed")
    assert rpc.connect("typed", Narrower, transport=transport).add(1) == 111
    with pytest.raises(InterfaceMismatch, match=r"typed\.add is add\(self, a: int"):
        rpc.connect("typed", Renamed, transport=transport)
    with pytest.raises(InterfaceMismatch, match="has no method absent"):
        rpc.connect("typed", More, transport=transport)


def test_another_protocol_version_is_refused_by_both_sides(
    rpc: Rpc, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = rpc.serve(0, Typed, "typed")
    rpc.host.publish("future", {**endpoint, "protocol": 99})
    with pytest.raises(InterfaceMismatch, match="speaks protocol 99"):
        rpc.connect("future", transport=transport)
    # A client of version 99, as far as the server can tell.
    monkeypatch.setattr(frames, "PROTOCOL", 99)
    with pytest.raises(InterfaceMismatch, match="the client speaks protocol 99"):
        rpc.connect("future", transport=transport)
    monkeypatch.undo()
    rpc.host.withdraw("future")


def test_a_published_name_that_is_no_rpc_service_is_not_found(rpc: Rpc) -> None:
    rpc.host.publish("other", "something else")
    with pytest.raises(errors.ServiceNotFound, match="not as an RPC service"):
        rpc.connect("other")
    rpc.host.withdraw("other")


def test_pickled_arguments_are_denied_unless_the_service_takes_them(
    rpc: Rpc, transport: str
) -> None:
    rpc.serve(0, Desk, "no")
    rpc.serve(1, Desk, "yes", pickle=True)
    with pytest.raises(AccessDenied, match="takes no pickled arguments"):
        rpc.connect("no", transport=transport, serializer="pickle").echo(Point(1))
    assert rpc.connect("yes", transport=transport, serializer="pickle").echo({1: Point(1)}) == {
        1: Point(1)
    }


def test_the_error_tree_is_documented_as_it_is() -> None:
    text = ast.get_docstring(ast.parse(inspect.getsource(errors)))
    assert text is not None
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, DmError):
            assert f" {name}" in f" {text}", name


# ---------------------------------------------------------------- interceptors


def _marking(name: str, log: list[str]) -> Callable[[Any, Callable[[], Any]], Any]:
    def interceptor(call: Any, proceed: Callable[[], Any]) -> Any:
        log.append(f"{name} {call.method}")
        result = proceed()
        log.append(f"{name} done")
        return result

    return interceptor


def test_interceptors_of_both_sides_run_from_the_outside_in(rpc: Rpc, transport: str) -> None:
    log: list[str] = []
    server = rpc.host.serve(
        Desk(), name="here", interceptors=[_marking("s1", log), _marking("s2", log)]
    )
    desk = rpc.connect(
        "here", transport=transport, interceptors=[_marking("c1", log), _marking("c2", log)]
    )
    assert desk.echo(1) == 1
    want = [f"{who} echo" for who in ("c1", "c2", "s1", "s2")]
    assert log == want + [f"{who} done" for who in ("s2", "s1", "c2", "c1")]
    server.stop()


def test_a_clients_interceptor_changes_arguments_metadata_and_results(
    rpc: Rpc, transport: str
) -> None:
    def change(outbound: Outbound, proceed: Callable[[], Any]) -> Any:
        outbound.metadata["who"] = "interceptor"
        if outbound.method == "echo":
            assert outbound.service == "desk"
            outbound.arguments = (outbound.arguments[0] + 1,)
            return proceed() * 10
        if outbound.method == "note":
            return "short"
        if outbound.method == "raises":
            raise LookupError("ours")
        return proceed()

    rpc.serve(0, Desk, "desk")
    desk = rpc.connect(
        "desk", transport=transport, interceptors=[change], metadata={"from": "test"}
    )
    assert desk.echo(1) == 20
    assert desk.echo(value=1) == 20
    assert desk.metadata() == {"from": "test", "who": "interceptor"}
    assert desk.note("never sent") == "short"
    with pytest.raises(LookupError, match="ours"):
        desk.raises("never sent")
    assert desk.notes() == []


def test_a_servers_interceptor_answers_raises_and_changes_results(rpc: Rpc, transport: str) -> None:
    async def around(call: Call, proceed: Callable[[], Any]) -> Any:
        return {**await proceed(), "around": "yes"}

    def gate(call: Call, proceed: Callable[[], Any]) -> Any:
        if call.method == "metadata_later":
            if call.metadata.get("short"):
                return {"answered": "here"}
            return around(call, proceed)
        if call.metadata.get("token") != "open":
            raise PermissionError("no token")
        return [proceed(), "seen"]

    server = rpc.host.serve(Desk(), name="here", interceptors=[gate])
    desk = rpc.connect("here", transport=transport)
    with pytest.raises(PermissionError, match="no token"):
        desk.echo(1)
    assert desk.using(metadata={"token": "open"}).echo(1) == [1, "seen"]
    assert desk.metadata_later() == {"around": "yes"}
    assert desk.using(metadata={"short": "x"}).metadata_later() == {"answered": "here"}
    server.stop()


def test_metadata_reaches_sync_and_async_methods(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, metadata={"a": "1"})
    assert desk.metadata() == {"a": "1"}
    assert desk.using(metadata={"b": "2"}).metadata_later() == {"a": "1", "b": "2"}

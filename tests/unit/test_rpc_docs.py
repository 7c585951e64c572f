"""docs/rpc-protocol.md, docs/errors.md and docs/rpc.md against the code: no number, code or name differs, none is missing."""

from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import dmrpc_cxl
from dmrpc_cxl import _native, errors
from dmrpc_cxl.rpc import Client, Moved, Outbound, endpoint, frames, marshal, remote_errors

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROTOCOL = (DOCS / "rpc-protocol.md").read_text(encoding="utf-8")
ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def table(text: str, first: str) -> list[list[str]]:
    """Return the rows of all tables whose head begins with that word."""
    rows: list[list[str]] = []
    for found in re.finditer(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        lines = found[1].splitlines()
        rows += [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows, f"no table of {first}"
    return rows


def named(rows: list[list[str]], column: int = 1) -> dict[str, int]:
    return {row[0].strip("`"): int(row[column]) for row in rows}


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


# ---------------------------------------------------------------- the protocol


def test_a_frame_that_is_packed_as_it_is_drawn_is_read_so() -> None:
    rows = [(row[0].strip("`"), int(row[1]), int(row[2])) for row in table(PROTOCOL, "field")]
    fields = {
        "size": 256, "kind": frames.Kind.CALL, "flags": frames.Flag.COPY, "nr_refs": 2, "call_id": 2**60 + 1,
        "time_left_us": 2**50 + 3, "method": 2**31 + 5, "meta_bytes": 7, "body_bytes": 11, "inline_at": 192,
    }  # fmt: skip
    assert [name for name, _, _ in rows] == list(fields)
    data = bytearray(fields["size"])
    for name, at, nbytes in rows:
        data[at : at + nbytes] = int(fields[name]).to_bytes(nbytes, "little")
    frame = frames.parse(data)
    assert {name: getattr(frame, name) for name in list(fields)[1:]} == dict(
        list(fields.items())[1:]
    )
    assert at + nbytes == frames.HEADER_BYTES


def test_the_header_is_drawn_with_the_fields_of_the_table() -> None:
    rows = table(PROTOCOL, "field")
    drawing = PROTOCOL.partition("```\n")[2].partition("```")[0].splitlines()
    assert drawing[0].split() == [*(row[1] for row in rows), str(frames.HEADER_BYTES)]
    names = [name.strip() for name in drawing[2].strip(" |").split("|")]
    assert names == [row[0].strip("`") for row in rows]


def test_kinds_flags_and_codes_have_the_numbers_that_are_written() -> None:
    assert named(table(PROTOCOL, "kind")) == {kind.name: kind.value for kind in frames.Kind}
    flags = {name: flag.value for name, flag in frames.Flag.__members__.items()}
    assert named(table(PROTOCOL, "flag")) == flags
    assert named(table(PROTOCOL, "code")) == {code.name: code.value for code in frames.Code}
    extensions = {"ARRAY": marshal.ARRAY, "BLOB": marshal.BLOB, "REF": marshal.REF}
    assert named(table(PROTOCOL, "extension")) == extensions


def frame_of(code: frames.Code, kind: str) -> frames.Frame:
    body = frames.encode(frames.ErrorBody(f"dmrpc_cxl.errors.{kind}", "because"))
    return frames.parse(frames.head(frames.Kind.ERROR, 1, method=code, body=body))


@pytest.mark.parametrize("row", table(PROTOCOL, "code"), ids=lambda row: row[0])
def test_a_code_is_raised_as_what_is_written(row: list[str]) -> None:
    for kind in names_in(row[3]):
        raised = remote_errors.error_of(frame_of(frames.Code[row[0].strip("`")], kind), "s", "m")
        assert type(raised) is getattr(errors, kind)


def test_bodies_have_the_fields_that_are_written() -> None:
    for row in table(PROTOCOL, "body"):
        struct = getattr(frames, row[0].strip("`"))
        assert tuple(names_in(row[1])) == struct.__struct_fields__


def test_limits_are_those_of_the_code() -> None:
    for what, limit in table(PROTOCOL, "what"):
        name = names_in(what)[0]
        number, _, unit = limit.partition(" ")
        value = getattr(frames, name, None) or getattr(endpoint, name)
        assert value == int(number) * UNITS.get(unit, 1), name


# ---------------------------------------------------------------- errors

EXCEPTIONS = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.DmError) and kind is not errors.DmError
}
ROWS = {row[0].strip("`"): row[1:] for row in table(ERRORS, "exception")}


def test_every_exception_is_explained_and_no_other() -> None:
    assert set(ROWS) == set(EXCEPTIONS)
    assert len(table(ERRORS, "exception")) == len(ROWS)


@pytest.mark.parametrize("name", sorted(set(EXCEPTIONS) - {"RemoteError"}))
def test_an_exception_is_also_what_is_written(name: str) -> None:
    outside = [kind for kind in EXCEPTIONS[name].__mro__ if kind.__module__ == "builtins"]
    first = next(kind for kind in outside if kind is not object)
    written = [getattr(builtins, also) for also in names_in(ROWS[name][0])]
    assert written == ([] if first is Exception else [first])


def test_exceptions_stand_under_whose_fault_they_are() -> None:
    for part in re.split(r"^## ", ERRORS, flags=re.MULTILINE)[1:]:
        first, *rest = [row[0].strip("`") for row in table(part, "exception")]
        assert all(issubclass(EXCEPTIONS[name], EXCEPTIONS[first]) for name in rest), first


def test_the_tree_in_the_module_has_every_exception() -> None:
    drawn = set(re.findall(r"\b[A-Z]\w+\b", re.sub(r"\([^)]*\)", "", errors.__doc__ or "")))
    assert set(EXCEPTIONS) <= drawn


# ---------------------------------------------------------------- names


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


DOCUMENTED: list[Any] = [
    dmrpc_cxl.Host,
    dmrpc_cxl.Buffer,
    dmrpc_cxl.Ref,
    dmrpc_cxl.Server,
    dmrpc_cxl.CallFuture,
    dmrpc_cxl.Call,
    dmrpc_cxl.Forwarder,
    Client,
    Outbound,
]


def test_every_public_name_is_explained_somewhere() -> None:
    spans = " ".join(
        span
        for path in DOCS.rglob("*.md")
        for span in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))
    )
    explained = set(re.findall(r"\w+", spans))
    names = {name for name in dmrpc_cxl.__all__ if not name.startswith("_")} | {"move", "Moved"}
    for kind in DOCUMENTED:
        names |= {kind.__name__} | public(kind)
    assert names - explained == set()


def test_every_public_function_says_what_it_does() -> None:
    silent = [
        f"{kind.__name__}.{name}"
        for kind in (*DOCUMENTED, Moved, _native.Ring, _native.WaitSet)
        for name in public(kind)
        if callable(getattr(kind, name)) and not inspect.getdoc(getattr(kind, name))
    ]
    assert silent == []


def test_what_connect_and_serve_take_is_written_with_them() -> None:
    for function in (dmrpc_cxl.Host.serve, dmrpc_cxl.Host.connect, dmrpc_cxl.Host.attach):
        text = inspect.getdoc(function) or ""
        told = set(re.findall(r"^ +(\w+):", text, re.MULTILINE))
        assert set(inspect.signature(function).parameters) - {"self"} <= told
        assert "Raises:" in text

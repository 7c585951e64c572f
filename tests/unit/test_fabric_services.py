"""`dmrpc fabric inspect` and `verify` show what is published, and tell what is good of it from what is not."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.cli import main
from dmrpc_cxl.fabric import device, services

SLOT = LAYOUT["SERVICE_SLOT_BYTES"]


@pytest.fixture
def name() -> Iterator[str]:
    """A device with host 3, of incarnation 7, alive in it."""
    name = f"dmrpc-test-services-{os.getpid()}-{secrets.token_hex(4)}"
    device.create(name, size=1 << 20)
    with device.open(name) as opened:
        opened.activate_host(3, os.getpid(), 0, 7, "worker", 0)
    yield name
    device.remove(name, force=True)


def publish(name: str, service: str, endpoint: str, *, host: int = 3, incarnation: int = 7) -> int:
    with device.open(name) as opened:
        slot, _ = opened.publish(host, incarnation, service.encode(), endpoint.encode())
        return slot


def damage(name: str, slot: int) -> None:
    with device.open(name) as opened:
        at = opened.superblock["service_table_off"] + slot * SLOT + SLOT - 100
        path = device.path_of(name)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def states(name: str) -> dict[int, str]:
    return {row["slot"]: row["state"] for row in device.inspect(name).services}


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, args, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_inspect_lists_names_with_endpoint_and_host(name: str) -> None:
    slot = publish(name, "statistics", '{"unix":"/run/x.sock"}')
    (row,) = json.loads(run("fabric", "inspect", name, "--json"))["services"]
    assert (row["slot"], row["name"], row["host"]) == (slot, "statistics", 3)
    assert (row["endpoint"], row["state"]) == ({"unix": "/run/x.sock"}, services.PUBLISHED)
    output = run("fabric", "inspect", name)
    for text in ("Services", "statistics", "published", "/run/x.sock"):
        assert text in output


def test_a_long_endpoint_is_cut_in_the_table_and_whole_in_the_json(name: str) -> None:
    publish(name, "long", json.dumps("x" * 3000))
    assert "..." in run("fabric", "inspect", name)
    (row,) = json.loads(run("fabric", "inspect", name, "--json"))["services"]
    assert row["endpoint"] == "x" * 3000


def test_what_a_host_that_is_gone_has_left_is_told_from_what_is_published(name: str) -> None:
    before = publish(name, "another process's", "1", incarnation=6)
    never = publish(name, "of a free entry", "1", host=4)
    now = publish(name, "good", "1")
    assert states(name) == {
        before: services.LEFT_BEHIND,
        never: services.LEFT_BEHIND,
        now: services.PUBLISHED,
    }
    assert device.verify(name)["nr_violations"] == 0  # a coordinator removes them
    assert device.verify(name)["services"] == 1


def test_of_a_name_published_twice_the_later_entry_counts(name: str) -> None:
    old, new = publish(name, "one", "1"), publish(name, "one", "2")
    assert states(name) == {old: services.SUPERSEDED, new: services.PUBLISHED}


def test_verify_finds_a_damaged_entry_and_exits_with_1(name: str) -> None:
    good, bad = publish(name, "good", "1"), publish(name, "bad", json.dumps("x" * 450))
    assert "1 services" not in run("fabric", "verify", name)
    damage(name, bad)
    assert states(name) == {good: services.PUBLISHED, bad: services.DAMAGED}
    found = device.verify(name)
    assert found["nr_violations"] == 1
    assert found["violations"] == [(None, f"entry {bad} of the service table makes no sense")]
    assert "makes no sense" in run("fabric", "verify", name, code=1)
    assert "damaged" in run("fabric", "inspect", name)

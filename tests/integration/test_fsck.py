"""`dmrpc fsck` and the scrubber: every frame accounted for, on fabrics at work and on what is left of them."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import RefConsumed
from dmrpc_cxl.fabric import device, fsck
from tests.fabrics import At, Fabric, running

PAGE = 4096
NO_SCRUBBING = ("--scrub-interval", "0")


def run_fsck(name: str, *options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "dmrpc_cxl.fabric.check", name, "--json", *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def set_count(name: str, pfn: int, change: int) -> None:
    """Change a frame's refcount behind everybody's back."""
    with device.open(name, writable=False) as opened:
        offset = opened.superblock["frame_table_off"] + 8 * pfn
    with open(device.path_of(name), "r+b") as file:
        file.seek(offset)
        (word,) = struct.unpack("<Q", file.read(8))
        file.seek(offset)
        file.write(struct.pack("<Q", word + change))


def keep_pages(at: At, nr_pages: int) -> None:
    """Allocate and share."""
    at.buffer = at.host.ralloc(nr_pages * PAGE)
    memoryview(at.buffer)[:] = bytes(nr_pages * PAGE)
    at.ref = at.host.create_ref(at.buffer)


def drop_all(at: At) -> None:
    at.ref.drop()
    del at.ref, at.buffer


def circulate(at: At, enough: str) -> int:
    """Let frames pass from buffer to Ref to buffer, without a pause, until a file appears."""
    rounds = 0
    while rounds < 50 or not Path(enough).exists():
        buffer = at.host.ralloc(8 * PAGE)
        memoryview(buffer)[::PAGE] = bytes([rounds % 251]) * 8
        ref = at.host.create_ref(buffer, move=True)
        again = at.host.map_ref(ref)
        other = at.host.create_ref(again)
        assert set(memoryview(again)[::PAGE]) == {rounds % 251}
        del again
        other.drop()
        rounds += 1
    return rounds


def leaked_pool_frame(name: str) -> int:
    """Give the last frame of the device, which is the pool's, a count that nothing holds."""
    with device.open(name, writable=False) as opened:
        pfn = opened.superblock["nr_frames"] - 1
        assert opened.frame(pfn)[:2] == (0, 0)
    set_count(name, pfn, 1)
    return pfn


def test_a_fabric_with_buffers_and_refs_is_clean_and_says_who_holds_what(fabric: Fabric) -> None:
    host = fabric.host(name="keeper")
    host.call(keep_pages, 5)
    status, found = run_fsck(fabric.name)
    assert status == fsck.CLEAN, found
    (row,) = found["hosts"]
    assert (row["name"], row["mapped"], row["refs"], row["alive"]) == ("keeper", 5, 1, True)
    with device.open(fabric.name, writable=False) as opened:
        mapped, _ = opened.holdings()
    pfn = mapped[0][2]
    _, found = run_fsck(fabric.name, "--frame", str(pfn))
    assert found["frames"][str(pfn)]["refcount"] == 2
    assert len(found["frames"][str(pfn)]["holders"]) == 2
    host.call(drop_all)


@pytest.mark.parametrize("kind", ["pool", "mapped"])
def test_a_count_that_nothing_holds_is_found_and_taken_off_while_hosts_live(kind: str) -> None:
    with running(coordinator=NO_SCRUBBING) as fabric:
        host = fabric.host()
        host.call(keep_pages, 3)
        if kind == "pool":
            pfn = leaked_pool_frame(fabric.name)
        else:
            with device.open(fabric.name, writable=False) as opened:
                pfn = opened.holdings()[0][0][2]
            set_count(fabric.name, pfn, 2)
        status, found = run_fsck(fabric.name)
        assert (status, len(found["damage"])) == (fsck.DAMAGED, 1), found
        assert f"frame {pfn} " in found["damage"][0]
        status, found = run_fsck(fabric.name, "--repair")
        assert (status, len(found["repaired"])) == (fsck.REPAIRED, 1), found
        assert run_fsck(fabric.name)[0] == fsck.CLEAN
        host.call(drop_all)


def test_a_count_too_few_is_reported_and_left_alone() -> None:
    with running(coordinator=NO_SCRUBBING) as fabric:
        host = fabric.host()
        host.call(keep_pages, 3)
        with device.open(fabric.name, writable=False) as opened:
            pfn = opened.holdings()[0][0][2]
        set_count(fabric.name, pfn, -1)
        status, found = run_fsck(fabric.name, "--repair")
        assert status == fsck.DAMAGED
        assert "held 2 times" in found["damage"][0]
        assert not found["repaired"]
        set_count(fabric.name, pfn, 1)
        host.call(drop_all)


def test_what_is_in_flight_is_no_damage_and_nothing_of_it_is_repaired(tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    with running(
        size=16 << 20, coordinator=("--scrub-interval", "0.01", "--scrub-share", "0.5")
    ) as fabric:
        hosts = [fabric.host() for _ in range(2)]
        for host in hosts:
            host.start(circulate, str(enough))
        for _ in range(20):
            found = fsck.check(fabric.name, seconds=0.05)
            assert not found.damage, found
            found = fsck.check(fabric.name, repair=True, seconds=0.05)
            assert (found.damage, found.repaired) == ([], []), found
        enough.touch()
        assert all(host.result() >= 50 for host in hosts)
        with fabric.client() as client:
            scrubber = client.stats()["scrubber"]
        assert scrubber["looks"] > 20
        assert scrubber["repaired"] == scrubber["damaged"] == 0


def test_a_host_that_is_stopped_inside_an_operation_keeps_what_it_is_at(tmp_path: Path) -> None:
    """Stop it at random moments: now and then it is inside one, and its frames are nobody's to repair."""
    enough = tmp_path / "enough"
    with running(size=16 << 20, coordinator=NO_SCRUBBING) as fabric:
        host = fabric.host()
        host.start(circulate, str(enough))
        for _ in range(30):
            os.kill(host.pid, signal.SIGSTOP)
            found = fsck.check(fabric.name, repair=True, seconds=0.02)
            os.kill(host.pid, signal.SIGCONT)
            assert (found.damage, found.repaired) == ([], []), found
        enough.touch()
        assert host.result() >= 50


def test_the_scrubber_takes_a_leak_back_by_itself_and_counts_it() -> None:
    with running(coordinator=("--scrub-interval", "0.05", "--scrub-share", "0.2")) as fabric:
        fabric.host().call(allocate_and_free)
        leaked_pool_frame(fabric.name)
        fabric.wait_until(lambda audit: audit["nr_violations"] == 0)
        with fabric.client() as client:
            stats = client.stats()
        assert stats["scrubber"]["repaired"] == 1
        assert stats["scrubber"]["last"]["pool"] > 0


def allocate_and_free(at: At) -> None:
    buffer = at.host.ralloc(PAGE)
    del buffer


def test_the_scrubber_keeps_to_its_share_of_a_cpu() -> None:
    with running(
        size=64 << 20, coordinator=("--scrub-interval", "0.001", "--scrub-share", "0.02")
    ) as fabric:
        host = fabric.host()
        host.call(keep_pages, 100)

        def looked() -> dict[str, Any]:
            with fabric.client() as client:
                return dict(client.stats()["scrubber"])

        fabric.wait_until(lambda _: looked()["looks"] >= 5)
        done = looked()
        assert done["cpu_s"] <= 0.02 * done["wall_s"]
        host.call(drop_all)


def test_the_scrubber_can_be_switched_off() -> None:
    with running(coordinator=NO_SCRUBBING) as fabric:
        leaked_pool_frame(fabric.name)
        host = fabric.host()
        host.leave()
        with fabric.client() as client:
            assert client.stats()["scrubber"]["looks"] == 0
            found = client.check(repair=True)
        assert [one["repaired"] for one in found["suspects"]] == [True]


# ---------------------------------------------------------------- Refs that nobody holds


def make_orphan(name: str, holder: int) -> int:
    """Make a host that is not attached the holder of the only Ref there is. Returns its entry."""
    with device.open(name, writable=False) as opened:
        (ref,) = opened.refs()
        offset = opened.superblock["ref_table_off"] + 128 * ref["entry"]
    with open(device.path_of(name), "r+b") as file:
        file.seek(offset + 2)
        file.write(struct.pack("<H", holder))
    return int(ref["entry"])


def make_ref(at: At, kind: str) -> bytes:
    """Make a Ref, to a run of pages or to more runs than its entry holds, and give up what it was made of."""
    at.buffer = at.host.ralloc(40 * PAGE, lazy=kind == "overflow")
    for page in range(0, 40, 2):
        memoryview(at.buffer)[page * PAGE] = 7
    ref = at.host.create_ref(at.buffer, move=True)
    del at.buffer
    return ref.to_bytes()


def use_ref(at: At, wire: bytes) -> None:
    at.host.map_ref(wire)


@pytest.mark.parametrize("kind", ["one run", "overflow"])
@pytest.mark.parametrize("holder", [0, 7, 65535])
def test_a_ref_whose_holder_is_not_attached_is_reported_and_dropped(kind: str, holder: int) -> None:
    with running(coordinator=NO_SCRUBBING) as fabric:
        host = fabric.host()
        wire = host.call(make_ref, kind)
        entry = make_orphan(fabric.name, holder)
        text = f"Ref entry {entry} is held by host {holder}, which is not attached"
        audit = fabric.audit()
        assert [said for _, said in audit["violations"]] == [f"{text}: leaked"]
        status, found = run_fsck(fabric.name)
        assert status == fsck.DAMAGED
        assert found["damage"][0] == text
        status, found = run_fsck(fabric.name, "--repair")
        assert (status, found["damage"], found["repaired"][0]) == (fsck.REPAIRED, [], text)
        assert run_fsck(fabric.name)[0] == fsck.CLEAN
        assert fabric.assert_sound()["in_use"] == 0
        with pytest.raises(RefConsumed):
            host.call(use_ref, wire)


def test_the_scrubber_drops_a_ref_that_nobody_holds_by_itself() -> None:
    with running(coordinator=("--scrub-interval", "0.05", "--scrub-share", "0.2")) as fabric:
        fabric.host().call(make_ref, "overflow")
        make_orphan(fabric.name, 3)
        fabric.wait_until(lambda audit: audit["nr_violations"] == 0 and audit["in_use"] == 0)


def test_who_accepts_an_orphan_before_it_is_dropped_has_it() -> None:
    with running(coordinator=NO_SCRUBBING) as fabric:
        host, other = fabric.host(), fabric.host()
        wire = host.call(make_ref, "one run")
        make_orphan(fabric.name, 9)
        other.call(accept_ref, wire)
        assert run_fsck(fabric.name, "--repair")[0] == fsck.CLEAN
        assert fabric.assert_sound()["live_refs"] == 1
        other.call(drop_accepted)


def accept_ref(at: At, wire: bytes) -> None:
    at.ref = dmrpc_cxl.Ref.from_bytes(wire, at.host).accept()


def drop_accepted(at: At) -> None:
    at.ref.drop()


# ---------------------------------------------------------------- nobody is left


def test_what_a_fabric_leaves_whose_processes_are_all_gone_is_taken_back() -> None:
    fabric = Fabric()
    try:
        hosts = [fabric.host(name=f"h{number}") for number in range(2)]
        for host in hosts:
            host.call(keep_pages, 20)
            host.call(publish, f"service-{host.id}")
        fabric.coordinator.kill()
        fabric.coordinator.wait(30)
        for host in hosts:
            host.kill()
        set_count(fabric.name, 3000, 1)
        status, found = run_fsck(fabric.name)
        assert status == fsck.DAMAGED
        assert sum("is dead and not reclaimed" in text for text in found["damage"]) == 2
        status, found = run_fsck(fabric.name, "--repair")
        assert status == fsck.REPAIRED, found
        status, found = run_fsck(fabric.name)
        assert status == fsck.CLEAN
        assert found["accounting"]["pool"] == found["nr_frames"]
        assert found["accounting"]["live_refs"] == 0
        with device.open(fabric.name) as opened:
            assert opened.services() == []
        fabric.start_coordinator()  # and it can be used again
        fabric.hosts = []
    except BaseException:
        fabric.close(check=False)
        raise
    fabric.close()


def publish(at: At, name: str) -> None:
    at.host.publish(name, {"where": name})


def test_there_is_nothing_to_check_without_a_device() -> None:
    assert run_fsck("no-such-fabric")[0] == fsck.FAILED

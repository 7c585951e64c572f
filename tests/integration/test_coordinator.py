"""The coordinator as a process: starting, being the only one, being taken over from, stopping."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.coordinator.messages import HEADER, MAGIC, VERSION, MsgType, Status
from dmrpc_cxl.coordinator.refusals import Refused
from dmrpc_cxl.errors import CoordinatorLost
from dmrpc_cxl.fabric import topology
from tests.coordinators import SECONDS, CoordinatorProcess, coordinated


@pytest.fixture
def fabric(tmp_path):
    with coordinated(tmp_path, "--tcp", "127.0.0.1:0") as fabric:
        yield fabric


@pytest.fixture
def idle(tmp_path):
    """Make a device without a coordinator."""
    with coordinated(tmp_path, serve=False) as fabric:
        yield fabric


def refusal(*args):
    """Run a coordinator that must not start. Returns what it says."""
    coordinator = CoordinatorProcess(*args)
    assert coordinator.wait_ready() == ""
    assert coordinator.wait() == 1
    (line,) = [line for line in coordinator.log.splitlines() if line.startswith("dmrpc")]
    assert "Traceback" not in coordinator.log
    return line


# ---------------------------------------------------------------- starting and stopping


def test_the_superblock_says_who_serves_and_where(idle):
    line = idle.start("--tcp", "127.0.0.1:0")
    found = idle.device.superblock
    assert found["coordinator_pid"] == idle.coordinator.process.pid
    assert found["coordinator_epoch"] == 1
    assert found["unix_path"] == str(idle.socket)
    assert found["tcp_host"] == "127.0.0.1"
    assert line == (
        f"ready pid={found['coordinator_pid']} unix={idle.socket} "
        f"tcp=127.0.0.1:{found['tcp_port']}\n"
    )
    with idle.client() as over_unix, idle.client(tcp=True) as over_tcp:
        assert over_unix.epoch == over_tcp.epoch == 1


def test_without_a_socket_option_the_socket_is_where_tools_look_for_it(idle):
    coordinator = CoordinatorProcess(idle.name)
    try:
        coordinator.wait_ready()
        path = topology.socket_path(idle.name)
        assert idle.device.superblock["unix_path"] == path
        with Client.to(idle.name) as client:
            assert client.stats()["fabric"] == idle.name
        assert coordinator.stop() == 0
        assert not os.path.exists(path)
    finally:
        topology.remove_runtime_dirs(idle.name)
        coordinator.process.kill()
        coordinator.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_nothing_stays_behind(fabric, number):
    with fabric.client() as client:
        fabric.coordinator.send(number)
        assert fabric.coordinator.wait() == 0
        with pytest.raises(CoordinatorLost):
            client.stats()
    found = fabric.device.superblock
    assert (found["coordinator_pid"], found["unix_path"], found["tcp_port"]) == (0, "", 0)
    assert not fabric.socket.exists()
    with pytest.raises(CoordinatorLost):
        fabric.client()
    with open(f"/dev/shm/{fabric.name}", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_shutdown_request_is_answered_and_stops_it(fabric):
    with fabric.client() as client:
        client.shutdown()
    assert fabric.coordinator.wait() == 0
    assert fabric.device.superblock["coordinator_pid"] == 0


def test_whoever_waits_is_told_that_the_coordinator_stops(fabric):
    waiting = fabric.client()
    caught = []

    def wait():
        with pytest.raises(Refused) as error:
            waiting.wait_for_hosts(3, SECONDS)
        caught.append(error.value.status)

    thread = threading.Thread(target=wait)
    thread.start()
    fabric.wait_until(lambda: fabric.stats()["requests"].get("WAIT") == 1)
    assert fabric.coordinator.stop() == 0
    thread.join(SECONDS)
    assert caught == [Status.SHUTTING_DOWN]
    waiting.close()


# ---------------------------------------------------------------- being the only one


def test_a_second_coordinator_is_refused_and_the_first_goes_on(fabric, tmp_path):
    line = refusal(fabric.name, "--socket", str(tmp_path / "other.sock"))
    assert f"coordinator {fabric.coordinator.process.pid} serves fabric {fabric.name}" in line
    assert not (tmp_path / "other.sock").exists()
    assert fabric.stats()["epoch"] == 1


def test_of_several_that_start_at_once_one_serves(idle, tmp_path):
    racers = [
        CoordinatorProcess(idle.name, "--socket", str(tmp_path / f"{number}.sock"))
        for number in range(4)
    ]
    try:
        ready = [racer.wait_ready() for racer in racers]
        assert sum(map(bool, ready)) == 1
        winner = racers[ready.index(max(ready))]
        assert all(racer.wait() == 1 for racer in racers if racer is not winner)
        assert idle.device.superblock["coordinator_pid"] == winner.process.pid
        assert idle.device.superblock["coordinator_epoch"] == 1
        assert winner.stop() == 0
    finally:
        for racer in racers:
            racer.process.kill()
            racer.process.wait()


def test_a_killed_coordinator_is_taken_over_from(fabric):
    fabric.coordinator.kill()
    stale = fabric.device.superblock
    assert stale["coordinator_pid"] == fabric.coordinator.process.pid
    assert fabric.socket.exists()
    fabric.start()
    found = fabric.device.superblock
    assert found["coordinator_pid"] == fabric.coordinator.process.pid != stale["coordinator_pid"]
    assert fabric.stats()["epoch"] == found["coordinator_epoch"] == 2
    fabric.coordinator.logged("did not stop in order; taking over")


def test_a_stopped_coordinator_is_not_dead(fabric):
    fabric.coordinator.send(signal.SIGSTOP)
    try:
        assert "serves fabric" in refusal(fabric.name, "--socket", f"{fabric.socket}2")
    finally:
        fabric.coordinator.send(signal.SIGCONT)
    assert fabric.stats()["epoch"] == 1


def test_a_device_that_somebody_is_removing_is_not_served(idle):
    with open(f"/dev/shm/{idle.name}", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "somebody else" in refusal(idle.name, "--socket", str(idle.socket))


# ---------------------------------------------------------------- what can be wrong at the start


def test_a_missing_device_is_named_with_what_to_do(tmp_path):
    line = refusal("dmrpc-test-no-such", "--socket", str(tmp_path / "s"))
    assert "/dev/shm/dmrpc-test-no-such" in line
    assert "dmrpc fabric create" in line


def test_a_file_that_is_no_device_is_refused(tmp_path):
    path = Path(f"/dev/shm/dmrpc-test-{os.getpid()}-garbage")
    path.write_bytes(b"x" * 8192)
    try:
        assert "not a G-FAM device" in refusal(path.name, "--socket", str(tmp_path / "s"))
    finally:
        path.unlink()


def test_a_taken_tcp_port_is_reported_and_the_device_stays_free(idle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(idle.name, "--socket", str(idle.socket), "--tcp", f"127.0.0.1:{port}")
    assert f"cannot listen on TCP 127.0.0.1:{port}" in line
    assert "choose another port" in line
    assert not idle.socket.exists()
    assert idle.device.superblock["coordinator_epoch"] == 0
    idle.start()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_an_address_that_others_can_reach_is_refused_unless_it_is_meant(idle, address):
    assert "--tcp-anywhere" in refusal(idle.name, "--socket", str(idle.socket), "--tcp", address)


def test_an_address_that_others_can_reach_can_be_meant(idle):
    assert "tcp=0.0.0.0:" in idle.start("--tcp", "0.0.0.0:0", "--tcp-anywhere")


@pytest.mark.parametrize("address", ["127.0.0.1:x", "localhost:-1", ":70000", "127.0.0.1:"])
def test_a_tcp_address_that_is_none_is_refused(idle, address):
    assert "HOST:PORT" in refusal(idle.name, "--socket", str(idle.socket), "--tcp", address)


def test_a_socket_path_that_does_not_fit_is_refused(idle, tmp_path):
    line = refusal(idle.name, "--socket", str(tmp_path / ("x" * 108)))
    assert "at most 107 fit" in line
    assert "--socket" in line


def test_a_socket_path_that_is_taken_is_refused(idle, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "is no socket" in refusal(idle.name, "--socket", str(file))
    assert file.exists()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "theirs"))
        other.listen()
        assert "somebody else listens" in refusal(idle.name, "--socket", str(tmp_path / "theirs"))
    assert "cannot listen" in refusal(idle.name, "--socket", str(tmp_path / "no" / "folder"))


def test_a_socket_that_nobody_listens_at_is_replaced(idle):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(idle.socket))
    idle.start()
    assert idle.stats()["epoch"] == 1


def test_help_is_there_without_a_fabric():
    command = [sys.executable, "-m", "dmrpc_cxl.coordinator", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert "FABRIC" in done.stdout


# ---------------------------------------------------------------- introductions


@pytest.mark.parametrize("transport", [{}, {"tcp": True}])
def test_a_wrong_secret_or_fabric_is_denied_and_told_nothing(fabric, transport):
    found = fabric.device.superblock
    address = (found["tcp_host"], found["tcp_port"]) if transport else found["unix_path"]
    for fabric_id, secret in [
        (found["fabric_id"], bytes(32)),
        (found["fabric_id"] ^ 1, found["secret"]),
    ]:
        with pytest.raises(Refused) as caught:
            Client(address, fabric_id, secret)
        assert caught.value.status is Status.DENIED
    with fabric.client(**transport) as client:
        assert client.stats()["requests"]["HELLO"] == 3


@pytest.mark.parametrize("kind", sorted(set(MsgType) - {MsgType.HELLO}))
def test_nothing_is_answered_before_hello(fabric, kind):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(SECONDS)
        stranger.connect(str(fabric.socket))
        stranger.sendall(HEADER.pack(MAGIC, VERSION, kind, 0, 2, 1) + b"{}")
        answer = b"".join(iter(lambda: stranger.recv(4096), b""))
    assert HEADER.unpack_from(answer)[2:4] == (kind, Status.BAD_REQUEST)
    assert fabric.stats()["requests"].get(kind.name, 0) == (kind is MsgType.STATS)


def test_who_does_not_introduce_himself_is_cut_off_while_others_are_served(tmp_path):
    with coordinated(tmp_path, "--hello-timeout", "1") as fabric:
        silent, slow = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with silent, slow, fabric.client() as client:
            for stranger in (silent, slow):
                stranger.settimeout(SECONDS)
                stranger.connect(str(fabric.socket))
            slow.sendall(HEADER.pack(MAGIC, VERSION, MsgType.HELLO, 0, 40, 1) + b"half")
            assert client.stats()["epoch"] == 1
            assert silent.recv(1) == slow.recv(1) == b""
            assert client.stats()["epoch"] == 1  # who has introduced himself may be silent
        fabric.coordinator.logged("did not introduce itself in time", times=2)


def test_one_connection_too_many_is_closed_and_the_others_stay(tmp_path):
    with coordinated(tmp_path, "--max-connections", "2") as fabric:
        first, second = fabric.client(), fabric.client()
        with first:
            with second, pytest.raises(Refused, match="as many connections as it takes"):
                fabric.client()
            fabric.coordinator.logged("2 connections are open")
            assert first.stats()["epoch"] == 1
            fabric.wait_until(lambda: can_connect(fabric))


def can_connect(fabric):
    try:
        fabric.client().close()
    except Refused:
        return False
    return True

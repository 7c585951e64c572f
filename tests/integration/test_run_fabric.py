"""Real runs of scripts/run_fabric.sh: what they print, how they end, and that nothing is left of them.

Every process of a run inherits a mark in its environment, by which it is found afterwards, whoever its
parent is by then.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.topology import remove_runtime_dirs, runtime_dir

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = CHECKOUT / "scripts" / "run_fabric.sh"
SECONDS = 60
SMALL = ("--size", "16M")

# A host that is attached, says so, and waits for a signal.
WAITING = """
    import signal
    from dmrpc_cxl.fabric.place import Place, attach
    place = Place.of_environment()
    host = attach()
    array = host.array(range(100_000))
    ref = host.create_ref(array)
    print(f"waiting as {place.host_name} on {place.fabric}", flush=True)
    while True:
        signal.pause()
"""


class Run:
    """One run of the script."""

    def __init__(self, cwd: Path, *args: str) -> None:
        self.mark = f"DMRPC_TEST_MARK={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [SCRIPT, *args],
            cwd=cwd,
            env={**os.environ, name: value, "PYTHON": sys.executable},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.fabric = ""

    def wait_for(self, text: str, times: int = 1) -> str:
        """Read the output until that text was in so many lines; return the last of them."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r"on (run-\S+)", line)
            if found:
                self.fabric = found[1]
            times -= text in line
            if not times:
                return line
        raise AssertionError(f"{text!r} did not come:\n{self.output}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Read the rest of the output and return the exit status, as a shell counts it."""
        rest, _ = self.process.communicate(timeout=SECONDS)
        self.lines += rest.splitlines()
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def lines_of(self, name: str) -> list[str]:
        found = (re.fullmatch(rf"{name} *\| (.*)", line) for line in self.lines)
        return [match[1] for match in found if match]

    def pids(self) -> list[int]:
        """Return the processes of this run that are alive, the launcher among them."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                environ = Path(f"/proc/{int(entry)}/environ").read_bytes()
            except (ValueError, OSError):
                continue
            if self.mark.encode() in environ.split(b"\0"):
                found.append(int(entry))
        return found

    def kill(self) -> None:
        """End what a failed test has left."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start runs, in a folder of the test's own; when the test ends, nothing of them may be left."""
    before = set(device.names())
    runs: list[Run] = []

    def begin(*args: str, cwd: Path = tmp_path) -> Run:
        runs.append(Run(cwd, *args))
        return runs[-1]

    try:
        yield begin
        for run in runs:
            assert run.process.poll() is not None, "the test did not wait for its run"
            assert run.pids() == []
            assert run.fabric not in device.names()
            assert not run.fabric or not runtime_dir(run.fabric).exists()
    finally:
        for run in runs:
            run.kill()
        for name in set(device.names()) - before:
            if any(name == run.fabric for run in runs):
                device.remove(name, force=True)
                remove_runtime_dirs(name)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], str]:
    """Write Python programs into the folder that runs are started in; gives its file name."""
    names = (f"program_{number}.py" for number in itertools.count(1))

    def write(text: str, name: str = "") -> str:
        name = name or next(names)
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return write


# ---------------------------------------------------------------- success


def row_of(run: Run, name: str) -> tuple[str, str]:
    """Return what the client's table says by value and by reference."""
    for line in run.lines_of("client"):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0] == name:
            return cells[1], cells[2]
    raise AssertionError(f"no row {name!r}:\n{run.output}")


def edited_pictures(number: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what the first pictures of the demonstration have to become."""
    from examples.photos.picture import Edit, pictures

    for place, (name, pixels) in enumerate(itertools.islice(pictures(), number)):
        Edit.number(place, pixels.shape[0]).apply(pixels := pixels.copy())
        yield name, pixels


def test_demonstration_edits_photographs_by_reference_and_every_frame_comes_back(start, tmp_path):
    from PIL import Image

    run = start(*SMALL, "--", "--pictures", "6", "--out", str(tmp_path / "out"))
    assert run.end() == 0, run.output
    assert "all 4096 frames are back in the pool, and no Ref is alive" in run.output
    assert row_of(run, "pictures") == ("6", "6")
    for name, expected in edited_pictures(6):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), expected)


def test_demonstration_sends_pixels_by_value_and_none_by_reference(start, tmp_path):
    run = start(*SMALL, "--", "--pictures", "6", "--out", str(tmp_path))
    assert run.end() == 0, run.output
    by_value, by_reference = row_of(run, "sent in messages")
    assert by_value.endswith(" MiB")
    assert by_reference.endswith(" KiB")  # histograms, and 40 bytes for each picture
    assert row_of(run, "passed by Ref")[0] == row_of(run, "copied on write")[0] == "0 B"
    assert row_of(run, "faults")[0] == row_of(run, "frames copied")[0] == "0"
    assert row_of(run, "passed by Ref")[1].endswith(" MiB")
    assert row_of(run, "frames copied")[1] not in ("", "0")


def test_hosts_reach_the_coordinator_over_tcp(start, program):
    text = """
        from dmrpc_cxl.fabric import device
        from dmrpc_cxl.fabric.place import Place, attach
        place = Place.of_environment()
        with attach() as host, device.open(place.fabric) as opened:
            print(place.transport, bool(opened.superblock["tcp_port"]), host.array([7]).sum())
    """
    run = start(*SMALL, "--tcp", "--hosts", "2", "--program", program(text))
    assert run.end() == 0, run.output
    assert run.lines_of("host-1") == run.lines_of("host-2") == ["tcp True 7"]


def test_function_is_called_with_a_host_and_its_arguments(start, program):
    program(
        """
        import sys
        def main(host):
            print(host.name, sys.argv[1:], int(host.zeros(10).sum()))
        """,
        "greeting.py",
    )
    run = start(*SMALL, "--program", "left=greeting:main 'two words'")
    assert run.end() == 0, run.output
    assert run.lines_of("left") == ["left ['two words'] 0"]


def test_programs_find_their_place_in_the_environment(start):
    run = start(
        *SMALL,
        "--hosts",
        "2",
        "--program",
        "echo $DMRPC_HOST_NAME $DMRPC_HOST_INDEX/$DMRPC_NR_HOSTS",
    )
    assert run.end() == 0, run.output
    assert run.lines_of("host-1") == ["host-1 0/2"]
    assert run.lines_of("host-2") == ["host-2 1/2"]


def test_no_line_of_programs_that_write_at_once_is_lost_or_torn(start, program):
    text = """
        import os
        name = os.environ["DMRPC_HOST_NAME"]
        for number in range(5000):
            print(name, number, "x" * (number % 300))
    """
    run = start(*SMALL, "--hosts", "3", "--program", program(text))
    assert run.end() == 0, run.lines[-10:]
    for name in ("host-1", "host-2", "host-3"):
        expected = [f"{name} {number} {'x' * (number % 300)}" for number in range(5000)]
        assert run.lines_of(name) == expected


def test_two_runs_at_once_do_not_meet(start, program):
    name = program(WAITING)
    runs = [start(*SMALL, "--program", name) for _ in range(2)]
    for run in runs:
        run.wait_for("waiting as host-1")
    assert runs[0].fabric != runs[1].fabric
    for run in runs:
        assert {run.fabric} <= set(device.names())
        run.signal(signal.SIGTERM)
        assert run.end() == 143, run.output


def test_kept_device_is_there_afterwards_and_can_be_verified(start):
    run = start(*SMALL, "--keep", "--program", "echo on $DMRPC_FABRIC")
    assert run.end() == 0, run.output
    found = re.search(r"on (kept-\S+)", run.output)
    assert found
    try:
        frames = device.verify(found[1])
        assert frames["pool"] == frames["nr_frames"]
        assert not runtime_dir(found[1]).exists()
    finally:
        device.remove(found[1])


# ---------------------------------------------------------------- failures of hosts


def test_exit_status_is_that_of_the_host_that_failed(start, program):
    run = start(*SMALL, "--grace", "0.1", "--program", "exit 3", "--program", program(WAITING))
    assert run.end() == 3, run.output
    assert "host-1 ended with status 3" in run.output


def test_frames_of_a_killed_host_come_back_and_the_others_may_finish(start, program):
    survivor = """
        import sys
        from dmrpc_cxl.fabric.place import attach
        from dmrpc_cxl.coordinator.client import Client
        from dmrpc_cxl.coordinator.messages import MsgType
        with attach() as host:
            with Client.to(host.fabric) as coordinator:
                coordinator.wait_for_hosts(2, 30)
                print("both are here", flush=True)
                host.request(MsgType.PUBLISH, b'{"name": "go", "endpoint": 1}')
                while len(coordinator.hosts()) > 1:
                    pass
            host.zeros(1000)
            print("and I have finished")
    """
    victim = """
        import os, signal
        from dmrpc_cxl.fabric.place import attach
        from dmrpc_cxl.coordinator.client import Client
        host = attach()
        array = host.array(range(100_000))
        ref = host.create_ref(array)
        array[::512] += 1
        with Client.to(host.fabric) as coordinator:
            coordinator.wait_for_service("go", 30)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = start(
        *SMALL, "--keep-going",
        "--program", f"victim={program(victim)}", "--program", f"other={program(survivor)}",
    )  # fmt: skip
    assert run.end() == 137, run.output
    assert "victim was killed by SIGKILL" in run.output
    assert run.lines_of("other") == ["both are here", "and I have finished"]
    assert "all 4096 frames are back in the pool, and no Ref is alive" in run.output


def test_hosts_that_do_not_end_after_a_failure_are_stopped(start, program):
    run = start(
        *SMALL, "--grace", "0.2",
        "--program", "dead=kill -KILL $$", "--program", f"other={program(WAITING)}",
    )  # fmt: skip
    assert run.end() == 137, run.output
    assert "all 4096 frames are back" in run.output


def photos(workers: dict[str, str], *client: str) -> tuple[str, ...]:
    """Return the programs of the demonstration, workers with their options."""
    programs = [
        f"client=examples.photos.client:main {' '.join(client)}",
        f"balancer=examples.photos.balancer:main {' '.join(workers)}",
        *(f"{name}=examples.photos.worker:main {options}" for name, options in workers.items()),
    ]
    return tuple(word for program in programs for word in ("--program", program))


def test_edits_of_a_worker_that_dies_are_done_by_the_other_one(start, tmp_path):
    from PIL import Image

    workers = {"worker-1": "", "worker-2": "--die-at 3"}
    programs = photos(workers, "--pictures 8", f"--out {tmp_path}")
    run = start("--keep-going", *programs, cwd=CHECKOUT)
    assert run.end() == 137, run.output
    assert "worker-2 was killed by SIGKILL" in run.output
    assert re.search(r"client +\| a worker was lost: [1-9]\d* edits", run.output)
    assert row_of(run, "pictures") == ("8", "8")
    for name, expected in edited_pictures(8):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), expected)
    assert "frames are back in the pool, and no Ref is alive" in run.output


def test_client_says_so_when_its_last_worker_dies(start, tmp_path):
    programs = photos({"worker-1": "--die-at 12"}, f"--out {tmp_path}")
    run = start("--keep-going", *programs, cwd=CHECKOUT)
    assert run.end() == 137, run.output
    assert re.search(r"client +\| failed: \S+: .*no backend can be reached", run.output)
    assert "client ended with status 1" in run.output
    assert "frames are back in the pool, and no Ref is alive" in run.output


def test_balancer_and_workers_end_when_their_client_is_killed(start, tmp_path):
    text = """
        import os, signal
        from examples.photos import client
        class Deadly(client.Picture):
            def check(self, edited):
                print("dying with a result in hand")
                os.kill(os.getpid(), signal.SIGKILL)
        client.Picture = Deadly
        main = client.main
    """
    (tmp_path / "deadly.py").write_text(textwrap.dedent(text))
    _, _, *others = photos({"worker-1": "", "worker-2": ""})
    client = f"client=env PYTHONPATH={tmp_path}:{CHECKOUT} {sys.executable} -m dmrpc_cxl.fabric.call deadly:main"
    run = start("--keep-going", "--program", f"{client} --out {tmp_path}", *others, cwd=CHECKOUT)
    assert run.end() == 137, run.output
    assert "dying with a result in hand" in run.output
    assert run.lines_of("worker-1")[-1].endswith("pictures served")
    assert "frames are back in the pool, and no Ref is alive" in run.output


def test_interrupted_demonstration_leaves_nothing_behind(start, tmp_path):
    run = start("--", "--out", str(tmp_path))
    run.wait_for("all hosts are attached")
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.output
    assert "frames are back in the pool, and no Ref is alive" in run.output


def test_function_that_raises_fails_its_host_and_loses_no_frame(start, program):
    program(
        """
        def main(host):
            array = host.array(range(10_000))
            ref = host.create_ref(array)
            raise ValueError("oops")
        """,
        "failing.py",
    )
    run = start(*SMALL, "--program", "failing:main")
    assert run.end() == 1, run.output
    assert run.lines_of("host-1")[-1] == "ValueError: oops"
    assert "all 4096 frames are back" in run.output


def test_what_programs_leave_running_is_ended_with_them(start):
    command = "sleep 1000 & setsid sleep 1000 & setsid -f sleep 1000; exit 0"
    run = start(*SMALL, "--hosts", "2", "--program", command)
    assert run.end() == 0, run.output


# ---------------------------------------------------------------- signals and time


def test_interrupt_reaches_every_host_once(start, program):
    text = """
        import signal
        from dmrpc_cxl.fabric.place import attach
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in every thread, also later ones
        with attach() as host:
            print("waiting", flush=True)
            signal.sigwait({signal.SIGINT})
        print("left in order, signals pending:", len(signal.sigpending()))
    """
    run = start(*SMALL, "--hosts", "3", "--program", program(text))
    run.wait_for("waiting", times=3)
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.output
    for name in ("host-1", "host-2", "host-3"):
        assert run.lines_of(name)[-1] == "left in order, signals pending: 0"
    assert "all 4096 frames are back" in run.output


def test_terminated_launcher_stops_its_hosts_and_cleans_up(start, program):
    run = start(*SMALL, "--hosts", "2", "--program", program(WAITING))
    run.wait_for("waiting as", times=2)
    run.signal(signal.SIGTERM)
    assert run.end() == 143, run.output
    assert "all 4096 frames are back" in run.output


STUBBORN = """
    import signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: print("no"))
    print("waiting", flush=True)
    while True:
        signal.pause()
"""


def test_host_that_ignores_signals_is_killed_after_the_grace_period(start, program):
    run = start(*SMALL, "--grace", "0.2", "--program", f"deaf={program(STUBBORN)}")
    run.wait_for("waiting")
    run.signal(signal.SIGTERM)
    assert run.end() == 143, run.output
    assert "still there after 0.2 s, killed: deaf" in run.output
    assert run.lines_of("deaf")[-1] == "no"


def test_second_interrupt_kills_at_once(start, program):
    run = start(*SMALL, "--grace", "1000", "--program", f"deaf={program(STUBBORN)}")
    run.wait_for("waiting")
    run.signal(signal.SIGINT)
    run.wait_for("| no")
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.output


def test_run_ends_after_its_timeout(start, program):
    run = start(*SMALL, "--timeout", "0.5", "--program", program(WAITING))
    assert run.end() == 124, run.output


def test_run_stops_when_nobody_reads_its_output(start):
    run = start(*SMALL, "--program", "while true; do echo line; done")
    run.wait_for("line")
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert run.process.wait(SECONDS) == 128 + signal.SIGPIPE


# ---------------------------------------------------------------- crashes of the fabric's own processes


def coordinator_of(fabric: str) -> int:
    with device.open(fabric, writable=False) as opened:
        return int(opened.superblock["coordinator_pid"])


def wait_until(true) -> None:
    give_up = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def epoch_of(fabric: str) -> int:
    with device.open(fabric, writable=False) as opened:
        return int(opened.superblock["coordinator_epoch"])


# Ends by itself when a third coordinator serves; until then it allocates from what it has.
WAITING_FOR_THREE = """
import time
from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.place import Place, attach
with attach() as host:
    print("waiting as", host.id, "on", Place.of_environment().fabric, flush=True)
    with device.open(Place.of_environment().fabric, writable=False) as opened:
        while opened.epoch < 3 or not opened.superblock["coordinator_pid"]:
            buffer = host.ralloc(4096)
            del buffer
            time.sleep(0.001)
"""


def test_killed_coordinator_is_started_again_and_hosts_do_not_notice(start, program):
    run = start(*SMALL, "--hosts", "2", "--program", program(WAITING_FOR_THREE))
    run.wait_for("waiting as", times=2)
    for epoch in (1, 2):
        pid = coordinator_of(run.fabric)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: coordinator_of(run.fabric) not in (0, pid))
        assert epoch_of(run.fabric) == epoch + 1
    assert run.end() == 0, run.output
    assert run.output.count("the coordinator was killed by SIGKILL: started again") == 2
    assert "frames are back in the pool" in run.output


def test_coordinator_that_dies_again_and_again_is_given_up(start, program):
    run = start(*SMALL, "--hosts", "2", "--program", program(WAITING))
    run.wait_for("waiting as", times=2)
    pid = 0
    for _ in range(5):
        wait_until(lambda pid=pid: coordinator_of(run.fabric) not in (0, pid))
        pid = coordinator_of(run.fabric)
        os.kill(pid, signal.SIGKILL)
    assert run.end() == 137, run.output
    assert "it died 5 times in a row" in run.output


def test_killed_coordinator_stops_everything_if_it_is_not_to_be_started_again(start, program):
    run = start(*SMALL, "--no-restart", "--hosts", "2", "--program", program(WAITING))
    run.wait_for("waiting as", times=2)
    os.kill(coordinator_of(run.fabric), signal.SIGKILL)
    assert run.end() == 137, run.output
    assert "the coordinator was killed by SIGKILL" in run.output


def test_coordinator_that_cannot_start_fails_the_run_before_any_host(start, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    fabric = f"run-fabric-test-{os.getpid()}"
    folder = runtime_dir(fabric)
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.symlink_to(blocked)
    try:
        run = start(*SMALL, "--fabric", fabric, "--program", "echo started")
        assert run.end() == 1, run.output
    finally:
        folder.unlink()
    assert "the coordinator ended with status 1" in run.output
    assert "started" not in run.output
    assert fabric not in device.names()


def test_name_that_is_taken_is_refused_and_its_device_untouched(start):
    fabric = f"run-fabric-test-{os.getpid()}"
    device.create(fabric, size=1 << 20)
    try:
        run = start(*SMALL, "--fabric", fabric, "--program", "echo started")
        assert run.end() == 1
        assert "DeviceExists" in run.output
        assert fabric in device.names()
    finally:
        device.remove(fabric)


def test_killed_launcher_takes_everybody_along_and_the_next_run_removes_the_rest(start, program):
    killed = start(*SMALL, "--hosts", "2", "--program", program(WAITING))
    killed.wait_for("waiting as", times=2)
    pids = killed.pids()
    assert len(pids) == 4, killed.output  # launcher, coordinator, two hosts
    pidfds = [os.pidfd_open(pid) for pid in pids]
    killed.signal(signal.SIGKILL)
    assert killed.end() == 137
    give_up = time.monotonic() + SECONDS
    for pidfd in pidfds:
        readable, _, _ = select.select([pidfd], [], [], max(0.0, give_up - time.monotonic()))
        os.close(pidfd)
        assert readable, "a process has outlived its launcher"

    following = start(*SMALL, "--program", "true")
    assert following.end() == 0, following.output
    assert killed.fabric not in device.names()  # `start` looks for the rest

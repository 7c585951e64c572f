"""Real runs of scripts/run_fabric.sh: what they print, how they end, and that nothing is left of them.

What it runs by default, and the other examples: test_run_examples.py.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time

import psutil

from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.topology import runtime_dir
from tests.runs import SECONDS, SMALL

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


# ---------------------------------------------------------------- success


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


def test_hosts_that_emulate_a_slower_device_say_how_well(start, program):
    text = """
        from dmrpc_cxl.fabric.place import attach
        with attach() as host:
            print(round(host.latency.extra_ns))
    """
    run = start(*SMALL, "--latency", "+190ns", "--program", program(text))
    assert run.end() == 0, run.output
    said, extra = run.lines_of("host-1")
    assert re.fullmatch(
        r"latency \+190ns emulated: 190 ns more for a line .*; error [+-]\d+\.\d%", said
    )
    assert extra == "190"


def _layouts_of(start, program, *options):
    text = """
        import ctypes
        print(hex(ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "PyFloat_Type"))))
    """
    run = start(*SMALL, *options, "--hosts", "3", "--program", program(text))
    assert run.end() == 0, run.output
    return [run.lines_of(f"host-{i}")[0] for i in (1, 2, 3)]


def test_programs_lie_at_the_same_addresses_if_that_is_asked_for(start, program):
    assert len(set(_layouts_of(start, program, "--same-layout"))) == 1
    assert len(set(_layouts_of(start, program))) == 3


# As in containers: personality() is not permitted, everything else is.
FORBIDDING = """
    import ctypes, os, sys
    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
    number = {"x86_64": 135, "aarch64": 92}[os.uname().machine]
    filters = (Filter * 4)((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(4, filters))) == 0, os.strerror(ctypes.get_errno())
    os.execv(sys.argv[1], sys.argv[1:])
"""


def test_what_to_do_is_said_where_the_same_layout_is_not_permitted(program, tmp_path):
    command = [
        sys.executable,
        str(tmp_path / program(FORBIDDING)),
        sys.executable,
        "-m",
        "dmrpc_cxl.fabric",
        "run",
    ]
    done = subprocess.run(
        [*command, *SMALL, "--same-layout", "--program", "true"],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert "leave --same-layout away" in done.stderr, done
    assert "Traceback" not in done.stderr, done


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


# ---------------------------------------------------------------- memory servers

# The first host puts something, the second one waits for it and gets it.
BY_MEMORY = """
    import os, time
    from pathlib import Path
    import dmrpc_net
    place = Path(os.environ["DMRPC_RUNTIME_DIR"]) / "ref"
    with dmrpc_net.attach() as client:
        if os.environ["DMRPC_HOST_INDEX"] == "0":
            ref = client.put(b"x" * 100_000)
            (place.parent / "draft").write_bytes(ref.to_bytes())
            (place.parent / "draft").rename(place)
            while client.ref_is_held(ref):
                time.sleep(0.01)
        else:
            while not place.exists():
                time.sleep(0.01)
            print(client.nr_servers, len(client.get(place.read_bytes())))
"""


def test_programs_find_the_memory_servers_of_their_run_and_every_page_is_counted(start, program):
    run = start(
        *SMALL, "--memory-servers", "2", "--memory-size", "16M", "--hosts", "2",
        "--program", program(BY_MEMORY),
    )  # fmt: skip
    assert run.end() == 0, run.output
    assert run.lines_of("host-2") == ["2 100000"]
    assert re.search(r"all \d+ pages of the memory servers are free", run.output)


def test_a_memory_server_that_dies_ends_the_run(start, program):
    text = """
        import os, signal
        import dmrpc_net
        client = dmrpc_net.attach()
        print("attached", flush=True)
        signal.pause()
    """
    run = start(*SMALL, "--memory-servers", "1", "--memory-size", "16M", "--program", program(text))
    run.wait_for("attached")
    (server,) = [
        process
        for process in psutil.Process(run.process.pid).children(recursive=True)
        if "dmrpc_net.server" in process.cmdline()
    ]
    server.kill()
    assert run.end() == 137, run.output
    assert "memory-0 was killed by SIGKILL" in run.output

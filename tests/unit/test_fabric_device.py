"""Creating, opening, inspecting and removing devices: real files in /dev/shm, real processes in them."""

import contextlib
import errno
import gc
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dmrpc_cxl import errors
from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.fabric import device, liveness, topology

PAGE_SIZES = (4096, 16384, 65536)
SMALL: dict[str, Any] = {"size": 1 << 20, "max_hosts": 4, "max_refs": 32}
TIMEOUT = 60


def shm():
    return set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch):
    """After every test: no device, no socket directory, no descriptor that was not there before."""
    runtime = Path(tempfile.mkdtemp(prefix="dm-"))  # pytest's own are too long for sockets
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    gc.collect()  # what other tests left to the garbage collector is not ours to count
    descriptors = len(os.listdir("/proc/self/fd"))
    mine = f"dmrpc-test-{os.getpid()}-"
    before = {
        name for name in shm() if name.startswith(mine)
    }  # fabrics that stand for several tests
    yield
    assert {name for name in shm() if name.startswith(mine)} == before
    runtime.rmdir()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture
def name(nothing_is_left_behind):
    """Choose a name that nobody else uses; what has it at the end is removed."""
    chosen = f"dmrpc-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield chosen
    Path(f"/dev/shm/{chosen}").unlink(missing_ok=True)
    topology.remove_runtime_dirs(chosen)


@pytest.fixture
def made(name):
    """Make a small device; its name."""
    device.create(name, **SMALL)
    return name


class Program:
    """A Python program in a process of its own, which is told what to do, and when, through pipes."""

    def __init__(self, code, *args):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def expect(self, line):
        """Wait for it to print that line."""
        assert self.stdout.readline() == line + "\n"

    def let_go(self):
        """Give it the line that it waits for."""
        self.stdin.write("go\n")
        self.stdin.flush()

    def output(self):
        """Wait for its end; the rest of what it printed."""
        text, _ = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0
        return text.strip()

    def close(self):
        self.process.kill()
        self.process.communicate()


class Sleeper(Program):
    """A live process that does nothing."""

    def __init__(self):
        super().__init__("import sys; print('up', flush=True); sys.stdin.read()")
        self.expect("up")
        started = liveness.start_time(self.pid)
        assert started is not None
        self.start_time = started

    def end_unreaped(self):
        """End, but stay a zombie."""
        self.stdin.close()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture
def sleeper():
    with Sleeper() as process:
        yield process


def enter_coordinator(name, pid, start_time):
    with device.open(name) as opened:
        opened.start_coordinator(pid, start_time, "", "", 0)


def enter_host(name, pid, start_time):
    with device.open(name) as opened:
        opened.activate_host(1, pid, start_time, 1, "tester", 0)


def allocated_bytes(name):
    return device.path_of(name).stat().st_blocks * 512


# ---------------------------------------------------------------- create


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_created_device_is_what_was_asked_for(name, page_size):
    path = device.create(name, size=40 * page_size, page_size=page_size, max_hosts=3, max_refs=17)
    assert path == Path("/dev/shm") / name
    with device.open(name) as opened:
        found = opened.superblock
        assert found["name"] == name
        assert (found["nr_frames"], found["page_size"]) == (40, page_size)
        assert (found["max_hosts"], found["max_refs"]) == (3, 17)
        assert opened.free_runs(LAYOUT["OWNER_POOL"]) == [(0, 40)]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_size_is_rounded_up_to_whole_frames(name, page_size):
    device.create(name, size=3 * page_size + 1, page_size=page_size)
    with device.open(name) as opened:
        assert opened.superblock["nr_frames"] == 4


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_device_is_for_its_user_only_whatever_the_umask(name, umask):
    before = os.umask(umask)
    try:
        path = device.create(name, **SMALL)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_device_occupies_its_frames_from_the_start(name, page_size):
    device.create(name, size=64 * page_size, page_size=page_size)
    with device.open(name) as opened:
        tables = opened.superblock["page_table_off"]
    assert allocated_bytes(name) == tables + 64 * page_size


def test_sparse_device_occupies_its_tables_only(name):
    device.create(name, **SMALL, preallocate=False)
    with device.open(name) as opened:
        tables = opened.superblock["page_table_off"]
    assert allocated_bytes(name) == tables


@pytest.mark.parametrize("preallocate", [True, False])
def test_prefault_touches_every_frame_and_reports_it(name, preallocate, monkeypatch):
    monkeypatch.setattr(device, "STEP_BYTES", 256 << 10)
    steps = []
    device.create(
        name,
        **SMALL,
        preallocate=preallocate,
        prefault=True,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(done << 18, 1 << 20) for done in range(1, 5)]
    fd = os.open(device.path_of(name), os.O_RDONLY)
    try:
        with device.open(name) as opened:
            data_off = opened.superblock["data_off"]
        # shmem counts a page as data once it has been zeroed for use
        assert os.lseek(fd, data_off, os.SEEK_DATA) == data_off
        assert os.lseek(fd, data_off, os.SEEK_HOLE) == data_off + (1 << 20)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"size": 0}, errors.BadSize),
        ({"size": -1}, errors.BadSize),
        ({"page_size": 0}, errors.BadSize),
        ({"page_size": -4096}, errors.BadSize),
        ({"page_size": 8192}, errors.BadSize),
        ({"page_size": 2048}, errors.BadSize),
        ({"max_hosts": 0}, errors.BadSize),
        ({"max_hosts": 1025}, errors.BadSize),
        ({"max_refs": -5}, errors.BadSize),
        ({"size": 2**60}, errors.BadSize),
    ],
)
def test_impossible_device_is_refused_and_none_is_made(name, bad, error):
    with pytest.raises(error):
        device.create(name, **bad)
    assert name not in shm()


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "/a", "-x", "a b", "ä", "a\n", "x" * 64])
def test_name_that_is_no_name_is_refused_everywhere(bad):
    for use in (device.create, device.open, device.inspect, device.verify, device.remove):
        with pytest.raises(errors.MisuseError, match="fabric name"):
            use(bad)


def test_longest_name_works(name):
    longest = name + "x" * (LAYOUT["NAME_BYTES"] - 1 - len(name))
    device.create(longest, **SMALL)
    with device.open(longest) as opened:
        assert opened.superblock["name"] == longest
    device.remove(longest)


def test_device_larger_than_shm_is_refused_at_once(name):
    status = os.statvfs("/dev/shm")
    too_much = (status.f_bavail + 1) * status.f_frsize
    with pytest.raises(errors.DeviceFull, match="MiB free") as caught:
        device.create(name, size=too_much)
    assert caught.value.errno == errno.ENOSPC


# ---------------------------------------------------------------- a full /dev/shm, in a mount namespace of its own

IN_SMALL_SHM = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
MOUNT = "mount -t tmpfs -o size=12m tmpfs /dev/shm && exec "


def in_small_shm(code, *args):
    """Run a program that has a /dev/shm of 12 MiB to itself; its output."""
    command = [
        *IN_SMALL_SHM,
        MOUNT + '"$0" "$@"',
        sys.executable,
        "-c",
        textwrap.dedent(code),
        *args,
    ]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def may_mount():
    done = subprocess.run(
        [*IN_SMALL_SHM, MOUNT + "true"], capture_output=True, timeout=TIMEOUT, check=False
    )
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")


@needs_mount
@pytest.mark.parametrize("step", ["check", "fallocate frames", "fallocate tables"])
def test_full_shm_is_reported_by_create_and_gives_back_everything(step):
    out = in_small_shm(
        """
        import os, sys
        from dmrpc_cxl import errors
        from dmrpc_cxl.fabric import device
        step = sys.argv[1]
        if step != "check":
            device._check_room = lambda needed: None    # somebody else was quicker
        # Tables of these need about 5 MiB, or 17 MiB.
        refs = 32768 if step != "fallocate tables" else 131072
        try:
            device.create("full", size=10 << 20, max_refs=refs, preallocate=step != "fallocate tables")
        except errors.DeviceFull as error:
            print(type(error).__name__, error.errno)
        status = os.statvfs("/dev/shm")
        print(status.f_bfree == status.f_blocks, os.listdir("/dev/shm") == [])
        """,
        step,
    )
    assert out == ["DeviceFull", str(errno.ENOSPC), "True", "True"]


@needs_mount
def test_full_shm_is_reported_by_activation_and_gives_back_everything():
    out = in_small_shm(
        """
        import os
        from dmrpc_cxl import errors
        from dmrpc_cxl._native import LAYOUT
        from dmrpc_cxl.fabric import device
        device.create("full", size=16 << 20, max_hosts=64, max_refs=32, preallocate=False)
        with device.open("full") as opened:
            before, active = None, 0
            try:
                for host in range(1, 65):
                    before = os.statvfs("/dev/shm").f_bfree
                    opened.activate_host(host, os.getpid(), 0, host, "x", 0)
                    active += 1
            except errors.DeviceFull as error:
                print(type(error).__name__, "activate_host" in str(error))
            print(1 < active < 64, len(opened.hosts()) == active)
            print(os.statvfs("/dev/shm").f_bfree == before)
            # An entry that had a host once can have another one, however full it is.
            opened.set_host_state(1, LAYOUT["HOST_ACTIVE"], LAYOUT["HOST_FREE"])
            with open("/dev/shm/filler", "wb", buffering=0) as filler:
                try:
                    while filler.write(bytes(65536)):
                        pass
                except OSError:
                    pass
            opened.activate_host(1, os.getpid(), 0, 99, "x", 0)
            print(opened.host(1)["incarnation"], opened.audit()["nr_violations"])
        """
    )
    assert out == ["DeviceFull", "True", "True", "True", "True", "99", "0"]


@needs_mount
def test_full_shm_is_reported_by_prefault_of_a_sparse_device():
    out = in_small_shm(
        """
        from dmrpc_cxl import errors
        from dmrpc_cxl.fabric import device
        device.create("full", size=32 << 20, max_refs=32, preallocate=False)
        with device.open("full") as opened:
            try:
                opened.prefault(0, 8192)
            except errors.DeviceFull as error:
                print(type(error).__name__)
        """
    )
    assert out == ["DeviceFull"]


# ---------------------------------------------------------------- interrupted creation


def test_interrupt_while_creating_leaves_nothing_behind(name):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before = os.statvfs("/dev/shm").f_bfree
    with pytest.raises(KeyboardInterrupt):
        device.create(name, **SMALL, prefault=True, progress=interrupt)
    assert name not in shm()
    assert os.statvfs("/dev/shm").f_bfree >= before


def test_kill_while_creating_leaves_nothing_behind(name):
    code = """
        import sys
        from dmrpc_cxl.fabric import device
        def stop(done, total):
            print("half way", flush=True)
            sys.stdin.read()
        device.create(sys.argv[1], size=1 << 20, prefault=True, progress=stop)
    """
    with Program(code, name) as child:
        child.expect("half way")
        assert name not in shm()  # it has no name before it is complete
        child.process.send_signal(signal.SIGKILL)
        assert child.process.wait(TIMEOUT) == -signal.SIGKILL
    assert name not in shm()


def test_one_of_many_concurrent_creators_wins(name):
    code = """
        import sys
        from dmrpc_cxl import errors
        from dmrpc_cxl.fabric import device
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            device.create(sys.argv[1], size=1 << 20)
            print("made")
        except errors.DeviceExists:
            print("exists")
    """
    outcomes = concurrently(code, name, 4)
    assert sorted(outcomes) == ["exists", "exists", "exists", "made"]
    device.remove(name)


def test_concurrent_overwriters_never_remove_each_others_device(made):
    """Whoever succeeded last has the name: a device that was made is never lost."""
    code = """
        import sys
        from dmrpc_cxl import errors
        from dmrpc_cxl.fabric import device
        print("ready", flush=True)
        sys.stdin.readline()
        made = 0
        for _ in range(50):
            try:
                device.create(sys.argv[1], size=4096, max_refs=1, overwrite=True)
                made += 1
            except errors.DeviceExists:
                pass
        print(made)
    """
    outcomes = concurrently(code, made, 3)
    assert sum(map(int, outcomes)) >= 50
    assert device.verify(made)["nr_violations"] == 0
    device.remove(made)


def concurrently(code, name, count):
    """Run a program several times at once; what each prints after they were let go together."""
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(Program(code, name)) for _ in range(count)]
        for program in programs:
            program.expect("ready")
        for program in programs:
            program.let_go()
        return [program.output() for program in programs]


# ---------------------------------------------------------------- existing devices


def fabric_id(name):
    with device.open(name, writable=False) as opened:
        return opened.superblock["fabric_id"]


def test_existing_device_is_not_replaced_unasked(made):
    before = fabric_id(made)
    with pytest.raises(errors.DeviceExists, match="exists"):
        device.create(made, **SMALL)
    assert fabric_id(made) == before
    device.remove(made)


def test_device_without_inhabitants_can_be_overwritten(made):
    before = fabric_id(made)
    device.create(made, **SMALL, overwrite=True)
    assert fabric_id(made) != before
    device.remove(made)


def test_overwrite_of_nothing_creates(name):
    device.create(name, **SMALL, overwrite=True)
    device.remove(name)


@pytest.mark.parametrize("enter", [enter_coordinator, enter_host])
def test_device_with_a_live_inhabitant_is_neither_overwritten_nor_removed(made, sleeper, enter):
    enter(made, sleeper.pid, sleeper.start_time)
    before = fabric_id(made)
    for attempt in (
        lambda: device.create(made, **SMALL, overwrite=True),
        lambda: device.remove(made),
    ):
        with pytest.raises(errors.DeviceExists, match=f"pid {sleeper.pid}"):
            attempt()
    assert fabric_id(made) == before
    sleeper.close()
    device.remove(made)


@pytest.mark.parametrize("enter", [enter_coordinator, enter_host])
def test_device_of_a_reused_pid_is_free(made, sleeper, enter):
    enter(made, sleeper.pid, sleeper.start_time - 1)
    device.create(made, **SMALL, overwrite=True)
    device.remove(made)


@pytest.mark.parametrize("enter", [enter_coordinator, enter_host])
def test_process_that_ended_and_was_not_waited_for_is_dead(made, sleeper, enter):
    enter(made, sleeper.pid, sleeper.start_time)
    sleeper.end_unreaped()
    assert liveness.start_time(sleeper.pid) == sleeper.start_time  # still in /proc
    device.remove(made)


def test_process_whose_main_thread_ended_lives_on():
    code = """
        import ctypes, sys, threading
        def rest():
            print("ready", flush=True)
            sys.stdin.read()
        threading.Thread(target=rest).start()
        ctypes.CDLL(None).pthread_exit(None)
    """
    with Program(code) as child:
        child.expect("ready")
        started = liveness.start_time(child.pid)
        assert started is not None
        assert liveness.is_alive(child.pid, started)


def test_locked_device_is_neither_overwritten_nor_removed(made):
    """The coordinator holds the lock for its life; its pid may be of another namespace."""
    code = """
        import fcntl, sys
        file = open("/dev/shm/" + sys.argv[1])
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.read()
    """
    with Program(code, made) as holder:
        holder.expect("locked")
        for attempt in (
            lambda: device.create(made, **SMALL, overwrite=True),
            lambda: device.remove(made),
        ):
            with pytest.raises(errors.DeviceExists, match="locked"):
                attempt()
        device.remove(made, force=True)


def damage(name, kind):
    path = device.path_of(name)
    with path.open("r+b") as file:
        if kind == "truncated":
            file.truncate(path.stat().st_size - 4096)
        elif kind == "other version":
            file.seek(8)
            file.write(b"\x63")
        else:
            file.seek(100)
            file.write(b"scribble")


DAMAGE = {
    "truncated": errors.DeviceTruncated,
    "other version": errors.DeviceVersionMismatch,
    "corrupt": errors.DeviceCorrupt,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_device_is_refused_by_name_until_it_is_removed_by_force(made, kind):
    damage(made, kind)
    for use in (
        device.open,
        device.inspect,
        device.verify,
        device.remove,
        lambda name: device.create(name, **SMALL, overwrite=True),
    ):
        with pytest.raises(DAMAGE[kind], match=f"/dev/shm/{made}"):
            use(made)
    assert made in shm()
    assert device.status_of(made) == (DAMAGE[kind].__name__, [])
    device.remove(made, force=True)
    assert made not in shm()


def test_refusal_to_overwrite_a_damaged_device_says_what_to_do(made):
    damage(made, "corrupt")
    with pytest.raises(errors.DeviceCorrupt, match=f"dmrpc fabric remove --force {made}"):
        device.create(made, **SMALL, overwrite=True)
    device.remove(made, force=True)


def test_foreign_file_is_not_removed_even_by_force(name):
    path = Path("/dev/shm") / name
    path.write_bytes(b"somebody's data")
    for use in (
        device.open,
        lambda name: device.create(name, **SMALL, overwrite=True),
        device.remove,
        lambda name: device.remove(name, force=True),
    ):
        with pytest.raises(errors.NotADevice):
            use(name)
    assert path.read_bytes() == b"somebody's data"
    assert name not in device.names()


def test_missing_device_is_not_found(name):
    for use in (device.open, device.inspect, device.verify, device.remove):
        with pytest.raises(errors.DeviceNotFound, match=f"/dev/shm/{name}"):
            use(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_device_of_another_user_is_refused(made):
    code = """
        import os, sys
        from dmrpc_cxl import errors
        from dmrpc_cxl.fabric import device
        os.setgid(65534)
        os.setuid(65534)
        try:
            device.open(sys.argv[1])
        except errors.SystemCallFailed as error:
            print(error.errno, sys.argv[1] in str(error))
    """
    with Program(code, made) as other:
        assert other.output().split() == [str(errno.EACCES), "True"]
    device.remove(made)


# ---------------------------------------------------------------- remove


def test_removal_takes_the_socket_directory_along(made):
    directory = topology.make_runtime_dir(made)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "coordinator.sock"))
    device.remove(made)
    assert made not in shm()
    assert not directory.exists()


def test_removal_takes_along_the_socket_of_a_killed_coordinator(made, tmp_path):
    path = tmp_path / "elsewhere.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with device.open(made) as opened:
        opened.start_coordinator(1, 1, str(path), "", 0)  # pid 1 did not start then
    device.remove(made)
    assert not path.exists()


def test_forced_removal_of_a_live_fabric_leaves_its_inhabitants_their_memory(made, sleeper):
    enter_host(made, sleeper.pid, sleeper.start_time)
    with device.open(made) as opened:
        device.remove(made, force=True)
        assert made not in shm()
        assert opened.transfer(0, 4, LAYOUT["OWNER_POOL"], 1) == 4
        assert opened.audit()["nr_violations"] == 0


def test_second_removal_is_not_found(made):
    device.remove(made)
    with pytest.raises(errors.DeviceNotFound):
        device.remove(made)


# ---------------------------------------------------------------- look


def test_report_is_plain_data_without_the_secret(made, sleeper):
    enter_host(made, sleeper.pid, sleeper.start_time)
    enter_coordinator(made, os.getpid(), liveness.start_time(os.getpid()))
    with device.open(made) as opened:
        secret = opened.superblock["secret"]
    report = device.inspect(made)
    text = json.dumps(asdict(report))
    assert secret.hex() not in text
    assert "secret" not in text
    assert report.coordinator["alive"]
    assert (report.coordinator["pid"], report.coordinator["epoch"]) == (os.getpid(), 1)
    (host,) = report.hosts
    assert (host["pid"], host["alive"], host["name"]) == (sleeper.pid, True, "tester")
    assert [one.role for one in report.inhabitants] == ["coordinator", "host"]
    device.remove(made, force=True)


def test_report_tells_the_dead_from_the_living(made, sleeper):
    enter_host(made, sleeper.pid, sleeper.start_time)
    sleeper.close()
    (host,) = device.inspect(made).hosts
    assert not host["alive"]
    device.remove(made)


def test_looking_changes_nothing(made):
    path = device.path_of(made)
    before, occupied = path.read_bytes(), allocated_bytes(made)
    device.inspect(made)
    device.verify(made)
    device.status_of(made)
    assert allocated_bytes(made) == occupied
    assert path.read_bytes() == before
    device.remove(made)


def test_leaked_frame_is_found_and_named(made):
    with device.open(made) as opened:
        frame_table_off = opened.superblock["frame_table_off"]
    with device.path_of(made).open("r+b") as file:
        file.seek(frame_table_off + 8 * 77)
        file.write((1).to_bytes(8, "little"))
    found = device.verify(made)
    assert found["nr_violations"] == 1
    assert found["violations"] == [
        (77, "refcount of frame 77 is 1, but mappings and Refs hold 0: leaked")
    ]
    device.remove(made)


def test_names_lists_devices_and_nothing_else(made):
    assert made in device.names()
    assert all((Path("/dev/shm") / name).is_file() for name in device.names())
    damage(made, "corrupt")
    assert made in device.names()
    device.remove(made, force=True)
    assert made not in device.names()

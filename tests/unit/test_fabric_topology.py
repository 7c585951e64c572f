"""Names, socket directories and what a launcher is told to start."""

import os
import stat

import pytest

from dmrpc_cxl import errors
from dmrpc_cxl.fabric import topology
from dmrpc_cxl.fabric.topology import HostSpec, Program, Topology


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path


# ---------------------------------------------------------------- directories


def test_runtime_dir_is_below_xdg_runtime_dir(runtime):
    assert topology.runtime_dir("f") == runtime / "dmrpc" / "f"


@pytest.mark.parametrize("value", ["", "relative/path", "/no/such/directory", "/etc/passwd"])
def test_runtime_dir_is_in_tmp_where_xdg_runtime_dir_is_of_no_use(monkeypatch, value):
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert str(topology.runtime_dir("f")) == f"/tmp/dmrpc-{os.getuid()}/f"


def test_runtime_dir_is_for_its_user_only_whatever_the_umask(runtime):
    before = os.umask(0)
    try:
        path = topology.make_runtime_dir("f")
    finally:
        os.umask(before)
    for made in (path, path.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert topology.make_runtime_dir("f") == path  # a second time: the same one


def test_runtime_dir_that_others_may_enter_is_refused(runtime):
    (runtime / "dmrpc").mkdir()
    (runtime / "dmrpc").chmod(0o755)
    with pytest.raises(errors.EnvironmentFault, match="chmod 700"):
        topology.make_runtime_dir("f")


def test_runtime_dir_that_is_a_link_is_refused(runtime, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (runtime / "dmrpc").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.EnvironmentFault, match="not a directory of user"):
        topology.make_runtime_dir("f")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_runtime_dir_of_another_user_is_refused_and_not_removed(runtime):
    (runtime / "dmrpc").mkdir(mode=0o700)
    (runtime / "dmrpc" / "f").mkdir(mode=0o700)
    os.chown(runtime / "dmrpc" / "f", 65534, 65534)
    with pytest.raises(errors.EnvironmentFault, match="not a directory of user"):
        topology.make_runtime_dir("f")
    topology.remove_runtime_dirs("f")
    assert (runtime / "dmrpc" / "f").is_dir()


def test_removal_leaves_other_fabrics_alone(runtime):
    topology.make_runtime_dir("one")
    topology.make_runtime_dir("two")
    topology.remove_runtime_dirs("one")
    assert [path.name for path in (runtime / "dmrpc").iterdir()] == ["two"]
    topology.remove_runtime_dirs("two")
    assert list(runtime.iterdir()) == []
    topology.remove_runtime_dirs("two")


def test_longest_socket_path_can_be_bound_and_one_more_byte_is_refused(runtime):
    import socket

    room = 107 - len(str(topology.runtime_dir("f"))) - len("/.sock")
    topology.make_runtime_dir("f")
    path = topology.socket_path("f", "x" * room)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    with pytest.raises(errors.BadSize, match="108 bytes, at most 107"):
        topology.socket_path("f", "x" * (room + 1))


# ---------------------------------------------------------------- topology


def test_topology_accepts_what_can_be_started():
    program = Program(("python", "-m", "service"))
    chosen = Topology("f", (HostSpec("a", (program, program)), HostSpec("b")), transport="tcp")
    assert chosen.size == 256 << 20
    assert hash(chosen) == hash(Topology("f", chosen.hosts, transport="tcp"))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"fabric": "a/b"}, errors.MisuseError),
        ({"transport": "pigeon"}, errors.MisuseError),
        ({"log_level": "loud"}, errors.MisuseError),
        ({"hosts": (HostSpec("a"), HostSpec("a"))}, errors.MisuseError),
        ({"hosts": (HostSpec("a", (Program(("x",)),) * 33),)}, errors.BadSize),
    ],
)
def test_topology_that_cannot_be_started_is_refused(fields, error):
    with pytest.raises(error):
        Topology(**{"fabric": "f", **fields})


def test_program_without_a_name_is_refused():
    with pytest.raises(errors.MisuseError):
        Program(())

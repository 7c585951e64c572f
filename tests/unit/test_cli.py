"""The command line: ``dmrpc fabric ...`` and ``dmrpc doctor``."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dmrpc_cxl import doctor
from dmrpc_cxl.cli import COMMANDS, main
from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.commands import format_size, parse_size


@pytest.fixture
def name():
    chosen = f"dmrpc-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield chosen
    Path(f"/dev/shm/{chosen}").unlink(missing_ok=True)


def run(*args, code=0):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == code, result.output
    return result.output


# ---------------------------------------------------------------- start


@pytest.mark.parametrize("statement", ["import dmrpc_cxl.cli", "import dmrpc_cxl.fabric.commands"])
def test_loading_the_command_line_imports_neither_numpy_nor_rich(statement):
    code = (
        f"{statement}, sys; print([n for n in ('numpy', 'rich', 'posix_ipc') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_help_names_every_command():
    output = run("--help")
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_imported_and_has_help(command):
    assert "Usage" in run(command, "--help")


def test_unknown_command_is_refused():
    assert "No such command" in run("nonsense", code=2)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("256MiB", 256 << 20),
        ("1.5G", 3 << 29),
        ("2 TB", 2 << 40),
        ("100B", 100),
    ],
)
def test_sizes_are_powers_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1P", "1 2", "0x10", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [format_size(n) for n in (0, 1023, 1024, 3 << 19, 5 << 30, 1 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
        "1.0 TiB",
    ]


# ---------------------------------------------------------------- fabric


def test_device_from_creation_to_removal(name):
    assert (
        run("fabric", "create", name, "--size", "1M", "--page-size", "16384")
        == f"/dev/shm/{name}\n"
    )
    assert name in run("fabric", "list")
    assert "64 of 16.0 KiB" in run("fabric", "inspect", name)
    assert "64 frames accounted for" in run("fabric", "verify", name)
    assert run("fabric", "remove", name) == ""
    assert name not in run("fabric", "list")


def test_json_output_can_be_parsed(name):
    run("fabric", "create", name, "--size", "1M", "--sparse")
    report = json.loads(run("fabric", "inspect", name, "--json"))
    assert report["superblock"]["nr_frames"] == 256
    assert json.loads(run("fabric", "verify", name, "--json"))["pool"] == 256
    (listed,) = [one for one in json.loads(run("fabric", "list", "--json")) if one["name"] == name]
    assert listed == {"name": name, "status": "idle", "inhabitants": []}


def test_inspect_shows_hosts_and_violations(name):
    device.create(name, size=1 << 20)
    with device.open(name) as opened:
        opened.activate_host(3, os.getpid(), 0, 1, "worker-three", 0)
        opened.start_coordinator(os.getpid(), 0, "/run/x.sock", "127.0.0.1", 7777)
        opened.transfer(0, 5, 0, 3)
        offset = opened.superblock["frame_table_off"]
    with device.path_of(name).open("r+b") as file:
        file.seek(offset + 8 * 9)
        file.write(b"\1")
    output = run("fabric", "inspect", name)
    for text in ("worker-three", "active", "free at host 3", "127.0.0.1:7777", "1 violations"):
        assert text in output


def test_verify_of_a_damaged_fabric_exits_with_1(name):
    run("fabric", "create", name, "--size", "1M")
    with device.open(name) as opened:
        offset = opened.superblock["frame_table_off"]
    with device.path_of(name).open("r+b") as file:
        file.seek(offset)
        file.write(b"\1")
    assert "leaked" in run("fabric", "verify", name, code=1)
    assert json.loads(run("fabric", "verify", name, "--json", code=1))["nr_violations"] == 1


def test_failures_are_one_line_that_names_the_exception(name):
    output = run("fabric", "inspect", name, code=1)
    assert output.startswith("Error: DeviceNotFound: no device /dev/shm/")
    assert output.count("\n") == 1


def test_bad_size_on_the_command_line_is_a_usage_error(name):
    assert "is not a size" in run("fabric", "create", name, "--size", "huge", code=2)
    assert "BadSize" in run("fabric", "create", name, "--size", "0", code=1)


def test_fabric_package_runs_as_a_module(name):
    done = subprocess.run(
        [sys.executable, "-m", "dmrpc_cxl.fabric", "verify", name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "DeviceNotFound" in done.stderr


# ---------------------------------------------------------------- doctor


def test_doctor_exits_with_1_if_and_only_if_a_check_failed():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    checks = json.loads(result.stdout)
    assert len(checks) == len(doctor.CHECKS)
    assert result.exit_code == int(any(check["verdict"] == "failed" for check in checks))


def test_every_finding_that_is_not_ok_says_what_to_do():
    for check in doctor.run_checks():
        assert check.found
        assert check.advice or check.verdict == "ok"


def test_doctor_prints_a_table():
    output = CliRunner().invoke(main, ["doctor"]).output
    assert all(word in output for word in ("kernel", "userfaultfd", "/dev/shm", "verdict"))


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.18.44-x", (6, 18)), ("5.19.0", (5, 19)), ("6.1", (6, 1)), ("odd", (0, 0))],
)
def test_kernel_release_is_understood(release, version):
    assert doctor.kernel_version(release) == version


def test_commands_are_click_commands():
    for command in COMMANDS:
        found = main.get_command(click.Context(main), command)
        assert isinstance(found, click.Command)

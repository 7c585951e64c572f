"""What `dmrpc fabric run` is told to run becomes hosts: fabric/programs.py and fabric/place.py."""

import sys
from pathlib import Path

import pytest

from dmrpc_cxl.errors import MisuseError
from dmrpc_cxl.fabric.place import Place
from dmrpc_cxl.fabric.programs import demo_hosts, hosts_of, parse_program

CHECKOUT = Path(__file__).resolve().parents[2]
CALL = (sys.executable, "-m", "dmrpc_cxl.fabric.call")


def argv_of(text):
    return parse_program(text)[1].argv


# ---------------------------------------------------------------- one program


def test_python_file_runs_with_this_interpreter_and_its_arguments():
    assert argv_of("jobs/worker.py --title 'two words'") == (
        sys.executable,
        "jobs/worker.py",
        "--title",
        "two words",
    )


def test_function_is_called_through_the_call_module():
    assert argv_of("photos.worker:main --fast") == (*CALL, "photos.worker:main", "--fast")


@pytest.mark.parametrize(
    "command",
    [
        "sleep 1 | cat",
        "./worker.sh",
        "PATH=/opt/bin worker",
        "echo a:b",
        "it's fine for a shell, 'tis",
    ],
)
def test_anything_else_goes_to_the_shell_as_it_is(command):
    assert argv_of(command) == ("/bin/sh", "-c", command)


def test_name_stands_before_the_first_equals_sign():
    assert parse_program("left-1=worker.py a=b") == (
        "left-1",
        parse_program("worker.py a=b")[1],
    )


def test_capitals_are_an_assignment_for_the_shell_and_no_name():
    assert parse_program("Left=1 worker")[0] == ""


@pytest.mark.parametrize("text", ["", "  ", "left=", "left=  "])
def test_nothing_to_run_is_refused(text):
    with pytest.raises(MisuseError, match="nothing to run"):
        parse_program(text)


def test_quote_without_end_is_refused():
    with pytest.raises(MisuseError, match="quotation"):
        parse_program("worker.py 'oops")


@pytest.mark.parametrize("name", ["coordinator", "fabric"])
def test_names_of_the_launchers_own_lines_are_refused(name):
    with pytest.raises(MisuseError, match="choose another"):
        parse_program(f"{name}=worker.py")


def test_name_that_the_device_cannot_hold_is_refused():
    with pytest.raises(MisuseError, match="at most"):
        parse_program(f"{'n' * 64}=worker.py")


# ---------------------------------------------------------------- hosts


def names_of(programs, nr_hosts=None):
    return [host.name for host in hosts_of(programs, nr_hosts)]


def test_one_program_runs_on_every_host():
    assert names_of(["worker.py"], 3) == ["host-1", "host-2", "host-3"]
    assert names_of(["left=worker.py"], 2) == ["left-1", "left-2"]


def test_one_program_without_a_number_is_one_host():
    assert names_of(["worker.py"]) == ["host-1"]
    assert names_of(["left=worker.py"]) == ["left"]


def test_each_of_several_programs_is_a_host():
    assert names_of(["client=c.py", "w.py", "w.py"]) == ["client", "host-2", "host-3"]
    assert names_of(["client=c.py", "w.py"], 2) == ["client", "host-2"]


def test_several_programs_for_another_number_of_hosts_are_refused():
    with pytest.raises(MisuseError, match="2 programs for 3 hosts"):
        hosts_of(["a.py", "b.py"], 3)


def test_no_hosts_are_refused():
    with pytest.raises(MisuseError, match="at least one"):
        hosts_of(["a.py"], 0)


def test_demonstration_has_a_client_with_the_arguments_and_a_host_for_each_service():
    client, *services = demo_hosts(CHECKOUT, None, ["--pictures", "3"])
    assert client.programs[0].argv[:6] == (
        *CALL,
        "examples.image_pipeline.session:main",
        "--pictures",
        "3",
    )
    assert [service.name for service in services] == [
        "firewall", "balancer", "processor-1", "processor-2", "transcoder", "compressor",
    ]  # fmt: skip


def test_hosts_beyond_the_others_are_image_processors():
    names = [host.name for host in demo_hosts(CHECKOUT, 9, [])]
    assert [name for name in names if name.startswith("processor")] == [
        f"processor-{place}" for place in (1, 2, 3, 4)
    ]


def test_demonstration_without_an_image_processor_is_refused():
    with pytest.raises(MisuseError, match="at least one image processor"):
        demo_hosts(CHECKOUT, 5, [])


def test_demonstration_is_missing_outside_a_checkout(tmp_path):
    with pytest.raises(MisuseError, match="--program"):
        demo_hosts(tmp_path, None, [])


# ---------------------------------------------------------------- the program's side


def test_place_survives_the_environment():
    place = Place("lab", "worker-1", 2, 4, "tcp", "/run/lab", "info")
    assert Place.of_environment(place.as_environment()) == place


def test_program_that_the_launcher_did_not_start_is_told_so():
    with pytest.raises(MisuseError, match="dmrpc fabric run"):
        Place.of_environment({})

"""The social network, run as users run it: `make social` without make."""

from __future__ import annotations

import re
import signal
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.social_network.hosts import programs
from tests.runs import CHECKOUT, Run, Start, starting

BACK = "frames are back in the pool, and no Ref is alive"
FEW = ("--compact", "--users", "30", "--rounds", "1", "--block-seconds", "0.2", "--http-port", "0")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starting(tmp_path) as begin:
        yield begin


def words(*options: str) -> list[str]:
    """Return what the launcher is given."""
    given = [word for program in programs(options) for word in ("--program", program)]
    return ["--size", "64M", *given]


def temporary_folders() -> set[Path]:
    """Return the folders of runs without one of their own that are still there."""
    return set(Path(tempfile.gettempdir()).glob("social-network-*"))


def cells_of(run: Run, name: str) -> list[float]:
    """Return the numbers of a row of the table."""
    for line in run.lines_of("client"):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0] == name:
            return [float(re.sub(r"[^\d.]", "", cell)) for cell in cells[1:]]
    raise AssertionError(f"no row {name!r}:\n{run.output}")


def test_a_run_fills_checks_compares_and_leaves_nothing(start: Start) -> None:
    before = temporary_folders()
    variants = "value,cxl,cxl-ref,cxl-posts"
    options = (*FEW, "--variants", variants, "--rate", "50", "--seed", "7")
    run = start(*words(*options), cwd=CHECKOUT)
    assert run.end() == 0, run.output
    assert BACK in run.output
    assert "30 users" in run.output
    assert re.search(r"checked: new posts on all \d+ timelines", run.output)
    done = cells_of(run, "requests")
    assert len(done) == 4
    assert min(done) > 0
    value, _, by_ref, posts = cells_of(run, "bytes through proxy")
    assert value > 5 * max(by_ref, posts)
    assert temporary_folders() == before


def test_a_run_by_a_service_that_is_not_there_ends_with_its_status(start: Start) -> None:
    before = temporary_folders()
    options = words("--compact", "--store", "redis", "--redis", "redis://127.0.0.1:1", *FEW)
    run = start("--grace", "1", *options, cwd=CHECKOUT)
    assert run.end() != 0, run.output
    assert "Error" in run.output
    assert BACK in run.output
    assert temporary_folders() == before


def test_it_serves_http_until_it_is_interrupted_and_finds_its_files_again(
    start: Start, tmp_path: Path
) -> None:
    for first in (True, False):
        options = words(*FEW, "--serve", "--folder", str(tmp_path / "kept"))
        run = start(*options, cwd=CHECKOUT)
        address = run.wait_for("HTTP at ").split()[-1] + "/wrk2-api"
        run.wait_for("Ctrl-C ends it")
        if first:
            form = {"username": "ada", "user_id": "7", "text": "kept", "post_type": "0"}
            body = urllib.parse.urlencode(form).encode()
            with urllib.request.urlopen(f"{address}/post/compose", body, 30) as answer:
                assert answer.read() == b"Successfully upload post"
        query = f"{address}/user-timeline/read?user_id=7&start=0&stop=10"
        with urllib.request.urlopen(query, None, 30) as answer:
            assert b'"text":"kept"' in answer.read()
        run.signal(signal.SIGINT)
        assert run.end() == 130, run.output
        assert BACK in run.output

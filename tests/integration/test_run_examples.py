"""The examples, run as users run them: the image pipeline, which scripts/run_fabric.sh runs by default, and the photographs."""

from __future__ import annotations

import base64
import io
import itertools
import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.runs import CHECKOUT, SMALL, Run

BACK = "frames are back in the pool, and no Ref is alive"


def row_of(run: Run, name: str) -> tuple[str, ...]:
    """Return what the client's table says, by column."""
    for line in run.lines_of("client"):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0] == name:
            return tuple(cells[1:])
    raise AssertionError(f"no row {name!r}:\n{run.output}")


# ---------------------------------------------------------------- the image pipeline

FEW = (
    "--pictures",
    "30",
    "--size",
    "256K",
    "--rounds",
    "0",
    "--check-every",
    "3",
    "--bad-share",
    "0.2",
)
ROOM = ("--size", "64M")


class Page(HTMLParser):
    """What a page shows: its tables, its pictures, and whatever it would fetch from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value is not None:
                (self.pictures if value.startswith("data:image/") else self.fetched).append(value)
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.cells.append(data.strip())


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit]


@pytest.mark.parametrize("transport", ["ring", "tcp"])
def test_pictures_go_through_seven_services_in_every_way_and_every_frame_comes_back(
    start, tmp_path, transport
):
    variants = ("value", "cxl", "cxl-copy", "store")
    run = start(
        *ROOM, "--", *FEW, "--out", str(tmp_path / "out"), "--transport", transport,
        "--variants", ",".join(variants),
    )  # fmt: skip
    assert run.end() == 0, run.output
    assert f"all {(64 << 20) // 4096} {BACK}" in run.output
    done, blocked = (
        [int(cell) for cell in row_of(run, name)]
        for name in ("pictures", "blocked by the firewall")
    )
    assert [a + b for a, b in zip(done, blocked, strict=True)] == [30] * 4
    assert all(0 < number < 20 for number in blocked)
    assert all(int(cell) >= 8 for cell in row_of(run, "results checked, all right"))
    assert row_of(run, "frames and Refs left behind") == ("0", "0", "0", "0")
    served = [int(run.lines_of(name)[-1].split()[0]) for name in ("transcoder", "compressor")]
    assert min(served) > 0


def test_by_value_pictures_are_sent_four_times_and_by_reference_not_at_all(start, tmp_path):
    run = start(*ROOM, "--", *FEW, "--bad-share", "0", "--out", str(tmp_path))
    assert run.end() == 0, run.output
    by_value, by_reference = map(in_bytes, row_of(run, "bytes through transports"))
    picture, result = 261_990, 2742  # bytes, at 256K
    assert 4 * (picture + result) < by_value < 4 * (picture + result + 600)
    assert 4 * result < by_reference < 4 * (result + 600)
    placed = [in_bytes(cell) for cell in row_of(run, "bytes placed in DM")]
    assert placed[0] == 0
    assert picture * 0.999 < placed[1] < picture * 1.001
    for name in ("bytes copied in DM", "faults", "frames copied"):
        assert all(float(cell.split()[0]) == 0 for cell in row_of(run, name))


@pytest.mark.parametrize("mode", ["fresh", "pre-shared"])
def test_pictures_go_to_a_memory_server_and_every_page_comes_back(start, tmp_path, mode):
    run = start(
        *ROOM, "--memory-servers", "1", "--memory-size", "64M", "--", *FEW, "--bad-share", "0",
        "--variants", "value,net", "--mode", mode, "--out", str(tmp_path),
    )  # fmt: skip
    assert run.end() == 0, run.output
    assert "pages of the memory servers are free, and no Ref is alive" in run.output
    by_value, by_reference = map(in_bytes, row_of(run, "bytes through transports"))
    assert by_value > 4 * 261_990 > 20 * by_reference
    if mode == "fresh":
        placed = [in_bytes(cell) for cell in row_of(run, "bytes placed in DM")]
        assert placed[0] == 0
        assert 261_990 * 0.999 < placed[1] < 261_990 * 1.001
    assert all(cell.endswith("ms") for cell in row_of(run, "memory-0"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--", "--variants", "value,net"], "give --memory-servers 1, before the --"),
        (["--memory-servers", "1", "--", "--variants", "net,cxl"], "run them one after the other"),
        (["--", "--variants", "value,nothing"], "nothing: use some of value, cxl, cxl-copy, net, store"),
        (["--", "--bad-share", "2"], "'2': a number, 0 or more, less than 1"),
        (["--", "--rounds", "-1"], "'-1': a number, 0 or more"),
        (["--", "--check-every", "x"], "'x': a number, 0 or more"),
        (["--", "--window", "65"], "'65': a number, 1 or more, less than 65"),
        (["--", "--pictures", "0"], "'0': a number, 1 or more"),
        (["--", "--out", "/proc/nowhere"], "/proc/nowhere: "),
        (["--", "--pictures-from", "/nowhere"], "/nowhere is no folder"),
    ],
)  # fmt: skip
def test_what_the_demonstration_cannot_do_is_refused_before_anything_is_measured(
    start, arguments, says
):
    run = start(*SMALL, "--grace", "0", *arguments)
    assert run.end() != 0, run.output
    assert says in " ".join(run.output.split()), run.output
    assert "Traceback" not in run.output


def test_photographs_of_ones_own_are_processed_and_shown(start, tmp_path):
    from PIL import Image

    folder = tmp_path / "mine"
    folder.mkdir()
    Image.new("RGB", (300, 200), "teal").save(folder / "sea.jpg")
    Image.new("L", (200, 300), 90).save(folder / "stone.png")
    (folder / "notes.txt").write_text("no photograph")
    Image.new("RGB", (4, 4)).save(folder / "tiny.png")
    run = start(*ROOM, "--", *FEW, "--pictures-from", str(folder), "--out", str(tmp_path / "out"))
    assert run.end() == 0, run.output
    assert "warning: notes.txt is left out" in run.output
    assert "warning: tiny.png is left out: 4 x 4 pixels" in run.output
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    kinds = [picture.partition(";")[0] for picture in page.pictures]
    assert kinds.count("data:image/png") == 2  # before
    assert "sea.jpg" in text
    assert "stone.png" in text


def test_the_report_is_a_page_that_needs_nothing_else(start, tmp_path):
    from PIL import Image

    run = start(
        *ROOM, "--", *FEW, "--rounds", "1", "--block-seconds", "0.02", "--out", str(tmp_path)
    )
    assert run.end() == 0, run.output
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.fetched == []
    for name in ("pictures", "CPU time, all processes", "bytes through transports"):
        at = page.cells.index(name)
        assert tuple(page.cells[at + 1 : at + 3]) == row_of(run, name)
    kinds = [picture.partition(";")[0] for picture in page.pictures]
    assert kinds.count("data:image/svg+xml") == 4  # latency, CPU time, sizes, work
    assert kinds.count("data:image/png") == 7  # before
    assert kinds.count("data:image/jpeg") == 14  # after
    for picture in page.pictures:
        data = base64.b64decode(picture.partition(",")[2])
        if picture.startswith("data:image/svg"):
            assert data.startswith(b"<?xml")
        else:
            Image.open(io.BytesIO(data)).load()


def test_pre_shared_pictures_are_placed_before_and_not_again(start, tmp_path):
    run = start(*ROOM, "--", *FEW, "--mode", "pre-shared", "--out", str(tmp_path))
    assert run.end() == 0, run.output
    assert in_bytes(row_of(run, "bytes placed in DM")[1]) == 0
    assert row_of(run, "frames and Refs left behind") == ("0", "0")


def test_more_hosts_are_more_image_processors(start, tmp_path):
    run = start(*ROOM, "--hosts", "8", "--", *FEW, "--out", str(tmp_path))
    assert run.end() == 0, run.output
    assert row_of(run, "processor-3")


def pipeline(tmp_path: Path, **options: str) -> list[str]:
    """Return the programs of the pipeline as they are given to the launcher one by one, services with options."""
    names = ("firewall", "balancer", "processor-1", "processor-2", "transcoder", "compressor")
    programs = [f"client=examples.image_pipeline.session:main {' '.join(FEW)} --out {tmp_path}"]
    programs += [
        f"{name}=examples.image_pipeline.hosts:serve {options.get(name, '')}" for name in names
    ]
    return [word for program in programs for word in ("--program", program)]


def test_a_worker_that_dies_with_a_picture_in_hand_ends_the_session_and_loses_no_frame(
    start, tmp_path
):
    programs = pipeline(tmp_path, compressor="--die-at 20")
    run = start(*ROOM, "--keep-going", *programs, cwd=CHECKOUT)
    assert run.end() == 137, run.output
    assert "compressor was killed by SIGKILL" in run.output
    assert run.lines_of("compressor")[-1] == "dying with 261990 bytes in hand"
    assert any(line.startswith("failed: NoWorker: ") for line in run.lines_of("client"))
    assert BACK in run.output


def test_services_end_when_their_client_is_killed(start, tmp_path):
    text = """
        import os, signal
        from examples.image_pipeline import client, session
        class Deadly(client.Submitted):
            __slots__ = ()
            def check(self, reply, result):
                print("dying with a result in hand")
                os.kill(os.getpid(), signal.SIGKILL)
        client.Submitted = Deadly
        main = session.main
    """
    (tmp_path / "deadly.py").write_text(textwrap.dedent(text))
    _, _, *others = pipeline(tmp_path)
    command = f"env PYTHONPATH={tmp_path}:{CHECKOUT} {sys.executable} -m dmrpc_cxl.fabric.call deadly:main"
    client = f"client={command} {' '.join(FEW)} --out {tmp_path}"
    run = start(*ROOM, "--keep-going", "--program", client, *others, cwd=CHECKOUT)
    assert run.end() == 137, run.output
    assert "dying with a result in hand" in run.output
    assert run.lines_of("transcoder")[-1].endswith("pictures")
    assert BACK in run.output


def test_an_interrupted_session_leaves_nothing_behind(start, tmp_path):
    run = start("--", "--out", str(tmp_path))
    run.wait_for("all hosts are attached")
    run.signal(signal.SIGINT)
    assert run.end() == 130, run.output
    assert BACK in run.output


def test_options_that_make_no_sense_end_the_session_at_once(start, tmp_path):
    run = start(*ROOM, "--grace", "0.2", "--", "--variants", "value,pigeon")
    assert run.end() == 2, run.output
    assert any("pigeon: use some of value, cxl" in line for line in run.lines_of("client"))


# ---------------------------------------------------------------- the photographs


def edited_pictures(number: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what the first pictures of the example have to become."""
    from examples.photos.picture import Edit, pictures

    for place, (name, pixels) in enumerate(itertools.islice(pictures(), number)):
        Edit.number(place, pixels.shape[0]).apply(pixels := pixels.copy())
        yield name, pixels


def photos(workers: dict[str, str], *client: str) -> tuple[str, ...]:
    """Return the programs of examples/photos, workers with their options."""
    programs = [
        f"client=examples.photos.client:main {' '.join(client)}",
        f"balancer=examples.photos.balancer:main {' '.join(workers)}",
        *(f"{name}=examples.photos.worker:main {options}" for name, options in workers.items()),
    ]
    return tuple(word for program in programs for word in ("--program", program))


TWO = {"worker-1": "", "worker-2": ""}


def test_photographs_are_edited_by_reference_and_every_frame_comes_back(start, tmp_path):
    from PIL import Image

    programs = photos(TWO, "--pictures 6", f"--out {tmp_path / 'out'}")
    run = start(*SMALL, *programs, cwd=CHECKOUT)
    assert run.end() == 0, run.output
    assert "all 4096 frames are back in the pool, and no Ref is alive" in run.output
    assert row_of(run, "pictures") == ("6", "6")
    for name, expected in edited_pictures(6):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), expected)


def test_photographs_send_pixels_by_value_and_none_by_reference(start, tmp_path):
    run = start(*SMALL, *photos(TWO, "--pictures 6", f"--out {tmp_path}"), cwd=CHECKOUT)
    assert run.end() == 0, run.output
    by_value, by_reference = row_of(run, "sent in messages")
    assert by_value.endswith(" MiB")
    assert by_reference.endswith(" KiB")  # histograms, and 40 bytes for each picture
    assert row_of(run, "passed by Ref")[0] == row_of(run, "copied on write")[0] == "0 B"
    assert row_of(run, "faults")[0] == row_of(run, "frames copied")[0] == "0"
    assert row_of(run, "passed by Ref")[1].endswith(" MiB")
    assert row_of(run, "frames copied")[1] not in ("", "0")


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

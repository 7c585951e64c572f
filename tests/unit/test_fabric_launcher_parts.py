"""Parts of the launcher that need no fabric: lines, signals, names of runs, exit statuses."""

import os
import signal
import threading

import pytest

from dmrpc_cxl.fabric import leftovers
from dmrpc_cxl.fabric.children import describe
from dmrpc_cxl.fabric.interrupts import Interrupts
from dmrpc_cxl.fabric.output import MAX_LINE_BYTES, Lines


def printed(*chunks: bytes) -> bytes:
    """Return what Lines makes of a program's output."""
    out, into_out = os.pipe()
    pipe, into_pipe = os.pipe()
    reader = Lines(into_out, into_out, 6).follow("left", pipe)
    collected = []
    try:
        for chunk in chunks:
            os.write(into_pipe, chunk)
    finally:
        os.close(into_pipe)
    reader.join(30)
    os.close(into_out)
    while data := os.read(out, 65536):
        collected.append(data)
    os.close(out)
    return b"".join(collected)


def test_every_line_has_its_programs_name():
    assert printed(b"one\ntwo\n") == b"left   | one\nleft   | two\n"


def test_line_that_comes_in_pieces_is_printed_whole():
    assert printed(b"o", b"n", b"e\nt", b"wo\n") == b"left   | one\nleft   | two\n"


def test_last_line_without_a_newline_is_not_lost():
    assert printed(b"one\ntwo") == b"left   | one\nleft   | two\n"


def test_empty_lines_and_bytes_that_are_no_text_are_kept():
    assert printed(b"\n\xff\xfe\n") == b"left   | \nleft   | \xff\xfe\n"


def test_endless_line_is_cut_and_nothing_of_it_is_lost():
    out, into_out = os.pipe()
    pipe, into_pipe = os.pipe()
    reader = Lines(into_out, into_out, 4).follow("left", pipe)

    def write() -> None:
        with open(into_pipe, "wb") as stream:
            stream.write(b"x" * (2 * MAX_LINE_BYTES))

    writer = threading.Thread(target=write)
    writer.start()
    got = bytearray()
    while got.count(b"x") < 2 * MAX_LINE_BYTES:
        got += os.read(out, 65536)
    writer.join(30)
    reader.join(30)
    os.close(out)
    os.close(into_out)
    assert got.count(b"left | ") >= 2


def test_launcher_hears_once_that_nobody_reads_and_programs_are_still_drained():
    out, into_out = os.pipe()
    os.close(out)
    pipe, into_pipe = os.pipe()
    lines = Lines(into_out, into_out, 4)
    told = []
    lines.when_broken = lambda: told.append(True)
    reader = lines.follow("left", pipe)
    for _ in range(10):
        os.write(into_pipe, b"line\n" * 2000)
    os.close(into_pipe)
    reader.join(30)
    os.close(into_out)
    assert not reader.is_alive()
    assert told == [True]


def test_signals_are_collected_in_order_and_not_acted_upon():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        interrupts.post(signal.SIGPIPE)
        assert interrupts.take() == [signal.SIGTERM, signal.SIGINT, signal.SIGPIPE]
        assert interrupts.take() == []


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.take() == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "ended with status 0"), (3, "ended with status 3"), (137, "was killed by SIGKILL")],
)
def test_exit_status_is_described_in_words(status, text):
    assert describe(status) == text


def test_run_of_a_live_launcher_is_not_taken_for_dead():
    assert not leftovers._is_dead(leftovers.name_of_run(keep=False))


def test_run_is_dead_when_its_pid_is_another_process_now():
    prefix, pid, started, namespace = leftovers.name_of_run(keep=False).split("-")
    assert leftovers._is_dead(f"{prefix}-{pid}-{int(started) + 1}-{namespace}")


def test_runs_of_another_pid_namespace_are_nobodys_business():
    prefix, pid, started, _ = leftovers.name_of_run(keep=False).split("-")
    assert not leftovers._is_dead(f"{prefix}-{pid}-{int(started) + 1}-1")


@pytest.mark.parametrize("name", ["lab", "run", "run-1", "kept-1-1-f0000000", "run-x-1-f0000000"])
def test_other_names_are_never_removed_unasked(name):
    assert not leftovers._is_dead(name)


def test_kept_device_has_a_name_that_is_not_removed_unasked():
    prefix, pid, started, namespace = leftovers.name_of_run(keep=True).split("-")
    assert not leftovers._is_dead(f"{prefix}-{pid}-{int(started) + 1}-{namespace}")

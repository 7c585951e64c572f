"""The statistics of the figures: ratios within rounds, slopes, percentiles, bars, and what the report says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.figures import __main__ as command
from benchmarks.figures import blocks, report, summary
from benchmarks.figures.runner import Case, Sample, Series, merged
from benchmarks.figures.summary import Points


def histogram_of(*ns: int) -> bytes:
    made = blocks.histogram()
    for one in ns:
        made.record_value(one)
    return bytes(made.encode())


def series(variant: str, per_second: list[float], mode: str = "fresh", **params: Any) -> Series:
    case = Case(variant, mode, params, ("client",), blocks.Block, {}, requests=10)
    samples = [
        Sample(
            10,
            10e9 / rate,
            {"client": 1e6, "server": 3e6},
            {"sent_bytes": 400.0} if i == 0 else {},
            histogram_of(*[int(1e9 / rate)] * 10),
        )
        for i, rate in enumerate(per_second)
    ]
    return Series(case, samples)


def points(*many: Series) -> Points:
    """Return points as a file of figures has them."""
    return Points(json.loads(json.dumps([summary.point(one) for one in many])))


def test_ratios_are_taken_within_rounds_and_not_between_medians() -> None:
    found = summary.ratio([10, 200, 30], [1, 10, 1])
    assert found == {"median": 20, "min": 10, "max": 30}


@pytest.mark.parametrize(("over", "under"), [([1.0], [1.0, 2.0]), ([], [])])
def test_rounds_that_do_not_fit_are_no_ratio(over: list[float], under: list[float]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        summary.ratio(over, under)


def test_a_slope_is_what_one_more_costs() -> None:
    assert summary.slope([1, 2, 4], [30, 50, 90]) == pytest.approx(20)
    assert summary.slopes([1, 2], [[10, 20], [15, 40]]) == pytest.approx([5, 20])
    with pytest.raises(ValueError, match="two points"):
        summary.slope([1], [2])


def test_latencies_of_all_blocks_count_together() -> None:
    samples = [
        Sample(1, 1, {}, {}, histogram_of(*[1000] * 99)),
        Sample(1, 1, {}, {}, histogram_of(1_000_000)),
    ]
    found = summary.latencies(samples)
    assert found["p50"] == pytest.approx(1, rel=0.01)
    assert found["p99.9"] == pytest.approx(1000, rel=0.01)
    assert found["mean"] == pytest.approx((99 * 1 + 1000) / 100, rel=0.01)


def test_requests_that_were_not_timed_one_by_one_have_no_latencies() -> None:
    assert summary.latencies([Sample(1, 1, {}, {}, b"")]) == {}


def test_histograms_of_several_clients_become_one() -> None:
    total = blocks.histogram()
    total.decode_and_add(merged([histogram_of(10), b"", histogram_of(20, 30)]))
    assert total.get_total_count() == 3
    assert merged([b"", b""]) == b""


def test_a_point_holds_what_a_request_took() -> None:
    [one] = points(series("cxl", [100.0, 200.0, 300.0], size=4)).points
    assert one["per_second"] == {"median": 200.0, "min": 100.0, "max": 300.0}
    assert one["cpu_us"]["median"] == pytest.approx(400)  # both processes, ten requests
    assert one["cpu_us_by_process"] == pytest.approx({"client": 100, "server": 300})
    assert one["each"]["sent_bytes"] == 40  # counted in one round only
    assert one["rounds"]["p50_us"] == pytest.approx([10_000, 5_000, 1e6 / 300], rel=0.01)


def test_points_are_found_by_what_they_are() -> None:
    found = points(
        series("cxl", [2.0, 4.0], size=1),
        series("cxl", [6.0, 6.0], size=2),
        series("value", [1.0, 1.0], size=1),
    )
    assert found.values("size") == [1, 2]
    assert found.values("size", variant="value") == [1]
    assert found.ratio("per_second", {"variant": "cxl"}, {"variant": "value"}, size=1) == {
        "median": 3.0, "min": 2.0, "max": 4.0,
    }  # fmt: skip
    assert found.ratio("per_second", {"variant": "cxl"}, {"variant": "value"}, size=2) is None
    with pytest.raises(LookupError, match="2 points"):
        found.one(variant="cxl")


@pytest.mark.parametrize(
    ("measured", "at_most", "met"),
    [
        (2.0, False, True),
        (1.9, False, False),
        (2.0, True, True),
        (2.1, True, False),
        (None, False, None),
    ],
)
def test_a_bar_is_met_missed_or_not_measured(
    measured: float | None, at_most: bool, met: bool | None
) -> None:
    assert summary.bar("it", measured, 2, at_most=at_most)["met"] is met


def test_sizes_are_told_in_the_largest_unit_that_fits() -> None:
    assert [summary.bytes_text(n) for n in (64, 4096, 4097, 1 << 20, 3 << 30)] == [
        "64 B", "4 KiB", "4097 B", "1 MiB", "3 GiB",
    ]  # fmt: skip


def result(*many: Series, **more: Any) -> dict[str, Any]:
    machine = {
        "cpu": "a CPU", "cpus": 2, "kernel": "6", "python": "3", "numpy": "2", "load_average": 0.1,
    }  # fmt: skip
    return {
        "figure": "fig05",
        "title": "Fig 5: something",
        "claims": ["it is so"],
        "machine": machine,
        "options": {"rounds": 5, "quick": False},
        "seconds": 60.0,
        "points": points(*many).points,
        "bars": [],
        **more,
    }


def test_the_report_says_where_by_reference_is_slower() -> None:
    made = result(
        series("cxl", [2.0, 2.0], size=4096, place="free"),
        series("value", [4.0, 4.0], size=4096, place="free"),
        series("cxl", [8.0, 8.0], size=8192, place="free"),
        series("value", [4.0, 4.0], size=8192, place="free"),
        series("net", [1.0, 1.0], size=8192, place="free"),
    )
    assert report.losses(made) == [
        ["fig05", "cxl", "value", "free", "4 KiB", "1 of 1", "0.5"],
        ["fig05", "net", "value", "free", "8 KiB", "1 of 1", "0.25"],
    ]


def test_the_report_names_missed_bars_and_what_was_left_out() -> None:
    made = result(
        bars=[
            summary.bar("this", 1.0, 2.0),
            summary.bar("that", {"median": 3.0, "min": 2.0, "max": 4.0}, 2.0),
        ],
        skipped={"spark": "no Java"},
        headline="it is not so",
    )
    text = report.text([made], "figures/")
    assert "1 of 2 bars are met" in text
    assert "| this | 1 x | at least 2 x | **missed** |  |" in text
    assert "| that | 3 x (2 to 4) | at least 2 x | met |  |" in text
    assert "Without spark: no Java." in text
    assert "The paper: it is so." in text
    assert "Here: it is not so." in text


def test_what_is_less_than_its_noise_is_neither_met_nor_missed() -> None:
    made = result(bars=[summary.bar("a slope", -3.0, 0.1, at_most=True, resolved=False)])
    text = report.text([made], "")
    assert "| a slope | -3 x | at most 0.1 x | not resolved |  |" in text
    assert "0 of 1 bars are met" in text


def test_a_near_miss_does_not_look_as_if_it_were_none() -> None:
    made = result(bars=[summary.bar("this", 3.9987, 4.0)])
    assert "| this | 3.999 x | at least 4 x | **missed** |" in report.text([made], "")


def test_missed_bars_are_explained_with_what_was_measured() -> None:
    heavy = {"profile": "heavy", "share": 0.0, "place": "free", "transport": "ring"}
    made = result(
        series("value", [1e3, 1e3], **heavy),
        figure="fig11",
        bars=[summary.bar("rate", 1.0, 2.0)],
    )
    made["points"][0]["each"]["bytes_proxy"] = 20_000.0
    text = report.text([made], "")
    assert "takes 400 us of CPU by value (rings, free), and 20,000 bytes pass" in text
    assert "takes 2.0 us at 10 GB/s, so five movers together some 10 us" in text
    made["bars"] = [summary.bar("rate", 3.0, 2.0)]
    assert "What stands in the way" not in report.text([made], "")


def test_only_all_figures_measured_in_full_are_published() -> None:
    made = result()
    assert report.why_not_publish([made], ["fig05"]) == ""
    assert "fig06 was not measured" in report.why_not_publish([made], ["fig05", "fig06"])
    for options in (
        {"rounds": 5, "quick": True},
        {"rounds": 4, "quick": False},
        {"rounds": 5, "quick": False, "part": "cxl"},
    ):
        made["options"] = options
        assert "fig05 was measured" in report.why_not_publish([made], ["fig05"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "nope"], "'nope' is not one of"),
        (["--only", "fig99"], "'fig99' is not one of"),
        (["--seconds", "-1"], "-1.0 is not in the range"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--replot"], "nothing was measured into"),
        (["--out", __file__], "is a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    done = CliRunner().invoke(command.main, arguments)
    assert done.exit_code == 2, done.output
    assert says in done.output


def test_a_quick_run_is_told() -> None:
    quick = result()
    quick["options"] = {"rounds": 3, "quick": True}
    assert "**quick run**" in report.text([quick], "")
    assert "**quick run**" not in report.text([result()], "")


def test_a_busy_machine_is_told() -> None:
    quiet, busy = result(), result()
    busy["machine"] = {**busy["machine"], "load_average": 7.0}
    assert "others were at work" not in report.text([quiet], "")
    assert "others were at work" in report.text([busy], "")


# ---------------------------------------------------------------- blocks


def test_a_wrong_result_fails_the_block() -> None:
    right, wrong = iter([5, 6, 7]), iter([5, 6, 8])
    block = blocks.one_by_one(lambda: next(right), lambda: next(wrong))
    assert len(block.run(3)) == 3
    with pytest.raises(AssertionError, match="result 2 of 3 is 7, not 8"):
        block.check()


class Future:
    under_way = 0
    most = 0

    def __init__(self, value: int) -> None:
        self._value = value
        Future.under_way += 1
        Future.most = max(Future.most, Future.under_way)

    def result(self) -> int:
        Future.under_way -= 1
        return self._value


def test_a_window_keeps_so_many_requests_under_way_and_no_more() -> None:
    Future.most = Future.under_way = 0
    sent, expected = iter(range(10)), iter(range(10))
    block = blocks.windowed(lambda: Future(next(sent)), lambda: next(expected), 4)
    latencies = block.run(10)
    block.check()
    assert Future.most == 4
    assert Future.under_way == 0
    assert all(ns > 0 for ns in latencies)
    assert not math.isnan(sum(latencies))

"""A thin slice of every figure: it runs, its results are checked, every frame comes back, and what it writes can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from benchmarks.figures import __main__ as command
from benchmarks.figures import e0, fig08, fig12, net, net_blocks, plots, report
from benchmarks.figures.blocks import Block, one_by_one
from benchmarks.figures.runner import Case, Options, Ticker, running
from benchmarks.figures.summary import Points
from benchmarks.figures.variants import REGISTRY
from benchmarks.figures.variants.base import Writing
from benchmarks.peers import PeerFailed
from dmrpc_cxl.fabric import numa

SERVERS = frozenset(("net", "net-copy"))
OURS = SERVERS | {"value", "cxl", "cxl-1", "cxl-copy", "store", "shm"}


def options(*transports: str, variants: frozenset[str] = OURS) -> Options:
    return Options(
        rounds=2,
        seconds=0.003,
        quick=True,
        tiny=True,
        variants=variants,
        places=("free",),
        transports=transports or ("ring",),
    )


def cut_off(name: str, found: dict[str, Any]) -> list[str]:
    """Return the texts and legends of a figure that are not all inside of it."""
    with rc_context(plots.STYLE):
        figure = plots.made(command.module_of(name), found, Figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, whole = canvas.get_renderer(), figure.bbox
        outside = []
        ticks = [  # those outside of their axes are there, and are not drawn
            label for axis in figure.findobj(Axis) for label in axis.get_ticklabels(which="both")
        ]
        for artist in figure.findobj(lambda one: isinstance(one, (Text, Legend))):
            box = artist.get_window_extent(renderer)
            told = artist.get_text() if isinstance(artist, Text) else "legend"
            if artist in ticks or not (told and artist.get_visible() and box.width):
                continue
            if box.x0 < -1 or box.y0 < -1 or box.x1 > whole.x1 + 1 or box.y1 > whole.y1 + 1:
                outside.append(f"{told}: {box}")
    return outside


def test_a_text_that_is_cut_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(result: dict[str, Any], figure: Any) -> None:
        text = figure.subplots().annotate("far away", (3, 0.5), xycoords="axes fraction")
        text.set_in_layout(False)

    monkeypatch.setattr(e0, "draw", draw)
    (found,) = cut_off("e0", {"title": "a figure"})
    assert found.startswith("far away")


def measured(
    name: str, path: Path, *transports: str, variants: frozenset[str] = OURS
) -> dict[str, Any]:
    """Measure a slice of a figure, and take it through its file, plot and report."""
    found = command.measure(name, options(*transports, variants=variants), Ticker())
    file = path / f"{name}.json"
    file.write_text(json.dumps(found))
    read: dict[str, Any] = json.loads(file.read_text())
    plots.render(command.module_of(name), read, path / f"{name}.png")
    assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert cut_off(name, read) == []
    report.write([read], path / "results.md", pictures="")
    assert read["title"] in (path / "results.md").read_text()
    return read


@pytest.mark.parametrize("name", ["fig06", "fig07"])
def test_a_slice_of_a_figure_is_measured_plotted_and_reported(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path)
    assert {point["variant"] for point in found["points"]} >= SERVERS | {"cxl"}
    for point in found["points"]:
        assert point["per_second"]["min"] > 0


def test_the_share_of_looking_up_addresses_is_measured_inside_the_server(tmp_path: Path) -> None:
    found = measured("e0", tmp_path)
    points = Points(found["points"])
    for point in points.points:
        assert point["per_second"]["min"] > 0
    timed = points.one(variant="net", mode=e0.TIMED, size=4096)
    assert timed is not None
    assert timed["each"]["translation_ns"] > 0
    plain = points.one(variant="net", mode="rread", size=4096)
    assert plain is not None
    assert not plain["each"].get("translation_ns")
    [bar] = found["bars"]
    assert 0 < bar["measured"] < 1


def test_a_memory_server_copies_what_a_ref_is_made_of_only_if_it_is_told_to() -> None:
    size = 64 << 10
    with running(options()) as runner, net.net_fabric(runner) as there:
        client = there.start("client")
        cases = [
            Case(
                "net", f"{mode} {copy}", {}, (client,), net_blocks.refs_block,
                {"mode": mode, "size": size, "region": 1 << 20, "copy": copy},
                pids=there.pids, gauges=there.gauges,
            )
            for mode in ("pre-shared", "pipelined")
            for copy in (False, True)
        ]  # fmt: skip
        for series, copy in zip(runner.measure(cases), (False, True) * 2, strict=True):
            for sample in series.samples:
                assert sample.each("server_bytes_copied") == (size if copy else 0)


def test_pictures_at_a_memory_server_are_sent_there_once_or_for_each_request(
    tmp_path: Path,
) -> None:
    points = Points(measured("fig10", tmp_path, "tcp", variants=SERVERS | {"value"})["points"])
    [size] = points.values("size")
    size *= 0.9  # nominal: pictures are a little smaller

    def each(variant: str, mode: str, what: str) -> float:
        one = points.one(variant=variant, mode=mode)
        assert one is not None
        return float(one["each"].get(what, 0.0))

    assert each("net", "fresh", "server_bytes_in") > size
    for variant in SERVERS:
        assert each(variant, "pre-shared", "server_bytes_in") < size / 10
        assert each(variant, "pre-shared", "server_bytes_out") > size
    assert each("net", "pre-shared", "server_bytes_copied") == 0
    assert each("net-copy", "pre-shared", "server_bytes_copied") >= size


def test_whoever_fails_over_a_memory_server_leaves_no_process_and_no_fabric() -> None:
    pids: list[int] = []
    with (
        pytest.raises(PeerFailed, match="result 0 of 4 is 1, not 2"),
        running(options()) as runner,
        net.net_fabric(runner) as there,
    ):
        client = there.start("client")
        pids += [runner.on.pids[client], *there.pids().values()]
        runner.measure([Case("net", "fresh", {}, (client,), wrong_block, {})])
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not runner.foreign


def test_the_social_network_is_measured_at_equal_rates_and_movers_pass_what_they_must(
    tmp_path: Path,
) -> None:
    found = measured("fig11", tmp_path)
    points = Points(found["points"])
    rated = points.select(profile="heavy", share=0.5)
    assert {one["variant"] for one in rated} == {"value", "net", "cxl"}
    assert len({one["params"]["rate"] for one in rated}) == 1
    for one in points.points:
        assert one["each"]["bytes_proxy"] == one["each"]["bytes_php-fpm"]
        assert 0 < one["latency_us"]["p50"] <= one["latency_us"]["p99"]
    assert found["tables"][0]["rows"]
    assert any("capacity" in one["what"] for one in found["bars"])


def test_chains_send_as_many_bytes_for_a_large_array_by_ref_as_for_a_small_one(
    tmp_path: Path,
) -> None:
    points = Points(measured("fig05", tmp_path, "ring", "tcp")["points"])
    for transport in ("ring", "tcp"):
        where = {"transport": transport, "hops": 2}
        sent = {
            (one["variant"], one["mode"], one["params"]["size"]): one["each"]["sent_bytes"]
            for one in points.select(**where)
        }
        small, large = points.values("size")
        for variant, mode in (("cxl", "fresh"), ("net", "fresh"), ("net-copy", "pre-shared")):
            assert sent[variant, mode, large] < 1.1 * sent[variant, mode, small] < 2000
        assert 2 * large < sent["value", "fresh", large] < 2.2 * large  # two calls


def test_receivers_of_a_shared_block_copy_as_many_frames_as_they_write(tmp_path: Path) -> None:
    points = Points(measured("fig08", tmp_path)["points"])
    for share, pages in ((0.0, 0), (100.0, 8)):
        one = points.one(variant="cxl", mode="shared", share=share)
        assert one is not None
        assert one["each"].get("frames_copied", 0) == pages
        assert (one["each"].get("wp_faults", 0) > 0) == (pages > 0)
    for variant, mode in (("cxl", "fresh"), ("cxl-copy", "shared")):
        for one in points.select(variant=variant, mode=mode):
            assert one["each"].get("frames_copied", 0) == 0
    assert {one["variant"] for one in points.points} == OURS - {"cxl-1", "net-copy"}


def test_a_fault_that_copies_one_page_copies_exactly_the_pages_written() -> None:
    with running(options()) as runner, fig08.parties(runner, ["cxl-1"], {}) as who:
        params = {"block": 32 << 10, "stored": 4, "window": 1}
        cases = [
            fig08.case(who["cxl-1"], "cxl-1", "shared", params | {"share": share}, "ring")
            for share in (12.5, 50.0, 75.0)
        ]
        for series in runner.measure(cases):
            pages = series.case.params["pages"]
            assert [sample.each("frames_copied") for sample in series.samples] == [pages] * 2


def test_a_slower_device_is_charged_and_the_models_error_is_told(tmp_path: Path) -> None:
    found = measured("fig12", tmp_path)
    assert set(found["model_errors"]) >= {"190"}
    points = Points(found["points"])
    assert points.values("extra_ns") == [0, 190]
    which = {"pages": 8, "charged": "DM layer"}
    fast = points.one(extra_ns=0, overlap=8, **which)
    slow = points.one(extra_ns=190, overlap=1, **which)
    assert fast is not None
    assert slow is not None
    owed_us = 8 * 128 * 0.19  # lines of 8 pages, read and written
    assert slow["latency_us"]["p50"] > fast["latency_us"]["p50"] + owed_us / 2


def test_where_there_is_a_second_node_the_device_is_bound_to_it_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fig12, "far_node", lambda: numa.nodes_with_memory()[-1])
    found = measured("fig12", tmp_path)
    assert found["bound_to_node"]
    assert {one["params"]["extra_ns"] for one in found["bound_to_node"]} == {0}
    (bar,) = (one for one in found["bars"] if "not modelled" in one["what"])
    assert bar["measured"] > 0
    assert bar["spread"][0] <= bar["measured"] <= bar["spread"][1]


def wrong_block(host: Any) -> Block:
    return one_by_one(lambda: 1, lambda: 2)


def test_a_wrong_result_ends_the_measurement() -> None:
    with pytest.raises(PeerFailed, match="result 0 of 4 is 1, not 2"), running(options()) as runner:
        runner.on.start("client")
        runner.measure([Case("cxl", "fresh", {}, ("client",), wrong_block, {})])


def test_every_variant_says_why_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("ray", "ray-cg", "spark"):
        assert "is not installed" in REGISTRY[name].why_not()
    monkeypatch.undo()
    assert not any(REGISTRY[name].why_not() for name in OURS)


def test_variants_have_names_and_colours_of_their_own() -> None:
    assert all(name == variant.name for name, variant in REGISTRY.items())
    assert len({variant.colour for variant in REGISTRY.values()}) == len(REGISTRY)


@pytest.mark.parametrize("name", ["net", "net-copy"])
def test_memory_servers_do_the_same_work_and_leave_nothing_behind(name: str) -> None:
    variant = REGISTRY[name]
    assert isinstance(variant, Writing)
    with running(options()) as runner:
        with fig08.parties(runner, [name], {}) as who:
            params = {"block": 32 << 10, "stored": 4096, "window": 1, "share": 50.0}
            cases = [fig08.case(who[name], name, mode, params, "tcp") for mode in variant.modes]
            for series in runner.measure(cases):
                assert len(series.samples) == 2
                assert series.samples[0].cpu_ns[f"{name}-server"] >= 0
            [server] = (who[name].pids or dict)().values()
        assert not Path(f"/proc/{server}").exists()
        assert not runner.foreign


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "ray-cg", "spark"])
def test_clusters_do_the_same_work_and_leave_nothing_behind(name: str) -> None:
    variant = REGISTRY[name]
    if reason := variant.why_not():
        pytest.skip(reason)
    assert isinstance(variant, Writing)
    skipped: dict[str, str] = {}
    with running(options()) as runner:
        with fig08.parties(runner, [name], skipped) as who:
            params = {"block": 32 << 10, "stored": 4096, "window": 1, "share": 50.0}
            [series] = runner.measure([fig08.case(who[name], name, "fresh", params, "ring")])
            children = dict(who[name].pids() if who[name].pids else {})
            assert children
        assert len(series.samples) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())
    assert not skipped

"""The image pipeline as a whole: eight host processes, a client here; audited when a test ends.

The services are those that run_fabric.sh runs; what the launcher adds is tested in test_run_fabric.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import PeerLost, WrongArguments
from examples.image_pipeline import bmp, roles
from examples.image_pipeline.client import Client, Wrong
from examples.image_pipeline.messages import Blocked, NoWorker, Pipeline, Request, UnsupportedImage
from examples.image_pipeline.photographs import pictures
from examples.image_pipeline.users import UserTable
from examples.image_pipeline.variants import VARIANTS
from examples.image_pipeline.work import WORKS, Op, compute
from tests.fabrics import At, Fabric, HostProcess
from tests.standing import Standing, until

NAMES = roles.service_names(variants=tuple(VARIANTS))[::-1]
THRESHOLD = 32 << 10
SMALL, LARGE = 4 << 10, 256 << 10  # by value for all variants, by reference for most
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def files() -> dict[int, list[np.ndarray]]:
    """A few pictures of each size."""
    return {size: [picture.file for picture in pictures(size, 5)] for size in (SMALL, LARGE)}


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing(*({} for _ in NAMES), size=64 << 20)
    yield standing
    standing.close()


def start(at: At, name: str, options: dict[str, Any]) -> None:
    at.host.threshold = THRESHOLD
    at.running = roles.start(at.host, name, **options)


def stop(at: At) -> None:
    at.running.stop()


def account(at: At) -> roles.Account:
    return at.running.account()


class Stage:
    """The services, and a host for clients."""

    def __init__(self, fabric: Fabric, host: dmrpc_cxl.Host, transport: str) -> None:
        self.fabric = fabric
        self.host = host
        self.transport = transport
        self.processes: dict[str, HostProcess] = {}
        self.clients: list[Client] = []

    def client(self, **options: Any) -> Client:
        """Return a client, closed when the test ends."""
        client = Client(self.host, transport=self.transport, **options)
        self.clients.append(client)
        return client

    def account(self, name: str) -> dict[str, int]:
        """Return what a service has counted."""
        return dict(self.processes[name].call(account).counts)

    def raw(self, **options: Any) -> Any:
        """Return a client of the firewall that sends what it likes."""
        return self.host.connect("firewall", Pipeline, transport=self.transport, **options)

    def signed(self, **fields: Any) -> Request:
        """Return a request that the firewall lets through."""
        token = UserTable.of_fabric(self.host.secret).token(1, 77)
        made = Request(77, Op.TRANSCODE, "scale", 1, token, "cxl", 100)
        for name, value in fields.items():
            setattr(made, name, value)
        return made


@contextlib.contextmanager
def staged(standing: Standing, transport: str, **options: Any) -> Iterator[Stage]:
    """Start all services; options are by name, for roles.start(). A service with options gets a process of its own."""
    with standing.use() as (fabric, hosts):
        with dmrpc_cxl.attach(fabric.name) as host:
            host.threshold = THRESHOLD
            stage = Stage(fabric, host, transport)
            for name, standing_process in zip(NAMES, hosts, strict=True):
                process = fabric.host() if name in options else standing_process
                process.call(start, name, {"transport": transport, **options.get(name, {})})
                stage.processes[name] = process
            yield stage
            for client in stage.clients:
                client.close()
            for process in reversed(stage.processes.values()):
                if not process.left:
                    process.call(stop)
            for name in options:
                stage.processes[name].leave()
        fabric.hosts[:] = [process for process in fabric.hosts if not process.left]


@pytest.fixture
def stage(standing: Standing, transport: str) -> Iterator[Stage]:
    with staged(standing, transport) as stage:
        yield stage


def drained(stage: Stage) -> None:
    """Assert that nothing is held, though all processes go on."""
    until(lambda: _held(stage) == (0, 0, 0), 20)
    stage.fabric.assert_sound()


def _held(stage: Stage) -> tuple[int, int, int]:
    audit = stage.fabric.audit()  # what is being freed has no exact count
    return audit["in_use"], audit["live_refs"], stage.account("store")["objects"]


# ---------------------------------------------------------------- results


@each_variant
def test_every_result_is_what_the_client_computes_itself(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant)
    for size in (SMALL, LARGE):
        for work in WORKS:
            for op in Op:
                file = files[size][0]
                before = file.copy()
                found = client.submit(op, file, work)
                reply, result = found.reply()
                found.check(reply, result)
                expected = compute(op, work, file)
                assert np.array_equal(result, expected.result)
                assert (reply.checksum, reply.result_bytes) == (
                    expected.checksum,
                    expected.result.nbytes,
                )
                assert np.array_equal(file, before)
                del found, reply, result
    drained(stage)


@each_variant
def test_a_loop_counts_what_it_did_and_gives_everything_back(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant)
    both = [file for pair in zip(files[SMALL], files[LARGE], strict=True) for file in pair]
    for window in (1, 4):
        tally = client.run(both, window=window, count=40, check_every=3)
        assert (tally.nr_done, tally.nr_blocked, tally.nr_checked) == (40, 0, 14)
        assert len(tally.latencies_ns) == 40
        assert tally.bytes_in == 4 * sum(file.nbytes for file in both)
        assert tally.bytes_out == 4 * sum(bmp.scale_down(file).nbytes for file in both)
        assert tally.seconds > 0
        drained(stage)


def test_a_loop_may_be_told_how_long_instead_of_how_many(
    stage: Stage, files: dict[int, list[np.ndarray]]
) -> None:
    tally = stage.client().run(files[SMALL], seconds=0.05, op=Op.COMPRESS)
    assert tally.seconds >= 0.05
    assert tally.nr_done >= 1
    assert stage.account("compressor")["pictures"] == tally.nr_done
    assert "pictures" not in stage.account("transcoder")


def test_a_wrong_result_does_not_go_unnoticed(
    stage: Stage, files: dict[int, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own computation is made wrong: the services do not know."""
    for work in ("none", "scale"):
        monkeypatch.setattr(
            "examples.image_pipeline.client.compute",
            lambda op, work, file: compute(op, work, _other(file)),
        )
        with pytest.raises(Wrong, match=r"instead of|not those expected"):
            stage.client().run(files[LARGE], count=3, work=work, check_every=1)
        monkeypatch.undo()
    drained(stage)


def _other(file: np.ndarray) -> np.ndarray:
    changed = file.copy()
    changed[bmp.HEADER_BYTES] ^= 1  # of the first pixel, which every scale keeps
    return changed


# ---------------------------------------------------------------- the firewall


@each_variant
def test_exactly_the_forged_requests_are_blocked_and_their_pictures_are_given_back(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant, bad_share=0.3, seed=5)
    tally = client.run(files[LARGE], window=4, count=60)
    assert 5 < tally.nr_blocked < 35
    assert tally.nr_done + tally.nr_blocked == 60
    counted = stage.account("firewall")
    assert (counted["blocked"], counted["admitted"]) == (tally.nr_blocked, tally.nr_done)
    workers = [stage.account(name)["pictures"] for name in roles.WORKERS]
    assert sum(workers) == tally.nr_done  # no blocked one has got that far
    drained(stage)


@each_variant
def test_a_blocked_request_is_a_permission_error_with_its_status(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant)
    with pytest.raises(Blocked, match="403") as caught:
        client.submit(Op.TRANSCODE, files[LARGE][0], forged=True).result()
    assert isinstance(caught.value, PermissionError)
    assert caught.value.status == 403
    drained(stage)  # though the exception is still held, with its traceback


def test_unknown_users_and_tokens_of_other_requests_are_blocked(stage: Stage) -> None:
    pipeline = stage.raw()
    for wrong in ({"user_id": 99}, {"user_id": 2}, {"req_id": 78}, {"token": ""}, {"user_id": -1}):
        with pytest.raises(PermissionError, match="403"):
            pipeline.process(stage.signed(**wrong))
    assert stage.account("firewall") == {"blocked": 5}


def test_what_is_no_request_is_refused_before_it_goes_anywhere(stage: Stage) -> None:
    pipeline = stage.host.connect("firewall", transport=stage.transport)
    for nonsense in (
        5,
        [1, 2],
        [77, 9, "scale", 1, "t", "cxl", 1],
        [77, 1, "all", 1, "t", "cxl", 1],
    ):
        with pytest.raises(WrongArguments):
            pipeline.process(nonsense)
    assert stage.account("firewall") == {}


# ---------------------------------------------------------------- balancer and image processors


@pytest.mark.parametrize("variant", ["value", "cxl"])
def test_requests_are_dealt_out_strictly_in_turn(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant)
    client.run(files[SMALL] + files[LARGE], window=5, count=50)
    counts = stage.account("balancer")
    assert counts == {"to processor-1": 25, "to processor-2": 25}
    by_processor = [stage.account(f"processor-{place}") for place in (1, 2)]
    assert [sum(one[f"to {name}"] for name in roles.WORKERS) for one in by_processor] == [25, 25]
    for name in roles.WORKERS:  # what each processor picked is what each worker got
        assert sum(one.get(name, 0) for one in by_processor) == stage.account(name)["pictures"]


def test_services_in_between_touch_neither_the_pool_nor_any_picture(
    stage: Stage, files: dict[int, list[np.ndarray]]
) -> None:
    between = [name for name in NAMES if name not in (*roles.WORKERS, "store")]
    before = {name: stage.processes[name].call(counters) for name in between}
    client = stage.client()
    client.run(files[LARGE], count=20)
    assert {name: stage.processes[name].call(counters) for name in between} == before
    for name in between:
        forwarded = stage.processes[name].call(account).bytes_forwarded
        assert 0 < forwarded < 20 * 8000  # results of some KiB, requests of some hundred bytes


def counters(at: At) -> dict[str, int]:
    return dict(at.host.stats())


def test_headers_that_make_no_sense_are_unsupported(stage: Stage) -> None:
    pipeline = stage.raw()
    for wrong in (
        {"variant": "pigeon"},
        {"image_bytes": 0},
        {"image_bytes": -1},
        {"image_bytes": 1 << 60},
    ):
        with pytest.raises(ValueError, match="415"):
            pipeline.process(stage.signed(**wrong))
    refused = [stage.account(f"processor-{place}")["refused"] for place in (1, 2)]
    assert refused == [2, 2]


# ---------------------------------------------------------------- workers


@each_variant
def test_what_is_no_picture_is_unsupported_and_given_back(
    stage: Stage, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(variant=variant)
    for size in (SMALL, LARGE):
        file = files[size][0].copy()
        file[0] ^= 1
        for op in Op:
            for work in WORKS:
                with pytest.raises(UnsupportedImage, match="415") as caught:
                    client.submit(op, file, work).result()
    assert caught.value.status == 415
    assert isinstance(caught.value, ValueError)
    drained(stage)


def test_a_request_without_its_picture_or_with_another_size_is_unsupported(stage: Stage) -> None:
    pipeline = stage.raw()
    array = np.zeros(LARGE, "u1")
    for wrong in ({}, {"image": array}, {"handle": 5}, {"handle": 5, "variant": "store"}):
        with pytest.raises(ValueError, match="415"):
            pipeline.process(stage.signed(**wrong))
    drained(stage)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "store"])
def test_a_worker_that_dies_with_a_picture_in_hand_loses_nothing_but_its_requests(
    standing: Standing, transport: str, variant: str, files: dict[int, list[np.ndarray]]
) -> None:
    with staged(standing, transport, transcoder={"die_at": 4}) as stage:
        client = stage.client(variant=variant, timeout=60)
        futures = [client.submit(Op.TRANSCODE, file) for file in files[LARGE]]
        ended = [_outcome(future) for future in futures]
        assert set(ended) <= {"done", "NoWorker"}
        assert "NoWorker" in ended
        worker = stage.processes["transcoder"]
        worker.expect_death()
        with pytest.raises(NoWorker) as caught:  # whoever comes later is told as well
            client.submit(Op.TRANSCODE, files[LARGE][0]).result()
        assert caught.value.status == 503
        assert isinstance(caught.value, ConnectionError)
        tally = client.run(files[LARGE], count=10, op=Op.COMPRESS, check_every=1)
        assert tally.nr_checked == 10
        until(lambda: worker.id not in {entry["host"] for entry in stage.fabric.host_states()})
        drained(stage)


def _outcome(submitted: Any) -> str:
    try:
        submitted.result()
    except NoWorker as error:
        return "NoWorker" if isinstance(error.__cause__, (PeerLost, ValueError)) else repr(error)
    return "done"


# ---------------------------------------------------------------- pre-shared


def test_pre_shared_pictures_are_placed_once_and_read_where_they_are(
    stage: Stage, files: dict[int, list[np.ndarray]]
) -> None:
    client = stage.client(mode="pre-shared")
    both = files[SMALL] + files[LARGE]
    client.share(both)
    before = stage.host.stats()["bytes_referenced"]
    for work in ("none", "scale"):
        tally = client.run(both, window=3, count=40, work=work, check_every=1)
        assert tally.nr_checked == 40
    assert stage.host.stats()["bytes_referenced"] == before
    with pytest.raises(KeyError):
        client.submit(Op.TRANSCODE, files[SMALL][0].copy())
    client.unshare()
    drained(stage)
    client.share(files[SMALL] * 2)  # again, and each of them once
    assert stage.fabric.audit()["in_use"] == 2 * len(files[SMALL])
    assert client.run(files[SMALL], count=5, check_every=1).nr_checked == 5
    client.close()
    drained(stage)


def test_a_variant_says_which_modes_it_has(stage: Stage) -> None:
    for variant in ("value", "cxl-copy", "store"):
        with pytest.raises(ValueError, match="pre-shared"):
            stage.client(variant=variant, mode="pre-shared")
    with pytest.raises(ValueError, match="share"):
        stage.client().share([])

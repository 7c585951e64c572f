"""The social network as a whole: nine host processes, generators and HTTP clients here; audited when a test ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import ServiceNotFound, WrongArguments
from examples.social_network import checks, fill, graph, roles
from examples.social_network.load import Generator
from examples.social_network.profiles import PROFILES, Writer, form_of
from examples.social_network.records import (
    Compose,
    Follow,
    Kind,
    PostType,
    Request,
    Unavailable,
    encoded,
    failure_of,
)
from examples.social_network.storage import PostStorage, SocialGraph
from examples.social_network.stores import Stores
from examples.social_network.variants import VARIANTS, raw
from tests.fabrics import At, Fabric, HostProcess
from tests.standing import Standing, until

NAMES = roles.process_names(compact=True)[::-1]
THRESHOLD = 4096  # a list of posts is larger, one of the original profile may be smaller
USERS = 40
PATIENCE = 1.0
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing(*({} for _ in NAMES), size=64 << 20)
    yield standing
    standing.close()


def start(at: At, name: str, options: dict[str, Any], folder: str) -> int:
    at.host.threshold = THRESHOLD
    stores = Stores("sqlite", folder_of(folder)) if folder else None
    at.running = roles.start(at.host, name, stores=stores, **options)
    port: int = at.running.http_port
    return port


def folder_of(folder: str) -> Any:
    from pathlib import Path

    return Path(folder)


def stop(at: At) -> None:
    at.running.stop()


def account(at: At) -> Any:
    return at.running.account()


class Stage:
    """The services, a host for clients, and the HTTP port."""

    def __init__(self, fabric: Fabric, host: dmrpc_cxl.Host, transport: str) -> None:
        self.fabric = fabric
        self.host = host
        self.transport: Any = transport
        self.port = 0
        self.processes: dict[str, HostProcess] = {}
        self.generators: dict[str, Generator] = {}

    def generator(self, variant: str) -> Generator:
        """Return a generator, closed when the test ends."""
        if variant not in self.generators:
            self.generators[variant] = Generator(
                self.host, variant, transport=self.transport, patience=PATIENCE
            )
        return self.generators[variant]

    def connect(self, name: str, kind: type[Any]) -> Any:
        """Return a client of a service."""
        return self.host.connect(name, kind, transport=self.transport)

    def fill(self, profile: str = "heavy") -> Writer:
        """Fill the network; return who draws more."""
        writer = Writer(PROFILES[profile], USERS)
        edges = graph.part_of(graph.default(), USERS)
        assert fill.fill(self.host, edges, USERS, writer) > 0
        return writer

    def drained(self) -> None:
        """Assert that nothing is held, though all processes go on."""
        checks.check_drained(self.fabric.name, self.connect("post-storage", PostStorage))

    def http(self, *requests: tuple[str, str, dict[str, str]]) -> list[tuple[int, str]]:
        """Make requests (method, path, parameters) one after the other; return status and text of each."""

        async def all_of_them() -> list[tuple[int, str]]:
            answers = []
            async with aiohttp.ClientSession(f"http://127.0.0.1:{self.port}") as session:
                for method, path, given in requests:
                    how = {"params": given} if method == "GET" else {"data": given}
                    async with session.request(method, f"/wrk2-api/{path}", **how) as answer:
                        answers.append((answer.status, await answer.text()))
            return answers

        return asyncio.run(all_of_them())


@contextlib.contextmanager
def staged(
    standing: Standing, transport: str, *, apart: str = "", folder: str = ""
) -> Iterator[Stage]:
    """Start all services; the one that is to be apart gets a process of its own, which may die."""
    with standing.use() as (fabric, hosts):
        with dmrpc_cxl.attach(fabric.name) as host:
            host.threshold = THRESHOLD
            stage = Stage(fabric, host, transport)
            for name, standing_process in zip(NAMES, hosts, strict=True):
                process = fabric.host() if name == apart else standing_process
                options: dict[str, Any] = {"transport": transport, "patience": PATIENCE}
                if name == roles.LOAD_BALANCER:
                    options["http"] = {"port": 0, "timeout": 20.0}
                port = process.call(start, name, options, folder)
                stage.port = stage.port or port
                stage.processes[name] = process
            yield stage
            for one in stage.generators.values():
                one.close()
            for name in reversed(NAMES):
                if not stage.processes[name].left:
                    stage.processes[name].call(stop)
            if apart:
                stage.processes[apart].leave()
        fabric.hosts[:] = [process for process in fabric.hosts if not process.left]


@pytest.fixture
def stage(standing: Standing, transport: str) -> Iterator[Stage]:
    with staged(standing, transport) as stage:
        yield stage


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("profile", PROFILES)
def test_posts_become_visible_are_newest_first_and_the_same_by_every_variant(
    stage: Stage, profile: str
) -> None:
    writer = stage.fill(profile)
    generators = {name: stage.generator(name) for name in VARIANTS}
    storage = stage.connect("post-storage", PostStorage)
    nr_timelines, nr_posts = checks.check_all(
        stage.host, generators, writer, storage, range(len(VARIANTS) + 3)
    )
    assert nr_timelines > len(VARIANTS)
    assert nr_posts > 20
    assert storage.nr_resident() == 0
    stage.drained()


@each_variant
def test_loops_count_what_they_did_and_give_everything_back(stage: Stage, variant: str) -> None:
    writer = stage.fill()
    one = stage.generator(variant)
    requests = [writer.request(i, variant) for i in range(60)]
    open_loop = one.open_loop(requests, rate=100, seconds=0.3, warm_up=0.05)
    closed_loop = one.closed_loop(requests, count=20, window=3, warm_up=0.05)
    for tally in (open_loop, closed_loop):
        assert tally.errors == {}
        assert not tally.aborted
        assert tally.done == tally.offered > 0
        assert tally.overall().get_total_count() == tally.done
        assert tally.nr_posts > 0
    assert open_loop.lag.get_total_count() == open_loop.done
    stage.drained()


def test_lists_of_posts_go_by_reference_from_the_threshold_on_and_movers_pass_no_posts(
    stage: Stage,
) -> None:
    writer = stage.fill()
    user = writer.compose().user_id

    def forwarded(variant: str, stop: int) -> int:
        before = stage.processes["proxy"].call(account).bytes_forwarded
        request = Request(Kind.USER_TIMELINE, 1, variant, user, 0, stop)
        reply = stage.generator(variant).ask(request)
        assert len(VARIANTS[variant].posts(stage.host, reply)) == stop
        return int(stage.processes["proxy"].call(account).bytes_forwarded - before)

    for variant in VARIANTS:
        forwarded(variant, 1)  # connections
    assert forwarded("value", 10) > 20_000
    assert forwarded("cxl", 10) < 1000
    assert forwarded("cxl-ref", 10) < 1000
    assert forwarded("cxl-posts", 10) < 2000
    one = forwarded("value", 1)
    assert forwarded("cxl", 1) > 2000  # small, so in the message
    assert forwarded("cxl-ref", 1) < 1000 < one
    storage = stage.connect("post-storage", PostStorage)
    assert storage.nr_resident() == 10
    storage.evict()
    assert storage.nr_resident() == 0


@each_variant
def test_reads_that_make_no_sense_are_empty_and_lists_of_nothing_ask_nobody(
    stage: Stage, variant: str
) -> None:
    stage.fill()
    before = stage.processes["post-storage"].call(account).counts
    for kind in (Kind.HOME_TIMELINE, Kind.USER_TIMELINE):
        for user, start_, stop_ in ((1, -1, 5), (1, 5, 5), (1, 6, 2), (1, 5000, 5010), (999, 0, 5)):
            reply = stage.generator(variant).ask(Request(kind, 1, variant, user, start_, stop_))
            assert raw(stage.host, reply) == b"\x90"
    assert stage.processes["post-storage"].call(account).counts == before


def test_errors_of_services_arrive_as_what_they_are(stage: Stage) -> None:
    one = stage.generator("cxl")
    with pytest.raises(ValueError, match="no variant 'pigeon'"):
        one.ask(Request(Kind.HOME_TIMELINE, 1, "pigeon", 1, 0, 10))
    with pytest.raises(ValueError, match="compose request without a body"):
        one.ask(Request(Kind.COMPOSE, 1, "cxl"))
    with pytest.raises(LookupError, match="'nobody'"):
        one.ask(Request(Kind.FOLLOW, 1, "cxl", body=encoded(Follow("nobody", "else"))))
    with pytest.raises(LookupError, match="no post 5"):
        stage.connect("post-storage", PostStorage).read(1, [5], "cxl")
    with pytest.raises(ValueError, match="twice"):
        stage.connect("post-storage", PostStorage).read(1, [5, 5], "cxl")
    with pytest.raises(WrongArguments):
        stage.host.connect(roles.LOAD_BALANCER, transport=stage.transport).handle([9, "x"])
    uneven = Compose("username_1", 1, "text", [1, 2], ["png"], PostType.POST)
    with pytest.raises(ValueError, match="2 media with 1 types"):
        one.ask(Request(Kind.COMPOSE, 1, "cxl", body=encoded(uneven)))
    stage.drained()


def test_a_follower_sees_posts_from_then_on_and_not_after_he_has_left(stage: Stage) -> None:
    graph_ = stage.connect("social-graph", SocialGraph)
    one = stage.generator("cxl")

    def compose(req_id: int) -> None:
        made = Compose("username_1", 1, f"post {req_id}", [], [], PostType.POST)
        one.ask(Request(Kind.COMPOSE, req_id, "cxl", body=encoded(made)))

    compose(1)
    one.ask(Request(Kind.FOLLOW, 2, "cxl", body=encoded(Follow(user_id=7, followee_id=1))))
    one.ask(Request(Kind.FOLLOW, 3, "cxl", body=encoded(Follow(user_id=7, followee_id=1))))
    assert (graph_.followers(1), graph_.followees(7)) == ([7], [1])
    compose(4)
    graph_.unfollow(7, 1)
    compose(5)
    assert (graph_.followers(1), graph_.followees(7)) == ([], [])
    home = checks.timeline(one, Kind.HOME_TIMELINE, 7)
    assert [post.req_id for post in home] == [4]
    assert [post.req_id for post in checks.timeline(one, Kind.USER_TIMELINE, 1)] == [5, 4, 1]


def test_what_sqlite_keeps_outlives_the_processes(
    standing: Standing, tmp_path: Any, transport: str
) -> None:
    found = []
    for first in (True, False):
        with staged(standing, transport, folder=str(tmp_path)) as stage:
            if first:
                stage.fill()
            one = stage.generator("value")
            request = Request(Kind.HOME_TIMELINE, 1, "value", 3, 0, 50)
            found.append(raw(stage.host, one.ask(request)))
            [(status, _)] = stage.http(("POST", "user/register", registered(3)))
            assert status == 409
    assert found[0] == found[1]
    assert len(found[0]) > 10_000


# ---------------------------------------------------------------- HTTP


def registered(user: int) -> dict[str, str]:
    """Return what DeathStarBench's own program sends to register a user."""
    return {
        "first_name": f"first_name_{user}",
        "last_name": f"last_name_{user}",
        "username": f"username_{user}",
        "password": f"password_{user}",
        "user_id": str(user),
    }


def follows(a: int, b: int) -> dict[str, str]:
    return {"user_name": f"username_{a}", "followee_name": f"username_{b}"}


def reads(user: int, start_: int = 0, stop_: int = 10) -> dict[str, str]:
    return {"user_id": str(user), "start": str(start_), "stop": str(stop_)}


def test_all_five_paths_do_what_deathstarbench_expects_of_them(stage: Stage) -> None:
    answers = stage.http(*(("POST", "user/register", registered(user)) for user in range(4)))
    assert answers == [(200, "Success!")] * 4
    answers = stage.http(
        ("POST", "user/follow", follows(1, 0)),
        ("POST", "user/follow", {"user_id": "2", "followee_id": "0"}),
    )
    assert answers == [(200, "Success!")] * 2
    writer = Writer(PROFILES["original"], 4, seed=2)
    made = [writer.compose(0) for _ in range(3)]
    answers = stage.http(*(("POST", "post/compose", form_of(one)) for one in made))
    assert answers == [(200, "Successfully upload post")] * 3
    own, home, other, none, some = stage.http(
        ("GET", "user-timeline/read", reads(0)),
        ("GET", "home-timeline/read", reads(1)),
        ("GET", "home-timeline/read", reads(2)),
        ("GET", "user-timeline/read", reads(1)),
        ("GET", "user-timeline/read", reads(0, 1, 2)),
    )
    posts = json.loads(own[1])
    assert [post["creator"] for post in posts] == [{"user_id": "0", "username": "username_0"}] * 3
    assert [[one["media_id"] for one in post["media"]] for post in posts] == [
        [str(number) for number in one.media_ids] for one in reversed(made)
    ]
    assert home == other == own
    assert none == (200, "[]")
    assert json.loads(some[1]) == posts[1:2]
    stage.drained()


def test_requests_as_wrk2_writes_them_are_understood(stage: Stage) -> None:
    """With the whole URL in the first line, and forms that are not escaped."""
    text = "some text @username_2 http://" + "x" * 64
    body = (
        f'username=username_962&user_id=962&text={text}&media_ids=["000000000000000017","5"]'
        '&media_types=["png","png"]&post_type=0'
    )
    with socket.create_connection(("127.0.0.1", stage.port), 30) as connection:
        answers = connection.makefile("rb")
        for method, path, content in (
            ("POST", "post/compose", body),
            ("POST", "post/compose", "username=username_962&user_id=962&text=t&media_ids=&post_type=0"),
            ("GET", "user-timeline/read?user_id=962&start=0&stop=10", ""),
        ):  # fmt: skip
            connection.sendall(
                f"{method} http://localhost:8080/wrk2-api/{path} HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
            )
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            answer = answers.read(length)
    latest, first = json.loads(answer)
    assert latest["media"] == []
    assert [one["media_id"] for one in first["media"]] == ["17", "5"]
    assert [one["expanded_url"] for one in first["urls"]] == ["http://" + "x" * 64]
    assert first["user_mentions"] == []  # nobody has registered


def test_bad_requests_are_told_from_those_that_failed(stage: Stage) -> None:
    good = form_of(Writer(PROFILES["original"], 4).compose(0))
    missing = ("username", "user_id", "text")
    requests = [
        ("POST", "post/compose", {k: v for k, v in good.items() if k != one}) for one in missing
    ]
    requests += [
        ("POST", "post/compose", {**good, "media_ids": "[1"}),
        ("POST", "post/compose", {**good, "media_ids": '["1"]', "media_types": "[]"}),
        ("POST", "post/compose", {**good, "post_type": "9"}),
        ("POST", "post/compose", {**good, "media_ids": json.dumps(["9" * 20])}),
        ("POST", "user/register", {**registered(1), "user_id": "x"}),
        ("POST", "user/follow", {"user_name": "username_1"}),
        ("GET", "home-timeline/read", {"user_id": "1", "start": "0"}),
        ("GET", "home-timeline/read", {"user_id": str(1 << 70), "start": "0", "stop": "1"}),
        ("GET", "home-timeline/read", {"user_id": "1_0", "start": "0", "stop": "1"}),
        ("GET", "home-timeline/read", {"user_id": "\uff11", "start": "0", "stop": "1"}),
        ("POST", "post/compose", {**good, "media_ids": '["1_0"]'}),
    ]  # fmt: skip
    assert [status for status, _ in stage.http(*requests)] == [400] * len(requests)
    answers = stage.http(
        ("POST", "user/follow", follows(1, 2)),
        ("POST", "user/register", registered(1)),
        ("POST", "user/register", registered(1)),
        ("GET", "nowhere", {}),
        ("GET", "post/compose", {}),
    )
    assert [status for status, _ in answers] == [404, 200, 409, 404, 405]
    stage.drained()


FORM = "application/x-www-form-urlencoded"
PARTS = "multipart/form-data"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FORM, b"username=\xff\xfe&user_id=1&text=\x80"),
        (f"{FORM}; charset=nonsense", b"username=me"),
        (f"{FORM}; charset=ascii", "username=\xe9".encode()),
        (PARTS, b"--B\r\n"),
        (f"{PARTS}; boundary=B", b"--B\r\nxx"),
        (f"{PARTS}; boundary=B", b"--B\r\n\r\nhi\r\n--B--\r\n"),
    ],
)
def test_a_body_that_is_no_form_is_a_bad_request(stage: Stage, kind: str, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stage.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/wrk2-api/post/compose", body, {"Content-Type": kind})
        answer = connection.getresponse()
        assert (answer.status, b"Traceback" in answer.read()) == (400, False)


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize(
    ("victim", "transport"), [("post-storage", "ring"), ("home-timeline", "tcp"), ("proxy", "ring")]
)
def test_a_killed_service_is_a_typed_error_and_503_and_nothing_leaks(
    standing: Standing, transport: str, victim: str
) -> None:
    with staged(standing, transport, apart=victim) as stage:
        writer = stage.fill()
        request = {
            name: Request(Kind.HOME_TIMELINE, 1, name, writer.compose().user_id, 0, 10)
            for name in ("cxl", "cxl-posts")
        }
        for name, one in request.items():  # what is in DM is there because somebody asked
            VARIANTS[name].posts(stage.host, stage.generator(name).ask(one))
        process = stage.processes[victim]
        process.kill()
        for name, one in request.items():
            with pytest.raises((ConnectionError, ServiceNotFound)) as caught:
                stage.generator(name).ask(one)
            assert isinstance(failure_of(caught.value), Unavailable)
        del caught
        compose = form_of(writer.compose())
        answers = stage.http(
            ("GET", "home-timeline/read", reads(request["cxl"].user_id)),
            ("POST", "post/compose", compose),
        )
        assert [status for status, _ in answers] == [503, 503]
        until(lambda: process.id not in {entry["host"] for entry in stage.fabric.host_states()})
        if victim != "post-storage":
            stage.connect("post-storage", PostStorage).evict()
        until(lambda: not any(_held(stage.fabric)))
        assert _held(stage.fabric) == (0, 0)


def _held(fabric: Fabric) -> tuple[int, int]:
    audit = fabric.assert_sound()
    return audit["in_use"], audit["live_refs"]


def test_a_generator_counts_what_failed_and_goes_on(standing: Standing) -> None:
    with staged(standing, "ring", apart="user-timeline") as stage:
        writer = stage.fill()
        stage.processes["user-timeline"].kill()
        one = stage.generator("cxl")
        user = writer.compose().user_id
        requests = [
            Request(kind, i, "cxl", user, 0, 10)
            for i, kind in enumerate((Kind.HOME_TIMELINE, Kind.USER_TIMELINE))
        ]
        tally = one.closed_loop(requests, 0.3, window=2, warm_up=0.0)
        assert {*tally.errors} == {"Unavailable"}
        assert tally.done + tally.errors.total() == tally.offered
        assert tally.done > 0
        assert tally.errors.total() > 0
        until(lambda: stage.fabric.assert_sound()["in_use"] == 0)

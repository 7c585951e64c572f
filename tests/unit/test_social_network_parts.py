"""What the social network is made of and needs no fabric: texts, records, stores, graphs, profiles, services that call nobody."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from examples.social_network import fill, graph, hosts, profiles, roles
from examples.social_network.records import (
    BadRequest,
    Compose,
    Creator,
    Follow,
    Kind,
    Post,
    PostType,
    Register,
    Taken,
    Unknown,
    assemble,
    decoded,
    encoded,
)
from examples.social_network.services import SHORT_URL, MediaService, UniqueId, UrlShorten
from examples.social_network.storage import UserService
from examples.social_network.stores import Stores, Table
from examples.social_network.text import mentions_in, urls_in, with_urls
from examples.social_network.web import json_of
from tests.standing import until

# ---------------------------------------------------------------- texts


def test_names_and_links_are_found_in_a_text() -> None:
    text = "hi @username_1, @b-2 and @username_1: http://one.example/a?b=c#d https://two @ me@mail"
    assert mentions_in(text) == ["username_1", "b-2", "mail"]
    assert urls_in(text) == ["http://one.example/a?b=c#d", "https://two"]


def test_links_are_replaced_in_order_and_nothing_else_is() -> None:
    text = "a http://x b http://y @http c http://x"
    assert with_urls(text, ["1", "2", "3"]) == "a 1 b 2 @http c 3"
    assert with_urls("nothing", []) == "nothing"
    with pytest.raises(ValueError, match="1 links for a text with 3"):
        with_urls(text, ["1"])


# ---------------------------------------------------------------- records


def post(number: int) -> Post:
    return Post(number, Creator(1, "a"), 2, "t" * number, [], [], [], 3, PostType.POST)


@pytest.mark.parametrize("number", [0, 1, 15, 16, 300, 70_000])
def test_posts_that_follow_each_other_are_a_list_to_msgpack(number: int) -> None:
    posts = [post(i % 40) for i in range(number)]
    whole = assemble([msgspec.msgpack.encode(one) for one in posts])
    assert msgspec.msgpack.decode(whole, type=list[Post]) == posts
    assert whole == msgspec.msgpack.encode(posts)


def test_a_body_of_another_kind_is_a_bad_request() -> None:
    body = encoded(Follow("a", "b"))
    assert decoded(body, Follow) == Follow("a", "b")
    for wrong in (None, body[:-1], np.zeros(0, np.uint8), encoded(post(1))):
        with pytest.raises(BadRequest, match="follow request"):
            decoded(wrong, Follow)


def test_json_has_all_numbers_as_strings() -> None:
    [shown] = json.loads(json_of([post(9)]))
    assert shown["post_id"] == "9"
    assert shown["creator"] == {"user_id": "1", "username": "a"}
    assert (shown["req_id"], shown["timestamp"], shown["post_type"]) == ("2", "3", 0)


# ---------------------------------------------------------------- stores


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis server that keeps nothing; give its URL."""
    pytest.importorskip("redis")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    path = folder / "redis.sock"
    words = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder))
    with subprocess.Popen([program, *words], stdout=subprocess.DEVNULL) as server:
        try:
            until(lambda: _listens(path))
            yield f"unix://{path}"
        finally:
            server.kill()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    if request.param != "redis":
        yield Stores(request.param, tmp_path)
        return
    with redis_server(tmp_path) as url:
        yield Stores("redis", tmp_path, url)


def test_timelines_in_redis_are_kept_or_removed_as_asked(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        for temporary in (False, True, False):
            stores = Stores("redis", tmp_path, url, temporary=temporary)
            lines = stores.timelines("home")
            assert lines.slice(1, 0, 9) == ([5] if temporary else [])
            lines.add([1], 5, 50)
            assert lines.slice(1, 0, 9) == [5]
            stores.close()


def test_a_timeline_is_newest_first_and_sliced_like_a_list(stores: Stores) -> None:
    lines = stores.timelines("home")
    for place in (3, 1, 0, 2, 4, 2):  # out of order, and one twice
        lines.add([7, 8], 100 + place, 1000 + place)
    lines.add([8], 1, 1)
    newest = [104, 103, 102, 101, 100]
    for start in range(7):
        for stop in range(8):
            assert lines.slice(7, start, stop) == newest[start:stop]
    assert lines.slice(8, 0, 99) == [*newest, 1]
    for user, start, stop in ((7, -1, 5), (7, 3, 3), (7, 4, 2), (9, 0, 5)):
        assert lines.slice(user, start, stop) == []
    stores.close()


def test_what_sqlite_keeps_is_there_again(tmp_path: Path) -> None:
    first = Stores("sqlite", tmp_path)
    first.table("user").put_all([("ada", (1, "salt", "hash")), ("bob", (2, "", ""))])
    for place in (2, 1, 3):
        first.timelines("home").add([place % 2], place, 10 * place)
    first.close()
    again = Stores("sqlite", tmp_path)
    table = again.table("user")
    assert table.get("ada") == [1, "salt", "hash"]
    assert len(table) == 2
    assert "bob" in table
    assert table.get("eve") is None
    assert again.timelines("home").slice(1, 0, 9) == [3, 1]
    again.close()


def test_a_store_says_what_it_lacks(tmp_path: Path) -> None:
    for arguments in (("tape",), ("redis", tmp_path), ("sqlite",)):
        with pytest.raises(ValueError, match="store"):
            Stores(*arguments)
    assert Table().get("nothing") is None


# ---------------------------------------------------------------- the graph


def test_the_graph_that_comes_along_is_the_one_it_says() -> None:
    edges = graph.read_edges()
    assert (graph.nr_users(edges), len(edges)) == (962, 18_812)
    assert len({frozenset(edge) for edge in edges}) == 18_812
    degree = np.bincount(np.array(edges).ravel())
    assert [int(degree.min()), int(degree.max()), int(np.median(degree))] == [1, 313, 29]
    assert max(max(edge) for edge in graph.part_of(edges, 50)) < 50


def test_a_graph_that_is_made_up_is_connected_and_has_popular_people(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graph, "REED", tmp_path / "nothing")
    edges = graph.default()
    assert edges == graph.made_up()
    assert graph.nr_users(edges) == 962
    assert len({frozenset(edge) for edge in edges}) == len(edges)
    assert all(min(edge) < max(edge) for edge in edges)
    assert {max(edge) for edge in edges} == set(
        range(1, 962)
    )  # each knows somebody who came earlier
    degree = np.bincount(np.array(edges).ravel())
    assert 30 < degree.mean() < 45
    assert degree.max() > 5 * np.median(degree)


def test_other_graphs_can_be_read_and_bad_ones_say_where(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    path.write_text("# two edges\n1 0\n\n2 1\n")
    assert graph.read_edges(path) == [(1, 0), (2, 1)]
    path.write_text("1 0\n2 x\n")
    with pytest.raises(graph.BadGraph, match="line 2"):
        graph.read_edges(path)


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_posts_are_as_their_profile_says(name: str) -> None:
    profile = profiles.PROFILES[name]
    writer = profiles.Writer(profile, 962, seed=3)
    for first in (False, True):
        mentions, urls, media = (
            (profile.first_mentions, profile.first_urls, profile.first_media)
            if first
            else (profile.mentions, profile.urls, profile.media)
        )
        for _ in range(50):
            made = writer.compose(5, first=first)
            assert made.username == "username_5"
            names = mentions_in(made.text)
            assert "username_5" not in names
            assert all(0 <= int(one.removeprefix("username_")) < 962 for one in names)
            assert len(names) <= mentions[1]
            assert urls[0] <= len(urls_in(made.text)) <= urls[1]
            assert media[0] <= len(made.media_ids) <= media[1]
            assert {len(content) for content in made.contents} <= {profile.content}
            assert all(number < 10**18 for number in made.media_ids)


def test_stored_posts_are_as_large_as_the_profiles_say() -> None:
    sizes = {}
    for name, profile in profiles.PROFILES.items():
        made = fill.first_posts(60, profiles.Writer(profile, 962))
        sizes[name] = np.mean([len(encoded(post)) for post in made])
    assert 650 < sizes["original"] < 900
    assert 2700 < sizes["heavy"] < 3300
    assert sizes["media"] > 32 << 10


def test_requests_are_a_mix_and_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[bytes]:
        writer = profiles.Writer(profiles.PROFILES["original"], 100, seed)
        return [
            msgspec.msgpack.encode(writer.request(i, "cxl"), enc_hook=bytes) for i in range(3000)
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    writer = profiles.Writer(profiles.PROFILES["original"], 100, 1)
    made = [writer.request(i, "cxl") for i in range(3000)]
    share = {kind: sum(one.kind == kind for one in made) / 3000 for kind in profiles.MIX}
    for kind, wanted in profiles.MIX.items():
        assert share[kind] == pytest.approx(wanted, abs=0.03)
    reads = [one for one in made if one.kind != Kind.COMPOSE]
    assert {one.start for one in reads} == set(range(101))
    assert {one.stop - one.start for one in reads} == {10}


def test_a_form_says_the_same_as_the_record() -> None:
    made = profiles.Writer(profiles.PROFILES["original"], 10).compose()
    form = profiles.form_of(made)
    assert [int(one) for one in json.loads(form["media_ids"])] == made.media_ids
    assert form["text"] == made.text


# ---------------------------------------------------------------- services that call nobody


def test_numbers_of_posts_are_unique_and_in_the_order_of_time() -> None:
    service, other = UniqueId(3), UniqueId(4)
    made = [service.compose(PostType.POST) for _ in range(20_000)]
    assert sorted(set(made)) == made
    assert all(0 < number < 1 << 63 for number in made)
    assert not {other.compose(PostType.POST) for _ in range(1000)} & {*made}


def test_users_are_registered_once_and_know_their_password() -> None:
    users = UserService(Stores())
    users.register(Register("A", "B", "ada", "secret", 5))
    with pytest.raises(Taken, match="'ada'"):
        users.register_all([Register("", "", "bob", "", 6), Register("", "", "ada", "", 7)])
    with pytest.raises(Unknown):
        users.user_id("bob")  # all of them or none
    assert users.user_id("ada") == users.login("ada", "secret") == 5
    for name, password in (("ada", "Secret"), ("ada", ""), ("bob", "secret")):
        with pytest.raises(PermissionError):
            users.login(name, password)
    assert [one.user_id for one in users.find(["bob", "ada"])] == [5]
    assert users.creator_named("ada") == Creator(5, "ada")


def test_short_links_lead_to_long_ones() -> None:
    service = UrlShorten(Stores())
    made = service.compose(["http://a", "http://b", "http://a"])
    assert [one.expanded_url for one in made] == ["http://a", "http://b", "http://a"]
    assert len({one.shortened_url for one in made}) == 3
    assert all(len(one.shortened_url) == len(SHORT_URL) + 10 for one in made)
    assert service.expand(made[1].shortened_url) == "http://b"
    assert service.expand(SHORT_URL) == ""


def test_media_are_zipped_and_must_be_as_many_as_their_types() -> None:
    service = MediaService()
    assert [one.media_id for one in service.compose(["png", "gif"], [1, 2])] == [1, 2]
    for types, ids, contents in ((["png"], [1, 2], []), (["png"], [1], [b"", b""])):
        with pytest.raises(BadRequest):
            service.compose(types, ids, contents)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("compact", [False, True])
def test_every_process_comes_before_those_that_it_calls(compact: bool) -> None:
    names = roles.process_names(compact=compact)
    assert len(names) == (9 if compact else 14)
    assert sorted(one for name in names for one in roles.services_in(name)) == sorted(
        roles.service_names()
    )
    place = {one: names.index(name) for name in names for one in roles.services_in(name)}
    for name in names:
        for called in roles.called_by(name):
            assert place[called.removesuffix("/front")] > names.index(name)
    assert {name for name in names if name in roles.MOVERS} == {*roles.MOVERS}  # never in one


def test_the_programs_of_a_run_are_told_what_all_have_to_agree_about() -> None:
    made = hosts.programs(["--store", "memory", "--compact", "--rounds", "1"])
    assert len(made) == 10
    assert made[0].endswith("session:main --store memory --compact --rounds 1")
    assert all("--store memory" in one and "--rounds" not in one for one in made[1:])


def test_a_compose_of_the_heavy_profile_can_be_read_back() -> None:
    made = profiles.Writer(profiles.PROFILES["heavy"], 10).compose()
    assert decoded(encoded(made), Compose) == made

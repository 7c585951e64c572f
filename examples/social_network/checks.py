"""Whether the application does what it is for: what every run asserts before it measures.

1. A post that is composed is visible in its author's user timeline, and in the home timelines of all who follow him and of
   all whom it mentions, as it was written.
2. Timelines are newest first.
3. A timeline has the same bytes by every variant.
4. When nothing is under way nothing is held in DM, beyond the posts that cxl-posts keeps there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.fabric import device

from .load import Generator
from .profiles import Writer
from .records import Compose, Kind, Post, Request, encoded
from .storage import SocialGraph
from .text import mentions_in, urls_in
from .variants import raw

DRAIN_SECONDS = 10.0
REQ_ID = 1 << 40  # of the checks: beyond those of any load


class Wrong(Exception):
    """The application has done something that it must not."""


def timeline(one: Generator, kind: Kind, user: int, start: int = 0, stop: int = 10) -> list[Post]:
    """Return posts of a timeline.

    Raises:
        Wrong: they are not newest first.
    """
    reply = one.ask(Request(kind, REQ_ID, one.variant.name, user, start, stop))
    posts = one.variant.posts(one.host, reply)
    times = [post.timestamp for post in posts]
    if times != sorted(times, reverse=True):
        raise Wrong(f"{kind.name} of {user}: not newest first")
    return posts


def check_composed(
    host: dmrpc_cxl.Host, one: Generator, compose: Compose, req_id: int = REQ_ID
) -> int:
    """Compose a post, and look for it on all timelines it belongs on; return how many these are.

    Raises:
        Wrong: it is not there, or another.
    """
    one.ask(Request(Kind.COMPOSE, req_id, one.variant.name, compose.user_id, body=encoded(compose)))
    graph_there: Any = host.connect("social-graph", SocialGraph)
    with graph_there as graph:
        followers = graph.followers(compose.user_id)
    names = mentions_in(compose.text)
    own = timeline(one, Kind.USER_TIMELINE, compose.user_id)
    found = next((post for post in own if post.req_id == req_id), None)
    if found is None:
        raise Wrong(f"the post is not on the timeline of its author, {compose.user_id}")
    expected = (
        compose.user_id, compose.username, names, urls_in(compose.text), compose.media_ids, compose.media_types,
    )  # fmt: skip
    is_there = (
        found.creator.user_id,
        found.creator.username,
        [mention.username for mention in found.user_mentions],
        [url.expanded_url for url in found.urls],
        [media.media_id for media in found.media],
        [media.media_type for media in found.media],
    )
    if is_there != expected or urls_in(found.text) != [url.shortened_url for url in found.urls]:
        raise Wrong(f"the post was composed as {expected}, and is {is_there}")
    readers = {*followers, *(mention.user_id for mention in found.user_mentions)}
    for reader in readers:
        if found not in timeline(one, Kind.HOME_TIMELINE, reader):
            raise Wrong(f"the post of {compose.user_id} is not on the home timeline of {reader}")
    return 1 + len(readers)


def check_same(
    host: dmrpc_cxl.Host, generators: Mapping[str, Generator], users: Iterable[int]
) -> int:
    """Compare timelines by all variants; return how many posts were compared.

    Raises:
        Wrong: they differ.
    """
    nr_posts = 0
    for user in users:
        for kind in (Kind.HOME_TIMELINE, Kind.USER_TIMELINE):
            found = {}
            for name, one in generators.items():
                reply = one.ask(Request(kind, REQ_ID, name, user, 0, 10))
                found[name] = raw(host, reply)
                del reply
            if len(set(found.values())) != 1:
                sizes = {name: len(data) for name, data in found.items()}
                raise Wrong(f"{kind.name} of {user} differs: {sizes} bytes")
            first = next(iter(generators.values()))
            nr_posts += len(timeline(first, kind, user))
    return nr_posts


def check_drained(fabric: str, storage: Any) -> None:
    """Check that nothing is held in DM once the posts that lie there were taken out.

    Args:
        storage: a client of PostStorage.

    Raises:
        Wrong: something is, and stays so.
    """
    storage.evict()
    give_up = time.monotonic() + DRAIN_SECONDS
    while True:
        with device.open(fabric, writable=False) as opened:
            audit = opened.audit()
        held = {what: audit[what] for what in ("in_use", "live_refs", "nr_violations")}
        if not any(held.values()):
            return
        if time.monotonic() > give_up:
            raise Wrong(f"nothing is under way, and yet: {held}")
        time.sleep(0.005)


def check_all(
    host: dmrpc_cxl.Host,
    generators: Mapping[str, Generator],
    writer: Writer,
    storage: Any,
    users: Sequence[int],
) -> tuple[int, int]:
    """Run all checks; return how many timelines had a new post, and how many posts were compared.

    Raises:
        Wrong: see above.
    """
    nr_timelines = 0
    for place, (author, one) in enumerate(zip(itertools.cycle(users), generators.values())):
        nr_timelines += check_composed(host, one, writer.compose(author), REQ_ID + place)
    nr_posts = check_same(host, generators, users)
    check_drained(host.fabric, storage)
    return nr_timelines, nr_posts

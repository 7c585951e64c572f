"""What there is to begin with: users, who follows whom, and posts; straight into the services that keep them.

Over HTTP the same is done by DeathStarBench's own program, or register(), one by one. This is for runs that want to begin
soon: thousands of records in each call. What is kept is the same.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import dmrpc_cxl

from . import services, storage
from .profiles import Writer, user_name
from .records import Creator, Post, Register, Url, UserMention, encoded
from .text import mentions_in, urls_in, with_urls

BATCH_BYTES = 4 << 20
BATCH = 2000
T = TypeVar("T")


def register_of(user_id: int) -> Register:
    """Return a user to be."""
    return Register(
        f"first_name_{user_id}", f"last_name_{user_id}", user_name(user_id), f"password_{user_id}", user_id,
    )  # fmt: skip


def _batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def fill(host: dmrpc_cxl.Host, edges: list[tuple[int, int]], users: int, writer: Writer) -> int:
    """Have services keep users 0 to users - 1, both directions of each edge, and the first posts; return how many posts.

    Authors take turns; a timestamp is a millisecond after the one before it, and all are over by now.

    Raises:
        DmError: a service failed.
    """
    follows = [pair for a, b in edges for pair in ((a, b), (b, a))]
    users_there: Any = host.connect("user", storage.UserService)
    graph_there: Any = host.connect("social-graph", storage.SocialGraph)
    with users_there as user, graph_there as graph:
        for registers in _batches(map(register_of, range(users))):
            user.register_all(registers)
        for pairs in _batches(follows):
            graph.follow_all(pairs)
    followers: defaultdict[int, list[int]] = defaultdict(list)
    for who, whom in follows:
        followers[whom].append(who)
    posts = first_posts(users, writer)
    stored, own, home = [], [], []
    for post in posts:
        stored.append((post.post_id, bytes(encoded(post))))
        own.append((post.post_id, post.creator.user_id, post.timestamp))
        mentioned = [one.user_id for one in post.user_mentions]
        readers = list(dict.fromkeys((*followers[post.creator.user_id], *mentioned)))
        home.append((post.post_id, post.timestamp, readers))
    _store(host, "post-storage", storage.PostStorage, "store_all", stored)
    _store(host, "user-timeline", storage.UserTimeline, "write_all", own)
    _store(host, "home-timeline", storage.HomeTimeline, "write_all", home)
    return len(posts)


def _store(host: dmrpc_cxl.Host, name: str, kind: type[Any], method: str, rows: list[Any]) -> None:
    size = BATCH
    if rows and isinstance(rows[0][1], bytes):
        size = max(BATCH_BYTES // max(len(row[1]) for row in rows), 1)
    with host.connect(name, kind, transfer="value") as client:
        for batch in _batches(rows, size):
            getattr(client, method)(batch)


def first_posts(users: int, writer: Writer) -> list[Post]:
    """Make posts as compose-post would."""
    authors = [user for user in range(users) for _ in range(writer.nr_first_posts())]
    # In turn, by rounds: no user's posts are all older than another's.
    turn: defaultdict[int, int] = defaultdict(int)
    order = []
    for author in authors:
        turn[author] += 1
        order.append((turn[author], author))
    order.sort()
    unique_id, media = services.UniqueId(0x7FF), services.MediaService()
    now = time.time_ns() // 1_000_000 - len(order)
    made = []
    for place, (_, author) in enumerate(order):
        wanted = writer.compose(author, first=True)
        urls = [
            Url(f"{services.SHORT_URL}{place:06d}{i:04d}", url)
            for i, url in enumerate(urls_in(wanted.text))
        ]
        mentions = [
            UserMention(int(name.removeprefix("username_")), name)
            for name in mentions_in(wanted.text)
        ]
        made.append(
            Post(
                unique_id.compose(wanted.post_type),
                Creator(author, wanted.username),
                place,
                with_urls(wanted.text, [url.shortened_url for url in urls]),
                mentions,
                media.compose(wanted.media_types, wanted.media_ids, wanted.contents),
                urls,
                now + place,
                wanted.post_type,
            )
        )
    return made

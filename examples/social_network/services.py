"""The services that keep nothing: composing a post, and what helps with it; and who is asked first, in front.

compose-post ─┬▶ text ─┬▶ url-shorten           then, one after the other: post-storage, user-timeline, home-timeline,
              │        └▶ user-mention ─▶ user  so that no timeline names a post that is not there yet
              ├▶ user, media, unique-id
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from dmrpc_cxl.errors import DmError
from dmrpc_cxl.rpc import Passing

from ..serving.running import Counting
from .records import (
    BadRequest,
    Compose,
    Front,
    Header,
    Kind,
    Media,
    Post,
    PostType,
    Reply,
    Request,
    Text,
    Url,
    UserMention,
    decoded,
    encoded,
    failure_of,
)
from .storage import HomeTimeline, PostStorage, UserService, UserTimeline, variant_of
from .text import mentions_in, urls_in, with_urls

SHORT_URL = "http://short-url/"
SHORT_CHARACTERS = 10
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
EPOCH_MS = 1_514_764_800_000  # 2018-01-01


class Dispatcher(Counting):
    """Says which service carries a request out: the route of php-fpm, which is a Forwarder."""

    def __init__(self, services: dict[Kind, str]) -> None:
        super().__init__()
        self._services = dict(services)

    def __call__(self, passing: Passing) -> str:
        """Return the name of the service for a request; raise BadRequest if its variant is none."""
        header = passing.first(Header)
        variant_of(header)
        self.count(header.kind.name.lower().replace("_", "-"))
        return self._services[header.kind]


class Entrance(Front):
    """What is behind php-fpm, with the one method that all services there have."""

    def __init__(self, carry_out: Callable[[Request], Reply]) -> None:
        self._carry_out = carry_out

    def handle(self, request: Request) -> Reply:
        """See Front; what went wrong further behind is raised as if it had happened here."""
        try:
            return self._carry_out(request)
        except DmError as error:
            failure = failure_of(error)
            if failure is None:
                raise
        raise failure


class UniqueId:
    """Numbers that no two posts share: the machine, milliseconds since 2018, a counter; 63 bits, in the order of time.

    Args:
        machine: what no other process of this service has, 11 bits; None: drawn.
    """

    def __init__(self, machine: int | None = None) -> None:
        self._machine = (secrets.randbits(11) if machine is None else machine) & 0x7FF
        self._lock = threading.Lock()
        self._now = self._counter = 0

    def compose(self, post_type: PostType) -> int:
        """Return a new number."""
        with self._lock:
            now = max(time.time_ns() // 1_000_000 - EPOCH_MS, self._now)
            self._counter = self._counter + 1 if now == self._now else 0
            if (
                self._counter > 0xFFF
            ):  # more than the counter holds in one millisecond: borrow from the next
                now, self._counter = now + 1, 0
            self._now = now
            return self._machine << 52 | (now & 0xFF_FFFF_FFFF) << 12 | self._counter


class MediaService:
    """Media of a post."""

    def compose(
        self, types: list[str], ids: list[int], contents: list[bytes] | None = None
    ) -> list[Media]:
        """Return media made of their types, numbers and, if there are any, contents.

        Raises:
            BadRequest: not as many of one as of the other.
        """
        contents = contents or [b""] * len(ids)
        if not len(types) == len(ids) == len(contents):
            raise BadRequest(f"{len(ids)} media with {len(types)} types, {len(contents)} contents")
        return [Media(*each) for each in zip(ids, types, contents, strict=True)]


class UrlShorten(Counting):
    """Short links for long ones; keeps both."""

    def __init__(self, stores: Any) -> None:
        super().__init__()
        self._urls = stores.table("url")
        self._kept = threading.Lock()

    def compose(self, urls: list[str]) -> list[Url]:
        """Return a short link for each."""
        made = [
            Url(SHORT_URL + "".join(map(_letter, range(SHORT_CHARACTERS))), url) for url in urls
        ]
        with self._kept:
            self._urls.put_all([(one.shortened_url, one.expanded_url) for one in made])
        return made

    def expand(self, short: str) -> str:
        """Return the long link of a short one; empty if there is none."""
        with self._kept:
            return str(self._urls.get(short) or "")


def _letter(_: int) -> str:
    return secrets.choice(_LETTERS)


class UserMentions(Counting):
    """Which of the names in a text are users; asks the user service for those that it does not know yet."""

    def __init__(self, users: UserService) -> None:
        super().__init__()
        self._users = users
        self._known: dict[str, UserMention] = {}

    def compose(self, usernames: list[str]) -> list[UserMention]:
        """Return the users among these."""
        missing = [name for name in usernames if name not in self._known]
        if missing:
            self.count("asked")
            self._known.update((one.username, one) for one in self._users.find(missing))
        return [self._known[name] for name in usernames if name in self._known]


class TextService:
    """What is in a text."""

    def __init__(self, urls: Any, mentions: Any) -> None:
        self._urls = urls
        self._mentions = mentions

    def compose(self, text: str) -> Text:
        """Return a text with short links, and the users and links in it."""
        urls = self._urls.future.compose(urls_in(text))
        mentions = self._mentions.future.compose(mentions_in(text))
        shortened: list[Url] = urls.result()
        text = with_urls(text, [one.shortened_url for one in shortened])
        return Text(text, mentions.result(), shortened)


class ComposePost(Counting):
    """Makes a post of what somebody wants to say, and has it kept.

    Args:
        posts: clients of PostStorage, by variant.
    """

    def __init__(
        self,
        *,
        text: Any,
        user: Any,
        media: Any,
        unique_id: Any,
        posts: dict[str, PostStorage],
        user_timeline: UserTimeline,
        home_timeline: HomeTimeline,
    ) -> None:
        super().__init__()
        self._text = text
        self._user = user
        self._media = media
        self._unique_id = unique_id
        self._posts = posts
        self._user_timeline = user_timeline
        self._home_timeline = home_timeline

    def handle(self, request: Request) -> Reply:
        """See Front: a Compose."""
        variant = variant_of(request).name
        wanted = decoded(request.body, Compose)
        text = self._text.future.compose(wanted.text)
        creator = self._user.future.creator(wanted.user_id, wanted.username)
        media = self._media.future.compose(wanted.media_types, wanted.media_ids, wanted.contents)
        unique_id = self._unique_id.future.compose(wanted.post_type)
        timestamp = time.time_ns() // 1_000_000
        found: Text = text.result()
        post = Post(
            unique_id.result(),
            creator.result(),
            request.req_id,
            found.text,
            found.user_mentions,
            media.result(),
            found.urls,
            timestamp,
            wanted.post_type,
        )
        self._posts[variant].store(post.post_id, encoded(post))
        self._user_timeline.write(post.post_id, wanted.user_id, timestamp)
        mentioned = [one.user_id for one in found.user_mentions]
        self._home_timeline.write(post.post_id, wanted.user_id, timestamp, mentioned)
        self.count("posts")
        return Reply(request.req_id)

"""Which requests are made: what is in posts, who reads what, how often; all of it drawn from one seed."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

from .records import Compose, Kind, PostType, Request, encoded

MIX = {Kind.HOME_TIMELINE: 0.6, Kind.USER_TIMELINE: 0.3, Kind.COMPOSE: 0.1}
READ_AT_ONCE = 10
_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Profile:
    """What posts and requests look like; pairs are the least and the most.

    Attributes:
        text: characters, before mentions and links.
        mentions, urls, media: in a post that is composed under load.
        first_mentions, first_urls, first_media: in those that there are to begin with.
        first_posts: of each user.
        start: where a read begins.
        content: bytes in each of the media; 0: they are kept elsewhere.
    """

    name: str
    about: str
    text: int
    mentions: tuple[int, int]
    urls: tuple[int, int]
    media: tuple[int, int]
    first_mentions: tuple[int, int]
    first_urls: tuple[int, int]
    first_media: tuple[int, int]
    first_posts: tuple[int, int]
    start: tuple[int, int]
    content: int = 0


_FIVE = (5, 5)
PROFILES = {
    one.name: one
    for one in (
        Profile(
            "original", "as DeathStarBench makes them: short posts, reads that begin anywhere", 256,
            (1, 6), (1, 6), (1, 5), (0, 5), (0, 5), (0, 5), (0, 20), (0, 100),
        ),
        Profile(
            "heavy", "posts of 3 KB, ten in each read", 2000,
            _FIVE, _FIVE, _FIVE, _FIVE, _FIVE, _FIVE, (10, 10), (0, 0),
        ),
        Profile(
            "media", "as heavy, but with a picture of 32 KiB in each post; ours, not DeathStarBench's", 2000,
            _FIVE, _FIVE, (1, 1), _FIVE, _FIVE, (1, 1), (10, 10), (0, 0), 32 << 10,
        ),
    )
}  # fmt: skip


def user_name(user_id: int) -> str:
    """Return the name of a user."""
    return f"username_{user_id}"


class Writer:
    """Draws posts and requests.

    Args:
        users: how many there are.
    """

    def __init__(self, profile: Profile, users: int, seed: int = 1) -> None:
        if users < 2:
            raise ValueError(f"{users} users: nobody to mention")
        self.profile = profile
        self._users = users
        self._random = random.Random(seed)

    def _of(self, least_and_most: tuple[int, int]) -> int:
        return self._random.randint(*least_and_most)

    def _characters(self, number: int) -> str:
        return "".join(self._random.choices(_CHARACTERS, k=number))

    def compose(self, user_id: int | None = None, *, first: bool = False) -> Compose:
        """Return a post to be; first: one of those that there are to begin with."""
        profile, draw = self.profile, self._random
        user_id = draw.randrange(self._users) if user_id is None else user_id
        words = [self._characters(profile.text)]
        for _ in range(self._of(profile.first_mentions if first else profile.mentions)):
            other = draw.randrange(self._users - 1)
            words.append(f"@{user_name(other + (other >= user_id))}")
        for _ in range(self._of(profile.first_urls if first else profile.urls)):
            words.append(f"http://{self._characters(64)}")
        ids = [
            int("".join(draw.choices(string.digits, k=18)))
            for _ in range(self._of(profile.first_media if first else profile.media))
        ]
        contents = [draw.randbytes(profile.content) for _ in ids] if profile.content else []
        return Compose(
            user_name(user_id), user_id, " ".join(words), ids, ["png"] * len(ids), PostType.POST, contents,
        )  # fmt: skip

    def nr_first_posts(self) -> int:
        """Return how many posts a user has to begin with."""
        return self._of(self.profile.first_posts)

    def request(self, req_id: int, variant: str) -> Request:
        """Return a request of the mix."""
        [kind] = self._random.choices(list(MIX), list(MIX.values()))
        if kind == Kind.COMPOSE:
            return Request(kind, req_id, variant, body=encoded(self.compose()))
        start = self._of(self.profile.start)
        user = self._random.randrange(self._users)
        return Request(kind, req_id, variant, user, start, start + READ_AT_ONCE)

    def requests(self, variant: str) -> Iterator[Request]:
        """Yield requests of the mix, without end."""
        req_id = 0
        while True:
            req_id += 1
            yield self.request(req_id, variant)


def form_of(compose: Compose) -> dict[str, str]:
    """Return a post to be as the fields of an HTTP form."""
    return {
        "username": compose.username,
        "user_id": str(compose.user_id),
        "text": compose.text,
        "media_ids": json.dumps([str(number) for number in compose.media_ids]),
        "media_types": json.dumps(compose.media_types),
        "post_type": str(int(compose.post_type)),
    }

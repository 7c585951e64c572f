"""The services that keep something: users, who follows whom, posts, and the timelines.

Each holds a lock around what it keeps, and calls others outside of it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading

import numpy as np

import dmrpc_cxl

from ..serving.running import Counting
from .records import (
    BadRequest,
    Bytes,
    Creator,
    Follow,
    Header,
    Register,
    Reply,
    Request,
    Taken,
    Unknown,
    UserMention,
    decoded,
)
from .stores import Stores
from .variants import VARIANTS, Shelf, Variant

SALT_CHARACTERS = 32


def variant_of(header: Header) -> Variant:
    """Return the variant that a request names; raise BadRequest if there is none."""
    variant = VARIANTS.get(header.variant)
    if variant is None:
        raise BadRequest(f"no variant {header.variant!r}: use one of {', '.join(VARIANTS)}")
    return variant


class UserService:
    """Users by name, and their passwords, salted and hashed."""

    def __init__(self, stores: Stores) -> None:
        self._users = stores.table("user")  # name: (number, salt, hash)
        self._lock = threading.Lock()

    def register(self, register: Register) -> None:
        """Keep a new user.

        Raises:
            Taken: the name is somebody's already.
        """
        self.register_all([register])

    def register_all(self, registers: list[Register]) -> None:
        """Keep new users, all of them or none. Raises as register()."""
        rows = []
        for one in registers:
            salt = secrets.token_hex(SALT_CHARACTERS // 2)
            rows.append((one.username, (one.user_id, salt, _hashed(one.password, salt))))
        with self._lock:
            for name, _ in rows:
                if name in self._users:
                    raise Taken(f"there is a user {name!r} already")
            self._users.put_all(rows)

    def login(self, username: str, password: str) -> int:
        """Return the number of a user who knows the password.

        Raises:
            PermissionError: there is no such user, or it is another password.
        """
        with self._lock:
            found = self._users.get(username)
        number, salt, kept = found or (-1, "", "")
        if not hmac.compare_digest(kept, _hashed(password, salt)):
            raise PermissionError(f"{username!r}: no such user, or another password")
        return int(number)

    def user_id(self, username: str) -> int:
        """Return the number of a user; raise Unknown if there is none of that name."""
        with self._lock:
            found = self._users.get(username)
        if found is None:
            raise Unknown(f"no user {username!r}")
        return int(found[0])

    def find(self, usernames: list[str]) -> list[UserMention]:
        """Return those of the users that there are."""
        with self._lock:
            found = [(name, self._users.get(name)) for name in usernames]
        return [UserMention(user[0], name) for name, user in found if user is not None]

    def creator(self, user_id: int, username: str) -> Creator:
        """Return who writes a post, as he says."""
        return Creator(user_id, username)

    def creator_named(self, username: str) -> Creator:
        """Return who writes a post; raise Unknown if there is no such user."""
        return Creator(self.user_id(username), username)

    def handle(self, request: Request) -> Reply:
        """See Front: a Register."""
        self.register(decoded(request.body, Register))
        return Reply(request.req_id)


def _hashed(password: str, salt: str) -> str:
    return hashlib.sha256((password + salt).encode()).hexdigest()


class SocialGraph:
    """Who follows whom.

    Args:
        users: a client of UserService, for names.
    """

    def __init__(self, stores: Stores, users: UserService) -> None:
        self._followers = stores.table("followers")  # number: numbers
        self._followees = stores.table("followees")
        self._users = users
        self._lock = threading.Lock()

    def followers(self, user_id: int) -> list[int]:
        """Return who follows a user."""
        with self._lock:
            return list(self._followers.get(user_id) or ())

    def followees(self, user_id: int) -> list[int]:
        """Return whom a user follows."""
        with self._lock:
            return list(self._followees.get(user_id) or ())

    def follow(self, user_id: int, followee_id: int) -> None:
        """Have a user follow another, if he does not."""
        self.follow_all([(user_id, followee_id)])

    def unfollow(self, user_id: int, followee_id: int) -> None:
        """End that, if it is so."""
        with self._lock:
            for table, key, value in (
                (self._followees, user_id, followee_id),
                (self._followers, followee_id, user_id),
            ):
                table.put(key, [one for one in table.get(key) or () if one != value])

    def follow_all(self, pairs: list[tuple[int, int]]) -> None:
        """Have users follow others: pairs of who follows, and whom."""
        with self._lock:
            for table, each in (
                (self._followees, pairs),
                (self._followers, [(followee, user) for user, followee in pairs]),
            ):
                changed: dict[int, dict[int, None]] = {}
                for key, value in each:
                    if key not in changed:
                        changed[key] = dict.fromkeys(table.get(key) or ())
                    changed[key][value] = None
                table.put_all([(key, list(values)) for key, values in changed.items()])

    def handle(self, request: Request) -> Reply:
        """See Front: a Follow."""
        wanted = decoded(request.body, Follow)
        pair = wanted.user_id, wanted.followee_id
        if wanted.user_name and wanted.followee_name:
            pair = self._users.user_id(wanted.user_name), self._users.user_id(wanted.followee_name)
        if min(pair) < 0:
            raise BadRequest("who shall follow whom? by names, or by numbers")
        self.follow(*pair)
        return Reply(request.req_id)


class Posts(Shelf):
    """Posts by number, encoded; in DM as well, once somebody asks for one there.

    Context: a read takes no lock for what never changes; making a post resident, and taking it out again, does.
    """

    def __init__(self, host: dmrpc_cxl.Host, stores: Stores) -> None:
        self.host = host
        self._posts = stores.table("post")
        self._resident: dict[int, dmrpc_cxl.Ref] = {}
        self._lock = threading.Lock()

    def put_all(self, posts: list[tuple[int, bytes]]) -> None:
        """Keep posts."""
        with self._lock:
            self._posts.put_all(posts)

    def encoded(self, post_id: int) -> bytes:
        """See Shelf."""
        post: bytes | None = self._posts.get(post_id)
        if post is None:
            raise Unknown(f"no post {post_id}")
        return post

    def resident(self, post_id: int) -> dmrpc_cxl.Ref:
        """See Shelf."""
        with self._lock:
            ref = self._resident.get(post_id)
            if ref is None:
                post = self.encoded(post_id)
                buffer = self.host.ralloc(len(post), zero=False)
                buffer.numpy(np.uint8)[: len(post)] = np.frombuffer(post, np.uint8)
                ref = self._resident[post_id] = self.host.create_ref(buffer, move=True)
            return ref.clone()

    def nr_resident(self) -> int:
        """Return how many posts lie in DM."""
        return len(self._resident)

    def evict(self) -> None:
        """Take all posts out of DM again."""
        with self._lock:
            while self._resident:
                self._resident.popitem()[1].drop()


class PostStorage(Counting):
    """Posts by number; lists of them are made here, for every variant."""

    def __init__(self, host: dmrpc_cxl.Host, stores: Stores) -> None:
        super().__init__()
        self._posts = Posts(host, stores)

    def store(self, post_id: int, post: Bytes) -> None:
        """Keep a post."""
        self._posts.put_all([(post_id, post.tobytes())])

    def store_all(self, posts: list[tuple[int, bytes]]) -> None:
        """Keep posts."""
        self._posts.put_all(posts)

    def read(self, req_id: int, ids: list[int], variant: str) -> Reply:
        """Return posts in the order in which they were asked for.

        Raises:
            Unknown: one of them is not there.
            BadRequest: one is asked for twice, or there is no such variant.
        """
        if len(set(ids)) != len(ids) or variant not in VARIANTS:
            raise BadRequest("a post is asked for twice, or by a variant that there is not")
        self.count("reads")
        return VARIANTS[variant].reply(self._posts, req_id, ids)

    def nr_resident(self) -> int:
        """Return how many posts lie in DM."""
        return self._posts.nr_resident()

    def evict(self) -> None:
        """Take all posts out of DM; they come back when they are asked for there."""
        self._posts.evict()


class _Timeline:
    """What both timelines do when they are read.

    Args:
        posts: clients of PostStorage, by variant.
    """

    def __init__(self, stores: Stores, name: str, posts: dict[str, PostStorage]) -> None:
        self._lines = stores.timelines(name)
        self._posts = posts
        self._lock = threading.Lock()

    def read(self, request: Request) -> Reply:
        """Return the posts from start on, before stop, newest first; none if these make no sense."""
        variant = variant_of(request).name
        with self._lock:
            ids = self._lines.slice(request.user_id, request.start, request.stop)
        if not ids:
            return Reply(request.req_id)
        return self._posts[variant].read(request.req_id, ids, variant)


class UserTimeline(_Timeline):
    """What each user has written."""

    def __init__(self, stores: Stores, posts: dict[str, PostStorage]) -> None:
        super().__init__(stores, "user-timeline", posts)

    def write(self, post_id: int, user_id: int, timestamp: int) -> None:
        """Put a post on the timeline of its author."""
        self.write_all([(post_id, user_id, timestamp)])

    def write_all(self, rows: list[tuple[int, int, int]]) -> None:
        """Put posts on timelines: numbers of post and author, timestamp."""
        with self._lock:
            for post_id, user_id, timestamp in rows:
                self._lines.add((user_id,), post_id, timestamp)

    def handle(self, request: Request) -> Reply:
        """See Front: a read."""
        return self.read(request)


class HomeTimeline(_Timeline):
    """What those have written whom a user follows, and where he is mentioned.

    Args:
        graph: a client of SocialGraph.
    """

    def __init__(self, stores: Stores, posts: dict[str, PostStorage], graph: SocialGraph) -> None:
        super().__init__(stores, "home-timeline", posts)
        self._graph = graph

    def write(self, post_id: int, user_id: int, timestamp: int, mentioned: list[int]) -> None:
        """Put a post on the timelines of all who follow its author, or are mentioned."""
        readers = dict.fromkeys((*self._graph.followers(user_id), *mentioned))
        with self._lock:
            self._lines.add(readers, post_id, timestamp)

    def write_all(self, rows: list[tuple[int, int, list[int]]]) -> None:
        """Put posts on timelines: number of the post, timestamp, whose timelines."""
        with self._lock:
            for post_id, timestamp, readers in rows:
                self._lines.add(readers, post_id, timestamp)

    def handle(self, request: Request) -> Reply:
        """See Front: a read."""
        return self.read(request)

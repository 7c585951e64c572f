"""Where services keep things. All reads are answered from memory; what is written goes to a file as well, and is read at the start.

    memory    nothing else
    sqlite    one file for each service, in WAL mode; `synchronous` off, as for a cache that can be filled again
    redis     timelines are sorted sets in a Redis server; the rest as sqlite

One thread at a time: services hold their lock.
"""

from __future__ import annotations

import bisect
import importlib
import sqlite3
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec


class Table:
    """Values by key, both anything that msgpack holds; in memory, and in a SQLite file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self._values: dict[Any, Any] = {}
        self._db = None if path is None else _opened(path)
        if self._db is not None:
            self._db.execute("CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB)")
            for key, value in self._db.execute("SELECT key, value FROM kept"):
                self._values[msgspec.msgpack.decode(key)] = msgspec.msgpack.decode(value)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def get(self, key: Any) -> Any:
        """Return the value, or None."""
        return self._values.get(key)

    def put(self, key: Any, value: Any) -> None:
        """Keep a value in place of the one there was."""
        self.put_all(((key, value),))

    def put_all(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Keep values in place of those there were; in a file, all of them or none."""
        pairs = list(pairs)
        if self._db is not None:
            encode = msgspec.msgpack.encode
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO kept VALUES (?, ?)",
                [(encode(key), encode(value)) for key, value in pairs],
            )
            self._db.execute("COMMIT")
        self._values.update(pairs)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()


class Timelines(ABC):
    """For each user the numbers of posts, newest first."""

    @abstractmethod
    def add(self, users: Iterable[int], post_id: int, timestamp: int) -> None:
        """Put a post on the timelines of some users; once, however often it is said."""

    @abstractmethod
    def slice(self, user: int, start: int, stop: int) -> list[int]:
        """Return posts of a timeline, the newest has number 0. Nothing if there are none, or start and stop make no sense."""

    def close(self) -> None:  # noqa: B027 - nothing, unless there is something to close
        """Let go of what it is kept in."""


class OwnTimelines(Timelines):
    """In memory, and in a SQLite file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self._entries: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self._db = None if path is None else _opened(path)
        if self._db is not None:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS entry (user INTEGER, timestamp INTEGER, post INTEGER, "
                "PRIMARY KEY (user, timestamp, post)) WITHOUT ROWID"
            )
            for user, timestamp, post in self._db.execute(
                "SELECT user, timestamp, post FROM entry"
            ):
                self._entries[user].append((timestamp, post))

    def add(self, users: Iterable[int], post_id: int, timestamp: int) -> None:
        """See Timelines."""
        entry = (timestamp, post_id)
        rows = []
        for user in users:
            entries = self._entries[user]
            place = bisect.bisect_left(entries, entry)
            if place == len(entries) or entries[place] != entry:
                entries.insert(place, entry)
                rows.append((user, *entry))
        if self._db is not None and rows:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO entry VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def slice(self, user: int, start: int, stop: int) -> list[int]:
        """See Timelines."""
        entries = self._entries.get(user)
        if not entries or start < 0 or stop <= start:
            return []
        n = len(entries)
        return [post for _, post in reversed(entries[max(0, n - stop) : max(0, n - start)])]

    def close(self) -> None:
        """See Timelines."""
        if self._db is not None:
            self._db.close()


class RedisTimelines(Timelines):
    """Sorted sets in a Redis server, which other programs may read."""

    def __init__(self, url: str, prefix: str, *, temporary: bool = False) -> None:
        self._redis: Any = importlib.import_module("redis").Redis.from_url(url)
        self._redis.ping()
        self._prefix = prefix
        self._temporary = temporary

    def add(self, users: Iterable[int], post_id: int, timestamp: int) -> None:
        """See Timelines."""
        batch = self._redis.pipeline(transaction=False)
        for user in users:
            batch.zadd(f"{self._prefix}:{user}", {str(post_id): timestamp})
        batch.execute()

    def slice(self, user: int, start: int, stop: int) -> list[int]:
        """See Timelines."""
        if start < 0 or stop <= start:
            return []
        return [
            int(post) for post in self._redis.zrevrange(f"{self._prefix}:{user}", start, stop - 1)
        ]

    def close(self) -> None:
        """End the connection; what was put there stays, unless it was to be temporary."""
        if self._temporary:
            for key in self._redis.scan_iter(f"{self._prefix}:*"):
                self._redis.delete(key)
        self._redis.close()


class Stores:
    """Opens what a service keeps.

    Args:
        kind: "memory", "sqlite" or "redis".
        folder: of the files.
        redis: URL of the server.
        prefix: of keys in that server.
        temporary: what this program puts into the server is removed again when a store is closed.

    Raises:
        ValueError: another kind, or something is missing.
    """

    def __init__(
        self,
        kind: str = "memory",
        folder: Path | None = None,
        redis: str = "",
        *,
        prefix: str = "dmrpc",
        temporary: bool = False,
    ) -> None:
        if kind not in ("memory", "sqlite", "redis"):
            raise ValueError(f"store: 'memory', 'sqlite' or 'redis', not {kind!r}")
        if kind == "redis" and not redis:
            raise ValueError("store 'redis' needs the URL of a server: redis://127.0.0.1:6379")
        if kind != "memory" and folder is None:
            raise ValueError(f"store {kind!r} needs a folder for files")
        self._kind = kind
        self._folder = folder
        self._redis = redis
        self._prefix = prefix
        self._temporary = temporary
        self._opened: list[Table | Timelines] = []

    def table(self, name: str) -> Table:
        """Open a table."""
        table = Table(self._path(name))
        self._opened.append(table)
        return table

    def timelines(self, name: str) -> Timelines:
        """Open the timelines of a service."""
        made: Timelines
        if self._kind == "redis":
            prefix = f"{self._prefix}:{name}"
            made = RedisTimelines(self._redis, prefix, temporary=self._temporary)
        else:
            made = OwnTimelines(self._path(name))
        self._opened.append(made)
        return made

    def close(self) -> None:
        """Close what was opened."""
        while self._opened:
            self._opened.pop().close()

    def _path(self, name: str) -> Path | None:
        if self._kind == "memory" or self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{name}.sqlite"


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")
    return db

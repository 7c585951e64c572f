"""Who follows whom: a file of lines "a b", undirected, each of which is two follow relations; or a graph that is made up."""

from __future__ import annotations

import random
from pathlib import Path

REED = Path(__file__).with_name("data") / "socfb-Reed98.edges"


class BadGraph(ValueError):
    """A file that is no list of edges; says in which line."""


def read_edges(path: Path = REED) -> list[tuple[int, int]]:
    """Read a file of edges; numbers of users, from 0.

    Raises:
        BadGraph: a line is not two numbers.
        OSError: the file cannot be read.
    """
    edges = []
    for nr, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(("#", "%")):
            continue
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise BadGraph(f"{path}, line {nr}: {line!r} is not two numbers of users")
        edges.append((int(words[0]), int(words[1])))
    return edges


def made_up(users: int = 962, mean_degree: int = 39, seed: int = 1) -> list[tuple[int, int]]:
    """Return a connected graph in which a few have very many friends, as where people are: newcomers prefer the popular."""
    draw = random.Random(seed)
    each = max(mean_degree // 2, 1)
    ends = [0]  # everybody as often as he has friends
    edges = []
    for user in range(1, users):
        friends = {draw.choice(ends) for _ in range(each)}
        edges += [(user, friend) for friend in sorted(friends)]
        ends += [*sorted(friends), *[user] * len(friends)]
    return edges


def default() -> list[tuple[int, int]]:
    """Return the graph of Reed College if it is there, else one that is made up and of the same size."""
    return read_edges(REED) if REED.exists() else made_up()


def nr_users(edges: list[tuple[int, int]]) -> int:
    """Return how many users there are: one more than the largest number."""
    return max((max(edge) for edge in edges), default=-1) + 1


def part_of(edges: list[tuple[int, int]], users: int) -> list[tuple[int, int]]:
    """Return the edges between the first users."""
    return [edge for edge in edges if max(edge) < users]

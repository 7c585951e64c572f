"""Who follows whom: a file of lines "a b", undirected, each of which is two follow relations."""

from __future__ import annotations

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


def nr_users(edges: list[tuple[int, int]]) -> int:
    """Return how many users there are: one more than the largest number."""
    return max((max(edge) for edge in edges), default=-1) + 1


def part_of(edges: list[tuple[int, int]], users: int) -> list[tuple[int, int]]:
    """Return the edges between the first users."""
    return [edge for edge in edges if max(edge) < users]

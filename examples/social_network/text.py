"""What is found in a text: names of users, and links."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MENTION = re.compile(r"@([A-Za-z0-9_-]+)")
_URL = re.compile(r"(?:http|https)://[A-Za-z0-9_./%?=&#~:+-]+")


def mentions_in(text: str) -> list[str]:
    """Return the users that a text names, each once, in order."""
    return list(dict.fromkeys(_MENTION.findall(text)))


def urls_in(text: str) -> list[str]:
    """Return the links of a text, in order."""
    return _URL.findall(text)


def with_urls(text: str, urls: Sequence[str]) -> str:
    """Return a text with its links replaced, in order.

    Raises:
        ValueError: there are not as many.
    """
    found = _URL.findall(text)
    if len(found) != len(urls):
        raise ValueError(f"{len(urls)} links for a text with {len(found)}")
    left = iter(urls)
    return _URL.sub(lambda _: next(left), text)

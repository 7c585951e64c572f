"""What client, balancer and worker say to each other."""

from __future__ import annotations

import msgspec

from .picture import Edit


class Request(msgspec.Struct, tag=True):
    """Client to worker: count and edit this picture."""

    number: int
    ref: bytes
    """The 40 bytes of a Ref: all that travels of the picture itself."""
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    edit: Edit


class Answer(msgspec.Struct, tag=True):
    """Worker to client: the edited picture, of the same shape."""

    number: int
    ref: bytes
    histogram: bytes
    """Of the picture as it came: int64, channels x 256."""
    worker: str


class Failure(msgspec.Struct, tag=True):
    """Worker or balancer to client: there will be no answer to that request."""

    number: int
    text: str


class Finish(msgspec.Struct, tag=True):
    """Client to balancer to workers: that was all."""


Message = Request | Answer | Failure | Finish

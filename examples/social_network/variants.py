"""How lists of posts travel: a class for each way. Services in front and in between are the same for all.

A variant says two things: what the storage puts into a reply, and how who asked gets at the posts. Those in between hand on
what there is. Add a class to VARIANTS, and every program of this package knows the new variant.

=========  ============================================================================================
value      the encoded posts follow each other in the message
cxl        they follow each other in DM, where the storage has written them for this reply, which has one
           Ref; a list that is small is in the message
cxl-ref    the same, however small
cxl-posts  each post lies in DM, from when it is first asked for; the reply has a Ref to each
=========  ============================================================================================

*Small* is what the library calls so: below the host's threshold. That a list crosses five connections does not lower it: what a
Ref costs is paid again by each service that takes it and hands it on, and the three in front that do not are cheap by value as well.
docs/social-network.md has the measurement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
import numpy as np

import dmrpc_cxl
from dmrpc_cxl.rpc.marshal import Transfer

from .records import Bytes, Post, Reply, assemble, list_head

_POSTS = msgspec.msgpack.Decoder(list[Post])
_POST = msgspec.msgpack.Decoder(Post)


class Shelf(ABC):
    """Where the storage keeps posts, as a variant sees it."""

    host: dmrpc_cxl.Host

    @abstractmethod
    def encoded(self, post_id: int) -> bytes:
        """Return a post; raise Unknown if there is none."""

    @abstractmethod
    def resident(self, post_id: int) -> dmrpc_cxl.Ref:
        """Return one more Ref to a post, which is put into DM the first time; raise Unknown if there is none."""


class Variant(ABC):
    """One way for lists of posts to travel, seen from one process."""

    name: ClassVar[str]
    about: ClassVar[str]
    transfer: ClassVar[Transfer] = "auto"
    """Of calls; their replies go the same way."""

    @abstractmethod
    def reply(self, shelf: Shelf, req_id: int, ids: Sequence[int]) -> Reply:
        """Make a reply with these posts, in the storage.

        Raises:
            Unknown: one of them is not there.
        """

    def pieces(self, host: dmrpc_cxl.Host, reply: Reply) -> Iterator[Bytes]:
        """Yield what a reply has, in one piece or post by post; a piece is let go of when nobody refers to it."""
        if reply.posts is not None:
            yield reply.posts

    def posts(self, host: dmrpc_cxl.Host, reply: Reply) -> list[Post]:
        """Read the posts of a reply: the first look at them since the storage."""
        return [] if reply.posts is None else _POSTS.decode(reply.posts.data)


class Value(Variant):
    """In every message."""

    name = "value"
    about = "by value"
    transfer = "value"

    def reply(self, shelf: Shelf, req_id: int, ids: Sequence[int]) -> Reply:
        """See Variant."""
        whole = assemble([shelf.encoded(post_id) for post_id in ids])
        return Reply(req_id, np.frombuffer(whole, np.uint8))


class Cxl(Variant):
    """By reference, in one piece."""

    name = "cxl"
    about = "by reference, each list in one piece, unless it is small"

    def threshold(self, host: dmrpc_cxl.Host) -> int:
        """Return from how many bytes on a list is put into DM."""
        return host.threshold

    def reply(self, shelf: Shelf, req_id: int, ids: Sequence[int]) -> Reply:
        """See Variant."""
        posts = [shelf.encoded(post_id) for post_id in ids]
        head = list_head(len(posts))
        nbytes = len(head) + sum(map(len, posts))
        if nbytes < self.threshold(shelf.host):
            return Reply(req_id, np.frombuffer(assemble(posts), np.uint8))
        array = shelf.host.empty(nbytes, np.uint8)
        target = array.data
        at = 0
        for part in (head, *posts):
            target[at : at + len(part)] = part
            at += len(part)
        target.release()
        return Reply(req_id, array)


class CxlRef(Cxl):
    """By reference, in one piece, whatever its size."""

    name = "cxl-ref"
    about = "by reference, each list in one piece"
    transfer = "ref"

    def threshold(self, host: dmrpc_cxl.Host) -> int:
        """See Cxl."""
        return 1


class CxlPosts(Variant):
    """By reference, post by post."""

    name = "cxl-posts"
    about = "by reference, each post for itself"

    def reply(self, shelf: Shelf, req_id: int, ids: Sequence[int]) -> Reply:
        """See Variant."""
        return Reply(req_id, None, [shelf.resident(post_id) for post_id in ids])

    def pieces(self, host: dmrpc_cxl.Host, reply: Reply) -> Iterator[Bytes]:
        """See Variant."""
        for ref in reply.each:
            yield host.map_ref(ref).numpy(np.uint8)

    def posts(self, host: dmrpc_cxl.Host, reply: Reply) -> list[Post]:
        """See Variant."""
        return [_POST.decode(piece.data) for piece in self.pieces(host, reply)]


VARIANTS: dict[str, Variant] = {kind.name: kind() for kind in (Value, Cxl, CxlRef, CxlPosts)}


def raw(host: dmrpc_cxl.Host, reply: Reply) -> bytes:
    """Return the posts of a reply as one encoded list, however they came: to compare."""
    if reply.each:
        return assemble([piece.tobytes() for piece in CxlPosts().pieces(host, reply)])
    return assemble([]) if reply.posts is None else reply.posts.tobytes()

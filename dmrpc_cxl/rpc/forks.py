"""What a forked child must not do with its parent's connections.

A child has copies of descriptors, and no threads. Whatever it sent would tear the parent's streams; a copy that it keeps open
hides the parent's end from peers. So the child closes its copies, without a word to anybody, and every use is refused.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Protocol

from .channel import Channel, RingChannel, TcpChannel

__all__ = ["not_for_children", "release"]


class _Owner(Protocol):
    def _after_fork(self) -> None: ...


_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()


def not_for_children(owner: _Owner) -> None:
    """Have owner._after_fork() called in every child that is forked."""
    _owners.add(owner)


def release(channel: Channel) -> None:
    """Close a child's copies of descriptors whose end peers wait for; nothing is shut down."""
    if isinstance(channel, RingChannel):
        channel.control.close()
    elif isinstance(channel, TcpChannel):
        channel.socket.close()


def _in_child() -> None:
    for owner in list(_owners):
        with contextlib.suppress(Exception):
            owner._after_fork()


os.register_at_fork(after_in_child=_in_child)

"""Who may send pictures: a table of users with a key each, and the tokens that are made of it.

A token is a keyed hash (BLAKE2b) of 16 bytes over user and request number, so one that was seen is of no use for another
request. Keys are derived from the secret that all processes of a fabric share: nothing has to be handed out.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping

NR_USERS = 16
TOKEN_BYTES = 16
_SIGNED = struct.Struct("<QQ")


class UserTable:
    """Users by number, with their keys."""

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        self._keys = dict(keys)

    @classmethod
    def of_fabric(cls, secret: bytes, nr_users: int = NR_USERS) -> UserTable:
        """Make the table of users 1, 2, ... that every process of a fabric arrives at."""
        return cls(
            {
                user: hashlib.blake2b(b"user %d" % user, key=secret[:64], digest_size=32).digest()
                for user in range(1, nr_users + 1)
            }
        )

    def token(self, user_id: int, req_id: int) -> str:
        """Return the token of a user's request, in hexadecimal.

        Raises:
            KeyError: there is no such user.
        """
        signed = _SIGNED.pack(user_id, req_id)
        return hashlib.blake2b(signed, key=self._keys[user_id], digest_size=TOKEN_BYTES).hexdigest()

    def admits(self, user_id: int, req_id: int, token: str) -> bool:
        """Tell whether that user is known and made that token for that request."""
        if user_id not in self._keys or not 0 <= req_id < 1 << 64 or not token.isascii():
            return False
        return hmac.compare_digest(self.token(user_id, req_id), token)

"""HTTP in front: the paths, parameters and answers of DeathStarBench's nginx, so that its programs drive this application.

===============================  ==========  ===============================================================
path                             method      parameters
===============================  ==========  ===============================================================
/wrk2-api/post/compose           POST, form  username, user_id, text, media_ids and media_types (JSON lists
                                             of strings, may be missing), post_type
/wrk2-api/home-timeline/read     GET         user_id, start, stop
/wrk2-api/user-timeline/read     GET         the same
/wrk2-api/user/register          POST, form  first_name, last_name, username, password, user_id
/wrk2-api/user/follow            POST, form  user_name and followee_name, or user_id and followee_id
===============================  ==========  ===============================================================

Reads answer with a JSON list of posts, with all numbers as strings. This is part of the load balancer's process: a request
becomes a call of the proxy, and for a list of posts this process is who asked: it looks at the posts.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

import dmrpc_cxl
from dmrpc_cxl.errors import DeadlineExceeded, DmError, WrongArguments
from dmrpc_cxl.rpc.endpoint import Transport

from .records import (
    BadRequest,
    Compose,
    Follow,
    Front,
    Kind,
    Post,
    PostType,
    Register,
    Reply,
    Request,
    Taken,
    Unavailable,
    Unknown,
    encoded,
    failure_of,
)
from .roles import PATIENCE_SECONDS, PROXY
from .variants import VARIANTS

PORT = 8080
MAX_BODY = 1 << 20
_I64 = 1 << 63
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")
_STATUS: dict[type[Exception], int] = {BadRequest: 400, Unknown: 404, Taken: 409, Unavailable: 503}


def status_of(error: DmError) -> int:
    """Return what HTTP calls the error of a call."""
    if isinstance(error, WrongArguments):
        return 400
    if isinstance(error, DeadlineExceeded):
        return 504
    failure = failure_of(error)
    return 500 if failure is None else _STATUS[type(failure)]


def json_of(posts: list[Post]) -> bytes:
    """Return posts as DeathStarBench shows them."""
    return msgspec.json.encode(
        [
            {
                "post_id": str(post.post_id),
                "creator": {
                    "user_id": str(post.creator.user_id),
                    "username": post.creator.username,
                },
                "req_id": str(post.req_id),
                "text": post.text,
                "user_mentions": [
                    {"user_id": str(one.user_id), "username": one.username}
                    for one in post.user_mentions
                ],
                "media": [
                    {"media_id": str(one.media_id), "media_type": one.media_type}
                    for one in post.media
                ],
                "urls": [
                    {"shortened_url": one.shortened_url, "expanded_url": one.expanded_url}
                    for one in post.urls
                ],
                "timestamp": str(post.timestamp),
                "post_type": int(post.post_type),
            }
            for post in posts
        ]
    )


def _number(name: str, text: str) -> int:
    """Return a number of 64 bits; raise BadRequest if the text is none, or is written as only Python writes numbers."""
    number = int(text) if _NUMBER.fullmatch(text) else _I64
    if not -_I64 <= number < _I64:
        raise BadRequest(f"{name}: {text[:30]!r} is no number")
    return number


class _Fields:
    """The parameters of a request."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def text(self, name: str, default: str | None = None) -> str:
        """Return one as it is; raise BadRequest if it is missing or empty and has no default."""
        value = self._given.get(name) or default
        if not isinstance(value, str):
            raise BadRequest(f"Incomplete arguments: {name}")
        return value

    def number(self, name: str, default: str | None = None) -> int:
        """Return one that is a number of 64 bits."""
        value = self.text(name, default)
        return _number(name, value)

    def strings(self, name: str) -> list[str]:
        """Return one that is a JSON list of strings; missing: none."""
        value = self.text(name, "[]")
        try:
            return msgspec.json.decode(value, type=list[str])
        except msgspec.MsgspecError as error:
            raise BadRequest(f"{name}: {error}") from None


def _compose(fields: _Fields) -> Compose:
    ids, types = fields.strings("media_ids"), fields.strings("media_types")
    try:
        numbers = [_number("media_ids", one) for one in ids]
        kind = PostType(fields.number("post_type", "0"))
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if any(number < 0 for number in numbers):
        raise BadRequest("media_ids: a number has more than 63 bits")
    return Compose(
        fields.text("username"), fields.number("user_id"), fields.text("text"), numbers, types, kind
    )


def _register(fields: _Fields) -> Register:
    return Register(
        fields.text("first_name"),
        fields.text("last_name"),
        fields.text("username"),
        fields.text("password"),
        fields.number("user_id"),
    )


def _follow(fields: _Fields) -> Follow:
    none = "-1"
    made = Follow(
        fields.text("user_name", ""),
        fields.text("followee_name", ""),
        fields.number("user_id", none),
        fields.number("followee_id", none),
    )
    if min(made.user_id, made.followee_id) >= 0:  # numbers go before names
        made.user_name = made.followee_name = ""
    elif not (made.user_name and made.followee_name):
        raise BadRequest("Incomplete arguments")
    return made


class Web:
    """A server of HTTP, in a thread of its own.

    Args:
        host: of this process.
        variant: how lists of posts come to it.
        port: 0: any; `port` says which.
        backend: which service to call.
        timeout: seconds for a request.
        patience: seconds to look for a backend that was lost.

    Raises:
        OSError: the port is taken.
        ServiceNotFound, PeerLost: the backend cannot be reached.
    """

    def __init__(
        self,
        host: dmrpc_cxl.Host,
        *,
        variant: str = "cxl",
        address: str = "127.0.0.1",
        port: int = PORT,
        backend: str = PROXY,
        transport: Transport = "auto",
        timeout: float = 10.0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._host = host
        self._variant = VARIANTS[variant]
        self._client: Any = host.connect(
            backend,
            Front,
            transport=transport,
            transfer=self._variant.transfer,
            timeout=timeout,
            connect_timeout=patience,
        )
        self._numbers = itertools.count(1)
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http")
        self._thread.start()
        try:
            self._on_loop(self._listen(address, port))
        except BaseException:
            self.stop()
            raise

    def _on_loop(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    async def _listen(self, address: str, port: int) -> None:
        application = web.Application(client_max_size=MAX_BODY)
        application.add_routes(
            [
                self._read("/wrk2-api/home-timeline/read", Kind.HOME_TIMELINE),
                self._read("/wrk2-api/user-timeline/read", Kind.USER_TIMELINE),
                self._write("/wrk2-api/post/compose", Kind.COMPOSE, _compose, "Successfully upload post"),
                self._write("/wrk2-api/user/register", Kind.REGISTER, _register, "Success!"),
                self._write("/wrk2-api/user/follow", Kind.FOLLOW, _follow, "Success!"),
            ]
        )  # fmt: skip
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, address, port).start()
        self.port = int(self._runner.addresses[0][1])

    def _read(self, path: str, kind: Kind) -> web.RouteDef:
        async def answer(request: web.Request) -> web.Response:
            fields = _Fields(request.query)
            asked = self._request(kind)
            asked.user_id = fields.number("user_id")
            asked.start, asked.stop = fields.number("start"), fields.number("stop")
            reply = await self._call(asked)
            return web.Response(body=self._shown(reply), content_type="application/json")

        return web.get(path, _guarded(answer))

    def _write(
        self, path: str, kind: Kind, read: Callable[[_Fields], msgspec.Struct], done: str
    ) -> web.RouteDef:
        async def answer(request: web.Request) -> web.Response:
            asked = self._request(kind)
            try:
                form = await request.post()
            # Bytes, a charset, or parts that make no text.
            except (ValueError, LookupError, HttpProcessingError) as error:
                raise BadRequest(f"no form: {error}") from None
            asked.body = encoded(read(_Fields(form)))
            await self._call(asked)
            return web.Response(text=done)

        return web.post(path, _guarded(answer))

    def _request(self, kind: Kind) -> Request:
        return Request(kind, next(self._numbers), self._variant.name)

    async def _call(self, asked: Request) -> Reply:
        reply: Reply = await self._client.aio.handle(asked)
        return reply

    def _shown(self, reply: Reply) -> bytes:
        return json_of(self._variant.posts(self._host, reply))

    def stop(self) -> None:
        """Finish what is under way, and end."""
        if hasattr(self, "_runner"):
            self._on_loop(self._runner.cleanup())
        self._client.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _guarded(handler: Handler) -> Handler:
    """Turn errors into what HTTP calls them."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadRequest as error:
            return web.Response(status=400, text=str(error))
        except DmError as error:
            return web.Response(status=status_of(error), text=f"{type(error).__name__}: {error}")

    return guarded

"""The client: sends pictures through the services, and checks what comes back.

    with Client(host, variant="cxl") as client:
        smaller = client.submit(Op.TRANSCODE, picture.file).result()        # one picture
        tally = client.run(files, window=4, seconds=2, check_every=16)      # a closed loop

A loop keeps `window` requests under way, and sends the next when one has ended. A share of the requests may be forged: the
firewall has to refuse exactly those.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import dmrpc_cxl
from dmrpc_cxl.errors import DmError
from dmrpc_cxl.rpc import CallFuture, first_done
from dmrpc_cxl.rpc.endpoint import Transport

from .bmp import Bytes
from .messages import Blocked, Pipeline, Reply, Request, failure_of
from .users import UserTable
from .variants import VARIANTS, Mode, Variant
from .work import EMPTY, Op, Work, compute

ALIGNMENT = 4096
_OPS = (Op.TRANSCODE, Op.COMPRESS)


class Wrong(Exception):
    """A result is not what this process computes by itself, or a request ended as it must not."""


class Submitted:
    """A request under way."""

    __slots__ = ("_client", "_kept", "began_ns", "file", "forged", "future", "op", "work")

    def __init__(
        self,
        client: Client,
        future: CallFuture,
        kept: Any,
        file: Bytes,
        op: Op,
        work: Work,
        *,
        forged: bool,
        began_ns: int,
    ) -> None:
        self._client = client
        self._kept = kept
        self.future = future
        self.file = file
        self.op = op
        self.work: Work = work
        self.forged = forged
        self.began_ns = began_ns

    def reply(self) -> tuple[Reply, Bytes]:
        """Wait, and return the reply and the result; empty where none is computed.

        Raises:
            RequestFailed: Blocked, UnsupportedImage or NoWorker.
            DmError: anything else that a call may raise.
        """
        variant = self._client.variant
        kept, self._kept = self._kept, None
        try:
            reply: Reply = self.future.result()
        except DmError as error:
            variant.drop(kept)
            del kept  # or the exception's traceback would keep it
            failure = failure_of(error)
            if failure is None:
                raise
            try:
                raise failure from error
            finally:
                del failure  # no circle over this frame
        return reply, variant.take(reply, kept)

    def result(self) -> Bytes:
        """Wait, and return the result. Raises as reply()."""
        return self.reply()[1]

    def check(self, reply: Reply, result: Bytes) -> None:
        """Compare with what this process computes by itself.

        Raises:
            Wrong: they differ.
        """
        expected = compute(self.op, self.work, self.file)
        what = f"request {reply.req_id}: {self.op.name.lower()}, {self.work}"
        if reply.checksum != expected.checksum:
            raise Wrong(f"{what}: checksum {reply.checksum:#x} instead of {expected.checksum:#x}")
        if not np.array_equal(result, expected.result):
            raise Wrong(f"{what}: {result.nbytes} bytes, and not those expected")


@dataclass
class Tally:
    """What a loop has done."""

    seconds: float = 0.0
    nr_done: int = 0
    nr_blocked: int = 0
    nr_checked: int = 0
    bytes_in: int = 0
    """Of the pictures that were processed."""
    bytes_out: int = 0
    latencies_ns: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of the pictures that were processed, in the order in which they came back."""

    def add(self, other: Tally) -> None:
        """Add what another loop has done."""
        self.seconds += other.seconds
        self.nr_done += other.nr_done
        self.nr_blocked += other.nr_blocked
        self.nr_checked += other.nr_checked
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.latencies_ns = np.concatenate((self.latencies_ns, other.latencies_ns))


class Client:
    """A user of the services, with a connection of its own.

    Args:
        variant: how pictures travel, a name of VARIANTS.
        mode: "pre-shared": share() says which pictures there are.
        transport: of the connection to the firewall.
        user_id: one of the fabric's user table.
        bad_share: of the requests of a loop, sent with a token that is not the user's.
        threshold: bytes from which the library goes by reference; None: the host's.
        seed: of what is drawn: operations, and which requests are forged.
        timeout: seconds for a request.
    """

    def __init__(
        self,
        host: dmrpc_cxl.Host,
        *,
        variant: str = "cxl",
        mode: Mode = "fresh",
        transport: Transport = "auto",
        service: str = "firewall",
        user_id: int = 1,
        bad_share: float = 0.0,
        threshold: int | None = None,
        seed: int = 1,
        timeout: float = 30.0,
    ) -> None:
        kind = VARIANTS[variant]
        if mode not in kind.modes:
            raise ValueError(f"{variant} has no mode {mode!r}, but {', '.join(kind.modes)}")
        if not 0 <= bad_share < 1:
            raise ValueError(f"a share of {bad_share} of bad requests")
        self.variant: Variant = kind(host)
        self.mode: Mode = mode
        self._users = UserTable.of_fabric(host.secret)
        self._user_id = user_id
        self._bad_share = bad_share
        self._random = random.Random(seed)
        self._numbers = itertools.count(self._random.getrandbits(48))
        self._client: Any = host.connect(
            service,
            Pipeline,
            transport=transport,
            transfer=kind.transfer,
            threshold=threshold,
            timeout=timeout,
        )
        self._host = host
        self._shared: dict[int, int] = {}  # where in the region a picture is, by its id
        self._handle = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent to and received from the firewall so far."""
        sent, received = self._client.traffic
        return int(sent), int(received)

    def close(self) -> None:
        """End the connection, and what share() began."""
        self.unshare()
        self.variant.close()
        self._client.close()

    # ------------------------------------------------------------ one request

    def _request(self, op: Op, work: Work, nbytes: int, *, forged: bool = False) -> Request:
        req_id = next(self._numbers)
        signed = req_id + 1 if forged else req_id  # what the token of another request looks like
        token = self._users.token(self._user_id, signed)
        return Request(req_id, op, work, self._user_id, token, self.variant.name, nbytes)

    def submit(
        self, op: Op, file: Bytes, work: Work = "scale", *, forged: bool = False
    ) -> Submitted:
        """Send a picture; returns at once.

        Raises:
            DmError: it could not be sent.
            KeyError: pre-shared, and share() was not told of this picture.
        """
        began = time.perf_counter_ns()
        request = self._request(op, work, file.nbytes, forged=forged)
        kept = None
        if self.mode == "pre-shared":
            request.handle, request.offset = self._handle, self._shared[id(file)]
        else:
            kept = self.variant.place(request, file)
        try:
            future = self._client.future.process(request)
        except BaseException:
            self.variant.drop(kept)
            raise
        return Submitted(self, future, kept, file, op, work, forged=forged, began_ns=began)

    # ------------------------------------------------------------ a loop

    def run(
        self,
        files: Sequence[Bytes],
        *,
        window: int = 4,
        seconds: float | None = None,
        count: int | None = None,
        work: Work = "scale",
        op: Op | None = None,
        check_every: int = 16,
    ) -> Tally:
        """Send pictures in turn, some at a time, until the time is over or that many were sent; wait for the last.

        Args:
            window: requests under way.
            op: what to ask for; None: drawn for each.
            check_every: so many results are compared with what this process computes, outside of the time that counts;
                0: none.

        Raises:
            Wrong: a result, or a forged request that was let through, or the other way round.
            RequestFailed, DmError: a request that failed.
        """
        if seconds is None and count is None:
            raise ValueError("run: for how long, or how many?")
        tally = Tally()
        latencies: list[int] = []
        under_way: list[Submitted] = []
        now = time.perf_counter_ns
        draw = self._random.random
        aside_ns = 0  # for checking
        begin = now()
        end_ns = None if seconds is None else begin + int(seconds * 1e9)
        nr_sent = 0
        more = True
        try:
            while True:
                more = more and (count is None or nr_sent < count)
                more = more and (end_ns is None or now() - aside_ns < end_ns)
                if more and len(under_way) < window:
                    file = files[nr_sent % len(files)]
                    wanted = op or _OPS[draw() < 0.5]
                    forged = bool(self._bad_share) and draw() < self._bad_share
                    under_way.append(self.submit(wanted, file, work, forged=forged))
                    nr_sent += 1
                    continue
                if not under_way:
                    break
                ended = _first_of(under_way)
                try:
                    reply, result = ended.reply()
                except Blocked:
                    if not ended.forged:
                        raise Wrong("a request was blocked that the user has signed") from None
                    tally.nr_blocked += 1
                    continue
                took = now() - ended.began_ns
                if ended.forged:
                    raise Wrong(f"request {reply.req_id} was let through, and nobody signed it")
                latencies.append(took)
                tally.bytes_in += ended.file.nbytes
                tally.bytes_out += reply.result_bytes
                if check_every and len(latencies) % check_every == 1 % check_every:
                    began_checking = now()
                    ended.check(reply, result)
                    tally.nr_checked += 1
                    aside_ns += now() - began_checking
                del reply, result, ended
        finally:
            for one in under_way:  # after an error: nobody waits for these
                one.future.cancel()
                self.variant.drop(one._kept)
        tally.seconds = (now() - begin - aside_ns) / 1e9
        tally.latencies_ns = np.array(latencies, np.int64)
        tally.nr_done = len(latencies)
        return tally

    # ------------------------------------------------------------ pre-shared

    def share(self, files: Sequence[Bytes]) -> None:
        """Place pictures in DM, in one region, and have both workers map it; for the mode "pre-shared".

        Raises:
            ValueError: another mode, or pictures are shared already.
        """
        if self.mode != "pre-shared" or self._handle:
            raise ValueError("share: in the mode 'pre-shared', after unshare()")
        offsets: dict[int, int] = {}
        size = 0
        for file in files:
            if id(file) not in offsets:
                offsets[id(file)] = size
                size += -(-file.nbytes // ALIGNMENT) * ALIGNMENT
        region = self._host.zeros(size, np.uint8)
        for file in files:
            region[offsets[id(file)] :][: file.nbytes] = file
        self._handle = self._random.getrandbits(62) | 1
        for op in _OPS:
            request = self._request(op, "none", size)
            request.image, request.handle = region, self._handle
            self._client.keep(request)
        self._shared = offsets

    def unshare(self) -> None:
        """End what share() began, if it did."""
        if not self._handle:
            return
        handle, self._handle = self._handle, 0
        self._shared = {}
        for op in _OPS:
            request = self._request(op, "none", 1)
            request.image, request.handle = EMPTY, handle
            try:
                self._client.forget(request)
            except DmError:  # who is gone has let go
                continue


def _first_of(under_way: list[Submitted]) -> Submitted:
    """Take a request that has ended out of the list; wait for one."""
    futures = [one.future for one in under_way]
    return under_way.pop(futures.index(first_done(futures)))

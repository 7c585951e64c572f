"""Empty calls: against multiprocessing.Pipe, against grpcio, from asyncio, and many outstanding."""

from __future__ import annotations

import asyncio
import collections
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import dmrpc_cxl

from .machine import bar, median
from .rpc_stage import (
    PLACES,
    Block,
    Load,
    Sample,
    alternate,
    client_of,
    prepare,
    ratios,
    serve,
    stage,
    walls,
)
from .rpc_stage import cpus as cpus_of

ROUNDS = 7
CALLS = 1000
WINDOW = 64
WORD = b"8 bytes."
EMPTY = "/bench.Worker/empty"

_links: dict[str, Any] = {}


def _echo(host: dmrpc_cxl.Host, connection: Connection) -> None:
    """Send back what comes, until that is nothing."""
    while word := connection.recv_bytes():
        connection.send_bytes(word)


def _take_pipe(host: dmrpc_cxl.Host, connection: Connection) -> None:
    _links["pipe"] = connection


def _close_links(host: dmrpc_cxl.Host) -> None:
    if "pipe" in _links:
        _links.pop("pipe").send_bytes(b"")
    if "grpc" in _links:
        _links.pop("grpc").close()
    if "loop" in _links:
        client: Any = _links.pop("aio")
        _links["loop"].run_until_complete(client.close())
        _links.pop("loop").close()


def _serve_grpc(host: dmrpc_cxl.Host, address: str) -> str:
    """Serve an empty unary call by grpcio, with threads and bytes as they are; return its address."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def empty(request: bytes, context: object) -> bytes:
        return b""

    handlers: dict[str, Any] = {"empty": grpc.unary_unary_rpc_method_handler(empty)}
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bench.Worker", handlers)]
    )
    port = server.add_insecure_port(address)
    server.start()
    _links["grpc server"] = server
    return f"127.0.0.1:{port}" if port > 1 else address


def _stop_grpc(host: dmrpc_cxl.Host) -> None:
    _links.pop("grpc server").stop(0).wait()


def _one_by_one(call: Callable[[], Any], calls: int) -> Block:
    now = time.perf_counter_ns

    def run() -> tuple[list[int], list[Any]]:
        latencies = [0] * calls
        for i in range(calls):
            begin = now()
            call()
            latencies[i] = now() - begin
        return latencies, []

    return Block(run, calls)


def _pipe_block() -> Block:
    pipe = _links["pipe"]
    send, recv = pipe.send_bytes, pipe.recv_bytes

    def exchange() -> None:
        send(WORD)
        recv()

    return _one_by_one(exchange, CALLS)


def _aio_block(host: dmrpc_cxl.Host, service: str) -> Block:
    if "loop" not in _links:
        _links["loop"] = asyncio.new_event_loop()
        _links["aio"] = client_of(host, service).aio
    loop, methods = _links["loop"], _links["aio"]
    now = time.perf_counter_ns

    async def calls() -> list[int]:
        empty = methods.empty
        latencies = [0] * CALLS
        for i in range(CALLS):
            begin = now()
            await empty()
            latencies[i] = now() - begin
        return latencies

    return Block(lambda: (loop.run_until_complete(calls()), []), CALLS)


def _pipelined_block(host: dmrpc_cxl.Host, service: str) -> Block:
    empty = client_of(host, service).future.empty

    def run() -> tuple[list[int], list[Any]]:
        under_way: collections.deque[Any] = collections.deque()
        for _ in range(CALLS):
            if len(under_way) == WINDOW:
                under_way.popleft().result()
            under_way.append(empty())
        while under_way:
            under_way.popleft().result()
        return [], []

    return Block(run, CALLS)


def _grpc_block(address: str) -> Block:
    import grpc

    if "grpc" not in _links:
        _links["grpc"] = grpc.insecure_channel(address)
    empty = _links["grpc"].unary_unary(EMPTY)
    return _one_by_one(lambda: empty(b""), CALLS // 5)


def _measure(
    host: dmrpc_cxl.Host, service: str, pids: dict[str, int], grpc: str | None, rounds: int
) -> dict[str, list[Sample]]:
    blocks = {
        "sync": prepare(host, Load(service, "empty", calls=CALLS)),
        "pipe": _pipe_block(),
        "aio": _aio_block(host, service),
        "pipelined": _pipelined_block(host, service),
    }
    if grpc:
        blocks["grpc"] = _grpc_block(grpc)
    return alternate(blocks, pids, rounds)


def _times(name: str, samples: list[Sample]) -> dict[str, float]:
    return {
        f"{name}_p50_us": median([sample.p50_ns for sample in samples]) / 1e3,
        f"{name}_p99_us": median([sample.p99_ns for sample in samples]) / 1e3,
        f"{name}_cpu_us": median(cpus_of(samples)) / 1e3,
    }


def _ratio(
    what: str,
    over: list[float],
    under: list[float],
    limit: float,
    *,
    at_most: bool,
    **beside: Any,
) -> dict[str, Any]:
    found = ratios(over, under)
    return bar(
        what, found.pop("median"), limit, at_most=at_most, **found, **beside, rounds=len(over)
    )


def latency() -> list[dict[str, Any]]:
    """Empty calls, client and server each a process, on one CPU and free."""
    lines = []
    has_grpc = importlib.util.find_spec("grpc") is not None
    with stage(64 << 20) as on:
        on.start("worker", serve)
        client = on.start("client")
        ours, theirs = multiprocessing.Pipe()
        echo = on.start("echo")
        echo.begin(_echo, theirs)
        client.call(_take_pipe, ours)
        address = None
        if has_grpc:
            address = on.start("grpc").call(
                _serve_grpc, f"unix:/tmp/dmrpc-bench-{os.getpid()}.sock"
            )
        client.call(_measure, "worker", on.pids, address, 1)  # every thread is there
        for where, cpu in PLACES:
            on.pin(cpu)
            found = client.call(_measure, "worker", on.pids, address, ROUNDS)
            lines += _lines(found, where)
        client.call(_close_links)
        echo.result()
        if has_grpc:
            on.peers["grpc"].call(_stop_grpc)
    return lines


def _lines(found: dict[str, list[Sample]], where: str) -> list[dict[str, Any]]:
    sync = found["sync"]
    p50 = {name: [sample.p50_ns for sample in samples] for name, samples in found.items()}
    lines = [
        _ratio(
            f"empty call against an exchange of 8 bytes over multiprocessing.Pipe, {where}",
            p50["sync"],
            p50["pipe"],
            1,
            at_most=True,
            **_times("call", sync),
            **_times("pipe", found["pipe"]),
        )
    ]
    if "grpc" in found:
        lines.append(
            _ratio(
                f"empty call: how many times faster than grpcio (Unix socket), {where}",
                p50["grpc"],
                p50["sync"],
                10,
                at_most=False,
                **_times("grpc", found["grpc"]),
            )
        )
    lines.append(
        _ratio(
            f"empty call awaited in asyncio against a synchronous one, {where}",
            p50["aio"],
            p50["sync"],
            4,
            at_most=True,
            **_times("aio", found["aio"]),
        )
    )
    if where == PLACES[0][0]:
        lines.append(
            _ratio(
                f"empty calls, {WINDOW} outstanding: rate against one after the other, {where}",
                walls(sync),
                walls(found["pipelined"]),
                2,
                at_most=False,
                each_us=median(walls(found["pipelined"])) / 1e3,
                one_by_one_us=median(walls(sync)) / 1e3,
            )
        )
    return lines

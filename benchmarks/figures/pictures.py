"""Blocks of pictures that go through the services of examples/image_pipeline: what Fig 10 does in its processes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import rpc_stage
from .blocks import Block
from .net_blocks import Resident

PACKAGE = "examples.image_pipeline"
PICTURES = 14
CHECK_EVERY = 32
WAYS = {"net-copy": "net"}
"""How a variant is called in examples/image_pipeline, if not by its own name."""

_files: dict[int, list[Any]] = {}


def why_not() -> str:
    """Say why it cannot be measured here; nothing if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "examples/image_pipeline is not there"
    for name in ("PIL", "skimage"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (pip install '.[examples]')"
    return ""


def start_service(host: Any, name: str, transport: str) -> None:
    """Start one of the services in this process."""
    from examples.image_pipeline import roles

    how: Any = transport
    rpc_stage._here[name] = roles.start(host, name, transport=how).end


def _pictures(size: int) -> list[Any]:
    from examples.image_pipeline import photographs

    if size not in _files:
        _files[size] = [picture.file for picture in photographs.pictures(size, PICTURES)]
    return _files[size]


class _Charged(Sequence[Any]):
    """Pictures; picking one charges what the worker will read of it, which the model cannot see."""

    def __init__(self, host: Any, files: Sequence[Any]) -> None:
        self._host = host
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        file = self._files[index]
        self._host.charge(file.nbytes)
        return file


class _Copies(Sequence[Any]):
    """Pictures at a memory server; picking one has the server copy it. Small ones, which go by value, are as they are."""

    def __init__(self, host: Any, files: Sequence[Any]) -> None:
        self._files = [
            Resident(host, file) if file.nbytes >= host.threshold else file for file in files
        ]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        file = self._files[index]
        return file.copy() if isinstance(file, Resident) else file

    def close(self) -> None:
        """Free them."""
        for file in self._files:
            if isinstance(file, Resident):
                file.close()


_numbers = itertools.count(1)


def pictures_block(
    host: Any,
    variant: str,
    mode: str,
    transport: str,
    size: int,
    work: str,
    window: int,
    charged: bool = False,
) -> Block:
    """Return a block of pictures; a request is one."""
    from examples.image_pipeline.client import Client
    from examples.image_pipeline.work import Op

    seed = next(_numbers)  # of its own: what is pre-shared is named by a number that is drawn
    way = WAYS.get(variant, variant)
    options: Any = {
        "variant": way, "mode": "fresh" if variant == "net-copy" else mode, "transport": transport, "seed": seed,
    }  # fmt: skip
    client = Client(host, **options)
    key = PACKAGE, str(seed)
    rpc_stage._clients[key] = client._client
    files: Sequence[Any] = _pictures(size)
    copies = _Copies(host, files) if variant == "net-copy" else None
    if copies is not None:
        files = copies
    elif mode == "pre-shared":
        client.share(files)
    if charged:
        files = _Charged(host, files)
    counts: dict[str, float] = {}
    how: Any = {"window": window, "work": work, "check_every": CHECK_EVERY}

    def run(n: int) -> Any:
        # Half of them transcoded, half compressed, for every variant: the two cost very different times.
        shares = ((Op.TRANSCODE, n - n // 2), (Op.COMPRESS, n // 2))
        tallies = [client.run(files, count=share, op=op, **how) for op, share in shares if share]
        if sum(tally.nr_done for tally in tallies) != n:
            raise AssertionError(f"of {n} pictures some were not processed")
        counts["timed_ns"] = sum(tally.seconds for tally in tallies) * 1e9
        return np.concatenate([tally.latencies_ns for tally in tallies])

    def close() -> None:
        rpc_stage._clients.pop(key, None)
        client.close()
        if copies is not None:
            copies.close()

    return Block(run, close=close, counts=counts)

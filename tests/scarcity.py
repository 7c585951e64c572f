"""Small devices for tests of what happens when something runs out, and a picture of one that must not change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dmrpc_cxl.fabric import device as devices
from tests.fabrics import At, Fabric, HostProcess, running

PAGE = 4096
NR_FRAMES = 64
ONE_AT_A_TIME = ("--batch", "1", "--batch-max", "1", "--low", "0", "--recall-timeout", "0.2",
                 "--log-level", "warning")  # fmt: skip


@contextlib.contextmanager
def small(
    *hosts: dict[str, Any], nr_frames: int = NR_FRAMES, **geometry: Any
) -> Iterator[tuple[Fabric, list[HostProcess]]]:
    """A device of few frames, handed out one at a time; a fault serves one page."""
    geometry.setdefault("coordinator", ONE_AT_A_TIME)
    with running(size=nr_frames * PAGE, **geometry) as fabric:
        made = [fabric.host(**{"copy_around": 1, "batch": 1, **options}) for options in hosts]
        yield fabric, made


def picture(fabric: Fabric) -> dict[str, Any]:
    """Return all that must not change when a call is refused; free frames may change hands."""
    with devices.open(fabric.name) as opened:
        audit = opened.audit()
        assert audit["nr_violations"] == 0, audit["violations"]
        return {
            "refcounts": [opened.frame(pfn)[0] for pfn in range(audit["nr_frames"])],
            "free": audit["pool"] + sum(audit["free"].values()),
            "refs": opened.refs(),
            **{key: audit[key] for key in ("in_use", "mapped_pages", "hole_pages", "live_refs",
                                           "ref_pages", "overflow_frames", "in_flight")},
        }  # fmt: skip


@contextlib.contextmanager
def same(fabric: Fabric, taker: int = 0) -> Iterator[None]:
    """Assert that nothing changes, but that Refs which `taker` tried to map and could not are its own then."""
    before = picture(fabric)
    if taker:
        before["refs"] = [{**ref, "holder": taker} for ref in before["refs"]]
    yield
    after = picture(fabric)
    changed: dict[str, Any] = {
        key: (before[key], after[key]) for key in before if before[key] != after[key]
    }
    if "refcounts" in changed:
        pairs = enumerate(zip(*changed.pop("refcounts"), strict=True))
        changed["frames"] = [(pfn, *pair) for pfn, pair in pairs if pair[0] != pair[1]][:8]
    assert not changed


# -------------------------------------------------------------------- sent to hosts


def ralloc(at: At, pages: int, **options: Any) -> None:
    at.made = at.host.ralloc(pages * PAGE, **options)


def intact(at: At, name: str) -> bool:
    words = getattr(at, name).numpy("u8")
    return bool((words == np.arange(len(words))).all())


def free(at: At, name: str) -> None:
    getattr(at, name).free()
    delattr(at, name)

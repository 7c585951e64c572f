"""A process on a fabric: attach, the paper's Table II, and arrays that live in DM.

>>> import dmrpc_cxl
>>> with dmrpc_cxl.attach(fabric_name) as host:
...     numbers = host.array([1, 2, 3])
...     ref = host.create_ref(numbers)  # what the numbers are now
...     numbers[0] = 99                 # copy-on-write: the Ref does not see it
...     with host.map_ref(ref) as received:
...         received.numpy(numbers.dtype).tolist()
...     del numbers
[1, 2, 3]
"""

from __future__ import annotations

import json
import math
import operator
import os
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import _native
from ._native import Buffer, Ref
from .errors import BadSize, DeviceNotFound
from .latency import DEFAULT_OVERLAP, Latency, extra_nanoseconds

__all__ = ["Buffer", "Host", "Ref"]

HostType = TypeVar("HostType", bound="Host")

_DEVICE_FOLDER = "/dev/shm"


class Arrays:
    """Arrays in the memory of a host, whichever that is."""

    ralloc: Any
    emulates_latency: Any
    charge: Any

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
        """Return an uninitialised ndarray that lives in DM; its memory is freed with its last view."""
        return self._array(shape, np.dtype(dtype), zero=False)

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
        """Return an ndarray of zeros that lives in DM; its memory is freed with its last view."""
        return self._array(shape, np.dtype(dtype), zero=True)

    def array(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """Return a copy of values as an ndarray that lives in DM."""
        source = np.asarray(values, dtype)
        target = self._array(source.shape, source.dtype, zero=False)
        target[...] = source
        if self.emulates_latency:
            self.charge(source.nbytes)
        return target

    def _array(
        self, shape: int | tuple[int, ...], dtype: np.dtype[Any], *, zero: bool
    ) -> npt.NDArray[Any]:
        if dtype.hasobject:
            raise TypeError(
                f"{dtype} holds Python objects, whose pointers mean nothing to other processes"
            )
        try:
            lengths: tuple[int, ...] = (operator.index(shape),)  # type: ignore[arg-type]
        except TypeError:
            lengths = tuple(operator.index(length) for length in shape)  # type: ignore[union-attr]
        if any(length < 0 for length in lengths):
            raise ValueError(f"negative dimensions are not allowed: {shape}")
        nbytes = dtype.itemsize * math.prod(lengths)
        buffer = self.ralloc(max(nbytes, 1), zero=zero)
        array: npt.NDArray[Any] = buffer.numpy(dtype, lengths)
        return array


class Names:
    """The name service, asked by whoever has ``_ask``."""

    def publish(self, name: str, endpoint: Any) -> None:
        """Publish a service of this host under a name, until withdrawn or until this host leaves or dies.

        Args:
            name: not empty; unique in the fabric.
            endpoint: what others need to reach the service: any JSON value but null, at most 4096 bytes.

        Raises:
            ServiceExists: a live host has published that name.
        """
        self._ask("PUBLISH", {"name": name, "endpoint": endpoint})

    def withdraw(self, name: str) -> None:
        """Take back a service that this host published; raise ServiceNotFound if there is none."""
        self._ask("WITHDRAW", {"name": name})

    def lookup(self, name: str) -> dict[str, Any]:
        """Return ``{"name", "endpoint", "host"}`` of a service; raise ServiceNotFound if there is none."""
        return self._ask("LOOKUP", {"name": name})

    def services(self, prefix: str = "") -> list[dict[str, Any]]:
        """List the published services whose names begin with prefix."""
        found: list[dict[str, Any]] = self._ask("LIST", {"prefix": prefix})["services"]
        return found

    def _ask(self, kind: str, question: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class Host(Arrays, Names, _native.Host):
    """A process attached to a fabric. Made by :func:`attach`; thread-safe; not usable in forked children."""

    @classmethod
    def attach(
        cls: type[HostType],
        fabric: str,
        *,
        name: str | None = None,
        transport: str = "unix",
        strict: bool = False,
        low: int = 0,
        high: int = 0,
        batch: int = 0,
        copy_around: int = 512,
        deadline: float = 5.0,
        reads_allocate: bool = False,
        user_mode_only: bool = False,
        latency: str | float | None = None,
        latency_overlap: int = DEFAULT_OVERLAP,
    ) -> HostType:
        """Join a fabric: register with its coordinator, map the device, start the fault handler.

        Args:
            fabric: name of the fabric, as given to ``dmrpc fabric create``.
            name: how this host appears in listings; default ``pid-<pid>``.
            transport: "unix" or "tcp", for requests to the coordinator.
            strict: also write-protect what this host moves away, for code that keeps raw pointers.
            low: frames below which to ask for more in the background, before a call has to wait; also what this host
                keeps when the coordinator asks for frames back, as long as others have some. 0: ask only when short, keep
                the coordinator's default.
            high: frames above which to give back; 0 takes the coordinator's default.
            batch: frames to ask for at once at first; 0 takes the coordinator's default.
            copy_around: most pages that one fault copies when stores run through a mapping in order; 1 copies only
                the page stored to.
            deadline: seconds to wait for the coordinator, above all for free frames.
            reads_allocate: take a frame when a hole is read, as kernels before 6.4 make us do.
            user_mode_only: open userfaultfd so that unprivileged users may; stores by the kernel into shared
                pages (``recv_into``) then fail with EFAULT instead of being copied.
            latency: emulate a device that slow, "265ns" or a number of ns; see :mod:`dmrpc_cxl.latency`.
            latency_overlap: cache lines of a copy that are under way at once in that model.

        Returns:
            Host: attached; a context manager that detaches.

        Raises:
            DeviceNotFound: no such fabric.
            NotADevice, DeviceTruncated, DeviceVersionMismatch, DeviceCorrupt: its device cannot be used.
            CoordinatorLost: nobody serves it.
            UserfaultfdUnavailable: this user or kernel cannot; says how to allow it.
        """
        if transport not in ("unix", "tcp"):
            raise ValueError(f"transport: 'unix' or 'tcp', not {transport!r}")
        if not fabric or "/" in fabric or fabric.startswith(".") or len(fabric.encode()) > 63:
            raise BadSize(f"not a fabric name: {fabric!r} (1 to 63 bytes, no '/', no leading '.')")
        path = f"{_DEVICE_FOLDER}/{fabric}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise DeviceNotFound(
                f"no fabric {fabric!r}: {path} does not exist; create it with `dmrpc fabric create {fabric}`"
            ) from None
        try:
            host = cls(
                fd,
                fabric,
                name or f"pid-{os.getpid()}",
                use_tcp=transport == "tcp",
                strict=strict,
                reads_allocate=reads_allocate,
                user_mode_only=user_mode_only,
                low=operator.index(low),
                high=operator.index(high),
                batch=operator.index(batch),
                copy_around=operator.index(copy_around),
                deadline=deadline,
            )
        finally:
            os.close(fd)
        if latency is not None:
            try:
                host.emulate_latency(latency, overlap=latency_overlap)
            except ValueError:
                host.detach()
                raise
        return host

    def emulate_latency(
        self, latency: str | float | None, *, overlap: int = DEFAULT_OVERLAP
    ) -> Latency | None:
        """Have the DM layer of this host be as slow as a device of that latency from now on; None: no longer.

        Takes a tenth of a second the first time in a process, to measure what this machine's memory is like.

        Returns:
            Latency: the model, with its own error; None if there is none.
        """
        if latency is None:
            self._latency_set(0, 1)
            self._model: tuple[str, float] | None = None
            return None
        extra = extra_nanoseconds(latency)
        self._latency_set(extra, overlap)
        asked = latency if isinstance(latency, str) else f"{latency:g}ns"
        self._model = asked, _native.latency_error(extra)
        return self.latency

    @property
    def latency(self) -> Latency | None:
        """The model of slower memory, and what it has charged so far; None: there is none."""
        model: tuple[str, float] | None = getattr(self, "_model", None)
        if model is None:
            return None
        return Latency(
            asked=model[0],
            local_ns=_native.latency_measured()[0],
            error=model[1],
            **self._latency_counts(),
        )

    def _ask(self, kind: str, question: dict[str, Any]) -> dict[str, Any]:
        payload = json.dumps(question).encode()
        answer: dict[str, Any] = json.loads(self.request(_native.WIRE["types"][kind], payload))
        return answer

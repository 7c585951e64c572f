"""Ray and Spark themselves, on this machine: started and stopped by the benchmark, with bounded memory.

They do what our receivers do: a block is sent, the receiver stores to a share of it, the caller gets the sum. What they hand to
a receiver is read-only, so it copies before it stores, as users of these systems have to. Nothing is copied where nothing is stored.

`ray`: the block is put into the object store, and an actor method is called with the object. `ray-cg`: the same through a
compiled graph, Ray's fast path for calls that repeat, which sends the block through a channel. `spark`: the block is broadcast
and a job of one partition runs on it; `local[1]`, so the task runs in a Python worker of the JVM on this machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..blocks import Block, one_by_one, windowed
from ..runner import Runner, family
from .base import Parties, Writing
from .work import Requests, overwrite

RAY_CLIENT, SPARK_CLIENT = "ray-client", "spark-client"
STORE_BYTES = 256 << 20
LARGEST_BLOCK = 1 << 20
SPARK_MEMORY = "512m"
STOP_SECONDS = 10.0
SPARK_REQUESTS = 4  # in one block: a request takes a tenth of a second

_here: dict[str, Any] = {}


def _children(runner: Runner, client: str) -> Mapping[str, int]:
    """Return what a cluster runs beside the process that sends requests, by name."""
    pid = runner.on.pids[client]
    return {name: one for name, one in family(pid).items() if one != pid}


# ---------------------------------------------------------------- Ray


def _start_ray(host: Any, name: str, folder: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else it keeps a token in the home folder
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init(
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    _here["actor"] = ray.remote(num_cpus=0)(RayWriter).remote()
    ray.get(_here["actor"].warm.remote())


def _stop_ray(host: Any) -> None:
    import ray

    if "graph" in _here:
        _here.pop("graph").teardown()
    _here.clear()
    ray.shutdown()


class RayWriter:
    """Runs as an actor."""

    def warm(self) -> int:
        return 0

    def write(self, block: np.ndarray[Any, Any], pages: int, nbytes: int, value: int) -> int:
        return overwrite(block.copy() if pages else block, pages, nbytes, value)

    def write_sent(self, sent: tuple[np.ndarray[Any, Any], int, int, int]) -> int:
        """Do the same; a compiled graph has one input."""
        return self.write(*sent)


def ray_block(host: Any, mode: str, size: int, pages: int, nbytes: int, window: int = 1) -> Block:
    """Return a block of requests to the actor."""
    import ray

    write = _here["actor"].write.remote
    put, get = ray.put, ray.get
    requests = Requests(size, pages, same=mode == "pre-shared")
    held = [put(requests.sources[0])] if mode == "pre-shared" else []

    def start() -> Any:
        block, value = requests.next()
        return write(held[0] if held else put(block), pages, nbytes, value)

    if window == 1:
        made = one_by_one(lambda: get(start()), requests.expected)
    else:
        made = windowed(lambda: _RayFuture(start()), requests.expected, window)
    made.close = held.clear
    return made


class _RayFuture:
    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def result(self) -> Any:
        import ray

        return ray.get(self._ref)


def _compile_graph(window: int) -> Any:
    if "graph" not in _here:
        from ray.dag import InputNode

        with InputNode() as sent:
            graph = _here["actor"].write_sent.bind(sent)
        _here["graph"] = graph.experimental_compile(
            _buffer_size_bytes=2 * LARGEST_BLOCK, _max_inflight_executions=32
        )
    return _here["graph"]


def ray_graph_block(
    host: Any, mode: str, size: int, pages: int, nbytes: int, window: int = 1
) -> Block:
    """Return a block of requests through a compiled graph."""
    import ray

    graph = _compile_graph(window)
    requests = Requests(size, pages)
    get = ray.get

    def start() -> Any:
        block, value = requests.next()
        return graph.execute((block, pages, nbytes, value))

    if window == 1:
        return one_by_one(lambda: get(start()), requests.expected)
    return windowed(lambda: _RayFuture(start()), requests.expected, window)


class RayPut(Writing):
    """Ray: an actor call with an object that was put."""

    name = "ray"
    says = "Ray, actor call with a put object"
    colour = "#b2182b"
    marker = "X"

    def why_not(self) -> str:
        if importlib.util.find_spec("ray") is None:
            return "Ray is not installed (pip install '.[ray]')"
        return ""

    def start(self, runner: Runner) -> Parties:
        on = runner.on
        stop = None
        if RAY_CLIENT not in on.peers:
            folder = tempfile.mkdtemp(prefix="dmrpc-ray-")  # its sockets: a long path is too long
            on.start(RAY_CLIENT, _start_ray, folder, attached=False)

            def pids() -> Mapping[str, int]:
                return _children(runner, RAY_CLIENT)

            runner.foreign.append(pids)

            def stop() -> None:
                runner.foreign.remove(pids)
                left = pids()
                on.peers[RAY_CLIENT].call(_stop_ray)
                _end(left)
                shutil.rmtree(folder, ignore_errors=True)

        return Parties(
            RAY_CLIENT,
            (),
            self.factory,
            pids=lambda: _children(runner, RAY_CLIENT),
            stop=stop,
            over_rpc=False,
        )

    factory = staticmethod(ray_block)


class RayCompiled(RayPut):
    """Ray: a compiled graph."""

    name = "ray-cg"
    says = "Ray, compiled graph"
    colour = "#ef8a62"
    marker = "x"
    modes = ("fresh",)
    factory = staticmethod(ray_graph_block)


def _end(pids: Mapping[str, int]) -> None:
    """Wait for processes of ours to end; end them if they do not."""
    import psutil

    processes = []
    for pid in pids.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    for process in psutil.wait_procs(processes, timeout=STOP_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# ---------------------------------------------------------------- Spark


def _start_spark(host: Any, name: str, folder: str) -> None:
    # Workers are other interpreters: they find this package where we do.
    import sys

    from pyspark.sql import SparkSession

    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    builder: Any = SparkSession.builder
    session = (
        builder.master("local[1]")
        .appName("dmrpc-figures")
        .config("spark.driver.memory", SPARK_MEMORY)
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.ui.enabled", "false")
        .config("spark.local.dir", folder)
        .config("spark.sql.warehouse.dir", f"{folder}/warehouse")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    _here["spark"] = session


def _stop_spark(host: Any) -> None:
    session = _here.pop("spark")
    gateway = session.sparkContext._gateway
    session.stop()
    gateway.shutdown()
    gateway.proc.stdin.close()  # the JVM ends when nobody can talk to it any more
    gateway.proc.wait(STOP_SECONDS)
    _here.clear()


def _write_broadcast(block: Any, pages: int, nbytes: int, value: int) -> int:
    data = np.frombuffer(block, "u1")
    return overwrite(data.copy() if pages else data, pages, nbytes, value)


def spark_block(host: Any, mode: str, size: int, pages: int, nbytes: int, window: int = 1) -> Block:
    """Return a block of jobs."""
    if window != 1:
        raise ValueError("one job at a time")
    context = _here["spark"].sparkContext
    requests = Requests(size, pages)

    def request() -> int:
        block, value = requests.next()
        sent = context.broadcast(block.tobytes())
        job = context.parallelize([0], 1).map(
            lambda _: _write_broadcast(sent.value, pages, nbytes, value)
        )
        (result,) = job.collect()
        sent.destroy()
        return int(result)

    return one_by_one(request, requests.expected)


class SparkBroadcast(Writing):
    """Spark: a broadcast block and a job of one partition."""

    name = "spark"
    says = "Spark, broadcast and a job"
    colour = "#8c510a"
    marker = "*"
    modes = ("fresh",)

    def why_not(self) -> str:
        if importlib.util.find_spec("pyspark") is None:
            return "PySpark is not installed (pip install '.[spark]')"
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            return "there is no Java on this machine, and Spark runs on it"
        return ""

    def start(self, runner: Runner) -> Parties:
        on = runner.on
        stop = None
        if SPARK_CLIENT not in on.peers:
            folder = tempfile.mkdtemp(prefix="dmrpc-spark-")
            on.start(SPARK_CLIENT, _start_spark, folder, attached=False)

            def pids() -> Mapping[str, int]:
                return _children(runner, SPARK_CLIENT)

            runner.foreign.append(pids)

            def stop() -> None:
                runner.foreign.remove(pids)
                left = pids()
                on.peers[SPARK_CLIENT].call(_stop_spark)
                _end(left)
                shutil.rmtree(folder, ignore_errors=True)

        return Parties(
            SPARK_CLIENT,
            (),
            spark_block,
            pids=lambda: _children(runner, SPARK_CLIENT),
            stop=stop,
            over_rpc=False,
        )

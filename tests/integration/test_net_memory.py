"""Arrays that came by a Ref of memory servers: when their bytes come, who sees stores, what is sent again, what is lost."""

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import BadRef, BufferInUse, ForkedError, RefConsumed
from dmrpc_net import ServerLost
from dmrpc_net.memory import TOKEN_BYTES, Fetch, Memory
from tests.net_servers import Servers, StandingServers, serving
from tests.standing import until

PAGE = 4096
NR_PAGES = 600  # more than are fetched at once
LENGTH = NR_PAGES * PAGE - 100


class Group:
    """Memories of this process at servers, closed in the end."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.memories: list[Memory] = []

    def memory(self, fetch: Fetch = "whole", **options: Any) -> Memory:
        options.setdefault("deadline", 60.0)
        memory = Memory.attach(
            self.servers.addresses, secret=self.servers.secret, fetch=fetch, **options
        )
        self.memories.append(memory)
        return memory


@pytest.fixture(scope="module")
def standing() -> Iterator[StandingServers]:
    standing = StandingServers(count=2)
    yield standing
    standing.close()


@pytest.fixture
def group(standing: StandingServers) -> Iterator[Group]:
    """Two servers; every page of them is free afterwards."""
    faulthandler.dump_traceback_later(120, exit=True)
    with standing.use() as servers:
        group = Group(servers)
        yield group
        for memory in group.memories:
            memory.close()
    faulthandler.cancel_dump_traceback_later()


def numbers(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, length, "u1")


def sent(memory: Memory, array: np.ndarray) -> bytes:
    return memory.token_of(memory.place(array))


def written(group: Group) -> int:
    """How many bytes clients have sent to the servers."""
    return int(group.memories[0].client.stats()["bytes_written"])


# ---------------------------------------------------------------- when bytes come


def test_nothing_is_fetched_before_somebody_looks(group: Group) -> None:
    memory = group.memory()
    buffer = memory.view(sent(memory, numbers()))
    array = buffer.numpy()
    assert array.nbytes == LENGTH
    assert not buffer.pages_present
    assert not memory.stats()["bytes_fetched"]


def test_the_first_look_fetches_all(group: Group) -> None:
    memory, source = group.memory(), numbers()
    buffer = memory.view(sent(memory, source))
    array = buffer.numpy()
    assert array[LENGTH // 2] == source[LENGTH // 2]
    until(lambda: buffer.complete)
    assert (array == source).all()
    stats = memory.stats()
    assert stats["bytes_fetched"] == LENGTH
    assert not stats["stores"]


def test_only_touched_pages_are_fetched_if_that_is_asked_for(group: Group) -> None:
    memory, source = group.memory("touched"), numbers()
    buffer = memory.view(sent(memory, source))
    array = buffer.numpy()
    for page in (500, 3, 77):
        assert array[page * PAGE + 5] == source[page * PAGE + 5]
    assert buffer.pages_present == 3
    assert memory.stats()["bytes_fetched"] == 3 * PAGE


def test_reading_on_in_order_takes_ever_fewer_requests(group: Group) -> None:
    memory, source = group.memory("touched"), numbers()
    array = memory.view(sent(memory, source)).numpy()
    assert (array == source).all()
    assert memory.stats()["requests"] < NR_PAGES // 20


def test_now_is_when_the_message_is_read(group: Group) -> None:
    memory, source = group.memory("now"), numbers()
    buffer = memory.view(sent(memory, source))
    assert buffer.complete
    assert (buffer.numpy() == source).all()


def test_memory_that_is_used_again_is_zeros_where_that_was_promised(group: Group) -> None:
    memory = group.memory()
    with memory.buffer(LENGTH) as buffer:
        where = buffer.address
        buffer.numpy()[:] = 7
    assert memory.stats()["bytes_kept"] >= LENGTH
    shown = memory.view(sent(memory, numbers()))  # which is kept as well, once it is freed
    assert shown.address == where
    assert shown.numpy()[-1] == numbers()[-1]
    shown.free()
    with memory.buffer(LENGTH - PAGE) as buffer:
        assert buffer.address == where
        assert not buffer.numpy().any()
    with memory.buffer(LENGTH, zero=False) as buffer:
        assert buffer.address == where
        assert not memory.stats()["bytes_kept"]


def test_an_array_may_be_freed_while_the_rest_of_it_is_fetched(group: Group) -> None:
    memory, source = group.memory(), numbers()
    for _ in range(30):
        buffer = memory.view(sent(memory, source))
        assert buffer.numpy()[-1] == source[-1]  # which comes first
        buffer.free()
    assert not memory.stats()["failed"]


def test_arrays_in_cycles_are_collected(group: Group) -> None:
    memory, source = group.memory(), numbers(10 * PAGE)
    for _ in range(20):
        cycle: list[Any] = [memory.view(sent(memory, source))]
        assert cycle[0].numpy()[0] == source[0]
        cycle.append(cycle)
        del cycle
    gc.collect()
    assert not memory.stats()["regions"]
    assert (memory.view(sent(memory, source)).numpy() == source).all()


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 256 * PAGE, 256 * PAGE + 1])
@pytest.mark.parametrize("fetch", ["whole", "touched", "now"])
def test_every_length_arrives_and_ends_in_zeros(group: Group, length: int, fetch: Fetch) -> None:
    memory, source = group.memory(fetch), numbers(length)
    buffer = memory.view(sent(memory, source))
    assert (buffer.numpy() == source).all()
    assert buffer.nbytes == length


def test_threads_that_look_at_once_all_see_the_bytes(group: Group) -> None:
    memory, source = group.memory("touched"), numbers()
    array = memory.view(sent(memory, source)).numpy()
    wrong: list[int] = []
    start = threading.Barrier(8)

    def look(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(NR_PAGES - 1)
        start.wait()
        wrong.extend(int(p) for p in order if array[p * PAGE + 9] != source[p * PAGE + 9])

    threads = [threading.Thread(target=look, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_system_calls_see_the_bytes_and_store_like_anybody(group: Group) -> None:
    memory, source = group.memory(), numbers(4 * PAGE)
    one, other = memory.view(sent(memory, source)), memory.view(sent(memory, source))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(one.numpy())
        assert theirs.recv(4 * PAGE, socket.MSG_WAITALL) == source.tobytes()
        ours.sendall(b"x" * 10)
        assert theirs.recv_into(other.numpy(), 10) == 10
    assert other.changed
    assert not one.changed
    assert bytes(other.numpy()[:12]) == b"x" * 10 + source[10:12].tobytes()


# ---------------------------------------------------------------- stores, and sending on


@pytest.mark.parametrize("fetch", ["whole", "touched", "now"])
def test_stores_are_seen_by_nobody_else(group: Group, fetch: Fetch) -> None:
    memory, other, source = group.memory(fetch), group.memory(), numbers()
    ref = memory.place(source)
    copy = ref.clone()
    array = memory.view(memory.token_of(ref)).numpy()
    array[5 * PAGE] ^= 255
    array[3] ^= 255
    assert (other.view(other.token_of(copy)).numpy() == source).all()
    assert array[5 * PAGE] == source[5 * PAGE] ^ 255
    assert (array[4:PAGE] == source[4:PAGE]).all()


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("fetch", ["whole", "touched"])
def test_what_was_not_stored_to_is_sent_on_without_its_bytes(
    group: Group, fetch: Fetch, look: bool
) -> None:
    memory, other, source = group.memory(fetch), group.memory(), numbers()
    buffer = memory.view(sent(memory, source))
    if look:
        assert buffer.numpy()[7] == source[7]
    before = written(group)
    with memoryview(buffer) as view:
        token = memory.token_of(memory.share(view))
    assert written(group) == before
    assert (other.view(token).numpy() == source).all()


def test_what_was_stored_to_is_sent_on_as_it_is_now(group: Group) -> None:
    memory, other, source = group.memory(), group.memory(), numbers()
    buffer = memory.view(sent(memory, source))
    buffer.numpy()[PAGE] = 1
    assert buffer.changed
    with memoryview(buffer) as view:
        token = memory.token_of(memory.share(view))
    source[PAGE] = 1
    assert (other.view(token).numpy() == source).all()


def test_what_is_sent_often_is_written_twice_at_most_until_it_changes(group: Group) -> None:
    memory, other = group.memory(), group.memory()
    buffer = memory.buffer(LENGTH)
    array = buffer.numpy()
    array[:] = numbers()
    before = written(group)
    for _ in range(5):
        with memoryview(buffer) as view:
            token = memory.token_of(memory.share(view))
        assert (other.view(token).numpy() == array).all()
    assert written(group) - before == 2 * LENGTH
    array[LENGTH - 1] ^= 255
    with memoryview(buffer) as view:
        token = memory.token_of(memory.share(view))
    assert (other.view(token).numpy() == array).all()
    assert written(group) - before == 3 * LENGTH


def test_a_store_while_an_array_is_being_sent_is_noticed(group: Group) -> None:
    memory = group.memory()
    buffer = memory.buffer(LENGTH)
    array = buffer.numpy()
    stop = threading.Event()

    def store() -> None:
        while not stop.is_set():
            array[LENGTH // 2] = 255 - array[LENGTH // 2]

    thread = threading.Thread(target=store)
    thread.start()
    try:
        for _ in range(20):
            with memoryview(buffer) as view:
                memory.share(view).drop()
    finally:
        stop.set()
        thread.join()
    array[LENGTH // 2] = 77
    with memoryview(buffer) as view:
        token = memory.token_of(memory.share(view))
    assert memory.view(token).numpy()[LENGTH // 2] == 77


# ---------------------------------------------------------------- tokens


def test_a_token_can_be_used_once(group: Group) -> None:
    memory = group.memory()
    token = sent(memory, numbers(10))
    assert len(token) == TOKEN_BYTES
    assert memory.is_held(token)
    memory.view(token)
    assert not memory.is_held(token)
    with pytest.raises(RefConsumed):
        memory.view(token)


def test_forgetting_a_token_that_was_taken_over_takes_nothing_away(group: Group) -> None:
    sender, receiver, source = group.memory(), group.memory(), numbers()
    token = sent(sender, source)
    buffer = receiver.view(token)
    sender.forget([token])
    sender.client.ping(0, 0), sender.client.ping(0, 1)
    sender.client.ping(1, 0), sender.client.ping(1, 1)
    assert (buffer.numpy() == source).all()


def test_whoever_has_a_token_may_forget_it(group: Group) -> None:
    sender, receiver = group.memory(), group.memory()
    token = sent(sender, numbers())
    receiver.forget([token])
    until(lambda: not sender.is_held(token))


@pytest.mark.parametrize("at", [0, 8, 16, 24, 39])
def test_a_token_that_was_changed_is_refused(group: Group, at: int) -> None:
    memory = group.memory()
    token = bytearray(sent(memory, numbers()))
    right = bytes(token)
    token[at] ^= 1
    with pytest.raises((BadRef, RefConsumed)):
        memory.view(bytes(token))
    memory.forget([right])


# ---------------------------------------------------------------- the end of things


def test_closing_is_refused_while_bytes_that_somebody_may_look_at_are_elsewhere(
    group: Group,
) -> None:
    memory, source = group.memory(), numbers()
    array = memory.view(sent(memory, source)).numpy()
    with pytest.raises(BufferInUse):
        memory.close()
    assert (array == source).all()
    memory.close()
    assert (array == source).all()


def test_a_lost_server_is_told_by_an_exception_where_one_can_be_raised() -> None:
    servers = Servers(count=2)
    try:
        memory = Memory.attach(servers.addresses, secret=servers.secret, deadline=1.0)
        kept = [memory.view(sent(memory, numbers())) for _ in range(8)]
        servers.servers[1].kill()
        lost = [buffer for buffer in kept if buffer.ref.server == 1]
        assert lost
        for buffer in lost:
            with pytest.raises(ServerLost):
                memory.complete(buffer)
        for buffer in kept:
            if buffer.ref.server == 0:
                memory.complete(buffer)
                assert (buffer.numpy() == numbers()).all()
        del lost, kept, buffer
        memory.close()
    finally:
        servers.end()


LOOK = """
    import faulthandler, signal, sys
    faulthandler.dump_traceback_later(100, exit=True)
    import numpy as np
    from dmrpc_net.memory import Memory
    memory = Memory.attach(sys.argv[1], secret=sys.argv[2], deadline=1.0)
    array = memory.view(memory.token_of(memory.place(np.ones(1 << 20, "u1")))).numpy()
    print("ready", flush=True)
    sys.stdin.readline()
    print("saw", array[0], flush=True)
"""


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_who_looks_at_what_a_lost_server_had_is_ended_and_never_sees_wrong_bytes(how: str) -> None:
    servers = Servers()
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LOOK), servers.addresses[0], servers.secret],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with contextlib.ExitStack() as stack:
            if how == "killed":
                servers.servers[0].kill()
            else:
                stack.enter_context(servers.servers[0].paused())
            out, err = child.communicate("\n", timeout=100)
        assert child.returncode == -signal.SIGBUS
        assert not out
        assert "bytes of a memory server cannot be had" in err
    finally:
        servers.end()


def test_a_forked_child_is_refused_and_its_parent_goes_on(group: Group) -> None:
    memory, source = group.memory(), numbers()
    buffer = memory.view(sent(memory, source))
    child = os.fork()
    if not child:
        code = 1
        try:
            memoryview(buffer)
        except ForkedError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert (buffer.numpy() == source).all()


def test_a_client_that_is_killed_while_it_fetches_leaves_no_page_behind(group: Group) -> None:
    process = group.servers.process()
    process.call(_keep_looking)
    process.start(_look_for_ever)
    until(lambda: process.connection.poll(0) or _fetched(group) > 50 * LENGTH)
    process.kill()


def _fetched(group: Group) -> int:
    if not group.memories:
        group.memory()
    return int(group.memories[0].client.stats()["bytes_read"])


def _keep_looking(there: Any) -> None:
    there.memory = Memory.attach(list(there.client.addresses), secret=there.client.secret)
    there.ref = there.memory.place(numbers())


def _look_for_ever(there: Any) -> None:
    while True:
        buffer = there.memory.view(there.memory.token_of(there.ref.clone()))
        assert int(buffer.numpy()[5]) >= 0


def test_a_copying_server_copies_for_every_further_ref_and_for_no_first_one() -> None:
    with serving("--copy", shards=1) as servers:
        client = servers.client()
        ref = client.put(numbers(8 * PAGE))
        assert not client.stats()["pages_copied_eagerly"]
        clone = ref.clone()
        assert client.stats()["pages_copied_eagerly"] == 8
        assert client.get(clone) == client.get(ref) == bytes(numbers(8 * PAGE))

"""Several memory servers, their shards, and what goes where; what the server process says and refuses."""

from __future__ import annotations

import concurrent.futures
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmrpc_net
from dmrpc_cxl.errors import BadAddress, BadRef, BadSize, MisuseError, RefConsumed
from dmrpc_net import Ref
from dmrpc_net.greeting import parse_address, show_address
from dmrpc_net.server import secret_at
from tests.net_servers import Servers, StandingServers, serving

PAGE = 4096
_standing = StandingServers(count=3, shards=2, size="8M")


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    yield
    _standing.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with _standing.use() as servers:
        yield servers


def place(address: int) -> tuple[int, int]:
    """Server and shard of an address."""
    return address >> 56, address >> 50 & 63


# ---------------------------------------------------------------- where things are


def test_allocations_go_round_all_shards_of_all_servers(servers):
    client = servers.client()
    places = [place(client.ralloc(PAGE)) for _ in range(12)]
    assert Counter(places) == {(server, shard): 2 for server in range(3) for shard in range(2)}
    assert [server for server, _ in places[:3]] != [places[0][0]] * 3  # one server after the other
    assert places[:6] == places[6:]


def test_not_every_process_begins_at_the_same_server(servers):
    first = set()
    for _ in range(40):
        client = servers.client()
        first.add(place(client.ralloc(1)))
        client.close()
        servers.clients.remove(client)
        if len(first) > 2:
            break
    assert len(first) > 2


def test_a_range_a_ref_and_its_mapping_are_on_one_shard(servers):
    creator, consumer = servers.client(), servers.client()
    for _ in range(8):
        address = creator.ralloc(2 * PAGE)
        creator.rwrite(address, b"x" * 2 * PAGE)
        ref = creator.create_ref(address, 2 * PAGE)
        assert (ref.server, ref.shard) == place(address)
        mapped = consumer.map_ref(ref.to_bytes())
        assert place(mapped) == place(address)
        assert consumer.read(mapped, 2 * PAGE) == b"x" * 2 * PAGE


def test_where_something_is_to_be_can_be_said(servers):
    client = servers.client()
    assert place(client.ralloc(1, server=2, shard=1)) == (2, 1)
    assert place(client.ralloc(1, server=1)) == (1, 0)
    ref = client.put(b"x", server=2)
    assert (ref.server, ref.shard) == (2, 0)
    for server, shard in ((3, 0), (0, 2), (0, 64), (200, 0), (10**9, 0)):
        with pytest.raises(BadAddress):
            client.ralloc(1, server=server, shard=shard)


def test_addresses_and_refs_of_places_that_do_not_exist_are_refused(servers):
    client = servers.client()
    wire = client.put(b"x").to_bytes()
    for server, shard in ((7, 0), (0, 5), (0xFFFF, 0), (0, 0xFFFF)):
        with pytest.raises(BadRef):
            client.get(server.to_bytes(2, "little") + shard.to_bytes(2, "little") + wire[4:])
    for address in (9 << 56, 60 << 50, 2**64 - 1):
        with pytest.raises(BadAddress):
            client.read(address, 1)


def test_a_process_has_one_id_at_all_servers(servers):
    one, two = servers.client(), servers.client()
    assert one.pid != two.pid
    for client in (one, two):
        for number in range(3):
            assert client.stats(number)["nr_processes"] >= 1


def test_a_shard_that_is_full_says_so_although_others_are_not(servers):
    client = servers.client()
    total = client.shard_stats(0, 0)["nr_pages"]
    client.rwrite(client.ralloc(total * PAGE, server=0, shard=0), bytes(total * PAGE))
    with pytest.raises(MemoryError):
        client.put(b"x", server=0, shard=0)
    client.put(b"x", server=0, shard=1).drop()


# ---------------------------------------------------------------- order


def test_what_a_process_asks_of_a_shard_is_done_in_order(servers):
    """A Ref that is asked for behind writes has them all, without anybody waiting in between."""
    client, consumer = servers.client(), servers.client()
    rng = random.Random(7)
    for _ in range(5):
        address = client.ralloc(8 * PAGE)
        content, snapshots = bytearray(8 * PAGE), []
        p = client.pipeline()
        for _ in range(60):
            offset, size = rng.randrange(7 * PAGE), rng.randrange(1, PAGE)
            data = rng.randbytes(size)
            p.rwrite(address + offset, data)
            content[offset : offset + size] = data
            snapshots.append((p.create_ref(address, 8 * PAGE), bytes(content)))
        for call, then in snapshots:
            assert consumer.get(call.result().to_bytes()) == then


def test_a_pipeline_gives_each_call_its_own_result_or_error(servers):
    client = servers.client()
    with client.pipeline() as p:
        address = p.ralloc(3 * PAGE).result()
        write = p.rwrite(address, b"abc")
        wrong = p.read(address + 4 * PAGE, 1)
        right = p.read(address, 3)
        ref = p.put(b"xyz")
        with pytest.raises((BadAddress, BadSize)):
            wrong.result()
    assert write.done()
    assert write.result() is None
    assert right.result() == b"abc"
    assert client.get(ref.result()) == b"xyz"


def test_a_pipeline_raises_at_its_end_what_nobody_looked_at(servers):
    client = servers.client()
    with pytest.raises(BadAddress), client.pipeline() as p:
        p.rfree(12345 << 12)
        fine = p.ralloc(1)
    client.rfree(fine.result())


def test_more_calls_than_may_be_outstanding_are_made_in_turn(servers):
    client = servers.client()
    address = client.ralloc(PAGE, server=1)
    client.rwrite(address, bytes(range(100)))
    with client.pipeline() as p:
        calls = [p.read(address + i % 100, 1) for i in range(5000)]
    assert all(call.result()[0] == i % 100 for i, call in enumerate(calls))


def test_calls_that_nobody_waits_for_leave_nothing_behind(servers):
    client = servers.client()
    for _ in range(30):
        p = client.pipeline()
        p.ralloc(PAGE)
        p.put(b"x" * 10_000)
        del p
    found = client.audit()
    assert (found["nr_ranges"], found["nr_refs"]) == (0, 0)


def test_threads_share_a_client(servers):
    client = servers.client()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(80):
                data = rng.randbytes(rng.randrange(1, 30_000))
                ref, address = client.put(data, keep=True)
                client.rwrite(address, b"changed")
                assert client.get(ref) == data
                client.rfree(address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures


# ---------------------------------------------------------------- buffers


def test_any_contiguous_buffer_will_do_and_no_other(servers):
    import array

    import numpy as np

    client = servers.client()
    address = client.ralloc(1 << 16)
    for data in (
        b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview")[2:5], array.array("d", [1.5, 2.5]),
        np.arange(12.0).reshape(3, 4), np.arange(12).reshape(3, 4).T,
    ):  # fmt: skip
        raw = data.tobytes("A") if isinstance(data, np.ndarray) else bytes(data)
        client.rwrite(address, data)
        assert client.read(address, len(raw)) == raw
    target = np.zeros((5, 5))
    client.rwrite(address, np.arange(25.0))
    client.rread(address, target)
    assert (target.ravel() == np.arange(25.0)).all()
    for wrong in (np.arange(10)[::2], "text", 5, [1, 2]):
        with pytest.raises((BufferError, ValueError, TypeError)):
            client.rwrite(address, wrong)
    with pytest.raises((BufferError, ValueError, TypeError)):
        client.rread(address, b"read-only")
    with pytest.raises(BadSize):
        client.rread(address, bytearray(5), 6)
    with pytest.raises(BadSize):
        client.rwrite(address, b"")


def test_a_buffer_cannot_be_resized_while_a_call_uses_it(servers):
    client = servers.client()
    address = client.ralloc(PAGE)
    into = bytearray(PAGE)
    p = client.pipeline()
    call = p.rread(address, into)
    with pytest.raises(BufferError):
        into.extend(b"x")
    call.result()
    into.extend(b"x")


# ---------------------------------------------------------------- the server process


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dmrpc_net.server", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_server_says_where_it_serves_and_whether_its_pool_is_locked():
    with serving(shards=1) as servers:
        servers.client()
    said = servers.servers[0].log
    assert re.search(
        r"number 0 serves at 127\.0\.0\.1:\d+: 32 MiB in 1 shard, (locked|NOT locked) in memory",
        said,
    )


def test_a_server_whose_pool_cannot_be_locked_says_so_and_serves():
    with serving("--no-lock", shards=1) as servers:
        assert servers.client().stats()["nr_locked"] == 0
    assert "not locked in memory" in servers.servers[0].log


def test_a_server_makes_its_secret_for_its_own_user_only():
    with serving(shards=1) as servers:
        assert servers.secret.stat().st_mode & 0o777 == 0o600
        assert len(bytes.fromhex(servers.secret.read_text())) == 32


def test_starters_of_servers_that_make_the_same_secret_at_once_agree(tmp_path: Path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i in range(50):
            path = str(tmp_path / f"secret-{i}")
            found = {pool.submit(secret_at, path) for _ in range(8)}
            assert len({one.result() for one in found}) == 1
    assert len(list(tmp_path.iterdir())) == 50  # and nothing beside them


def test_a_server_opens_as_many_files_as_its_clients_need_or_says_for_how_many_it_has_room():
    program = """if True:
        import resource, sys
        from dmrpc_net.server import make_room_for_descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
        told = make_room_for_descriptors(int(sys.argv[1]), 2)
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], told)
    """

    def said(clients: str) -> str:
        command = [sys.executable, "-c", program, clients]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    assert said("100").strip() == "1024"
    assert said("1000").strip() == "3300"
    assert "4096 open files are allowed" in said("2000")
    assert "enough for 1265 clients" in said("2000")


def test_a_server_listens_on_unix_sockets_as_well(tmp_path):
    path = tmp_path / "server"
    with serving("--listen", f"unix:{path}", shards=1) as servers:
        assert path.stat().st_mode & 0o777 == 0o600
        client = dmrpc_net.attach(f"unix:{path}", secret=servers.secret)
        assert client.get(client.put(b"x" * 100_000)) == b"x" * 100_000
        client.close()
    assert not path.exists()


def test_a_server_takes_no_path_from_anybody(tmp_path: Path):
    path = tmp_path / "server"
    path.write_text("something of somebody's")
    done = run("--secret", str(tmp_path / "secret"), "--listen", f"unix:{path}")
    assert done.returncode == 1
    assert path.read_text() == "something of somebody's"
    path.unlink()
    with serving("--listen", f"unix:{path}", shards=1) as servers:
        done = run("--secret", str(servers.secret), "--listen", f"unix:{path}")
        assert done.returncode == 1
        dmrpc_net.attach(f"unix:{path}", secret=servers.secret).close()
        servers.servers[0].kill()
        servers.servers[0].start()  # over what the dead one left there
        dmrpc_net.attach(f"unix:{path}", secret=servers.secret).close()


def test_a_server_does_not_listen_to_the_world_by_mistake(tmp_path: Path):
    done = run("--secret", str(tmp_path / "secret"), "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert "--anywhere" in done.stderr


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--listen", "nonsense"], "HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "HOST:PORT"),
        (["--size", "much"], "is not a size"),
        (["--size", "4096"], "cannot be cut"),
        (["--page-size", "5000"], "power of two"),
        (["--size", "100T"], ""),
    ],
)
def test_a_server_refuses_what_makes_no_sense(tmp_path: Path, args, what):
    done = run("--secret", str(tmp_path / "secret"), *args)
    assert done.returncode in (1, 2)
    assert what in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_reported():
    with serving(shards=1) as servers:
        done = run("--secret", str(servers.secret), "--listen", servers.addresses[0])
        assert done.returncode == 1
        assert "cannot listen" in done.stderr


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_pages_can_be_larger(page):
    with serving("--page-size", str(page), shards=1, size="8M") as servers:
        client = servers.client()
        assert client.page_size == page
        address = client.ralloc(3 * page)
        client.rwrite(address + page - 5, os.urandom(10))
        assert client.audit()["in_use"] == 2
        ref = client.create_ref(address, 2 * page)
        client.rwrite(address + page, b"x" * page)
        assert client.stats()["full_page_writes"] == 1
        assert len(client.get(ref)) == 2 * page


def test_a_server_can_copy_every_ref_at_once():
    with serving("--copy", shards=1) as servers:
        client = servers.client()
        ref, address = client.put(b"x" * 4 * PAGE, keep=True)
        other = client.create_ref(address, 4 * PAGE)
        assert client.stats()["pages_copied_eagerly"] == 4
        client.rwrite(address, b"y")
        assert client.get(other) == client.get(ref) == b"x" * 4 * PAGE


# ---------------------------------------------------------------- addresses as text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("host.example:1", ("host.example", 1)),
        ("[::1]:80", ("::1", 80)),
        ("unix:/run/x", "/run/x"),
    ],
)
def test_an_address_is_read_and_written(text, address):
    assert parse_address(text) == address
    assert show_address(address) == text


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:x", "host:-1", "host:65536", "host:\u0663"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(MisuseError):
        parse_address(text)


def test_refs_from_bytes_belong_to_the_newest_client(servers):
    older, newer = servers.client(), servers.client()
    wire = older.put(b"x").to_bytes()
    assert Ref.from_bytes(wire).client is newer
    assert Ref.from_bytes(wire, older).client is older
    older.drop_ref(wire)


def test_what_is_too_much_for_one_request_goes_in_several(servers):
    client, data = servers.client(), os.urandom(100_001)
    client.max_transfer = 30_000
    address = client.ralloc(len(data) + 5)
    client.rwrite(address + 5, data)
    assert client.read(address + 5, len(data)) == data
    into = bytearray(len(data))
    client.rread(address + 5, into)
    assert into == data
    ref, other = client.put(data, keep=True)
    assert client.get(ref, keep=True) == data
    wire = ref.clone().to_bytes()
    assert client.get(ref, offset=7, size=90_000) == data[7:90_007]
    assert not client.ref_is_held(ref)
    consumer = servers.client()
    consumer.max_transfer = 30_000
    assert consumer.get(wire) == data
    with pytest.raises(RefConsumed):
        consumer.get(wire)
    assert client.get(client.put(data)) == data
    with pytest.raises(BadSize):
        client.pipeline().rwrite(address, data)
    client.rfree(address)
    client.rfree(other)
    found = client.audit()
    assert found["nr_ranges"] == found["nr_refs"] == 0

"""The interface: a Ref as bytes. Passed on, pickled, damaged, forged, out of date, of another fabric."""

import copy
import gc
import pickle
import secrets
import struct
from collections.abc import Iterator

import pytest

import dmrpc_cxl
from dmrpc_cxl import Ref
from dmrpc_cxl._native import LAYOUT
from dmrpc_cxl.errors import BadRef, RefConsumed
from tests.crews import Crew, attach, in_host
from tests.fabrics import At, running
from tests.pictures import nothing_changes

WIRE = struct.Struct(
    "<HHIIIQQQ"
)  # magic, reserved, entry, generation, check, fabric, nonce, length


def checked(magic: int, reserved: int, entry: int, generation: int, *rest: int) -> bytes:
    """Return the bytes of a Ref with a checksum that is right: what only somebody hostile makes."""
    bare = WIRE.pack(magic, reserved, entry, generation, 0, *rest)
    value, mask = 0xCBF29CE484222325, (1 << 64) - 1
    for (word,) in struct.iter_unpack("<Q", bare):
        value = (value ^ word) * 0x9E3779B97F4A7C15 & mask
        value ^= value >> 29
    check = (value ^ value >> 32) & 0xFFFFFFFF
    return WIRE.pack(magic, reserved, entry, generation, check, *rest)


def refused(at: At, wire: bytes, *kinds: type[Exception]) -> None:
    """Assert that every way to use these bytes raises one of `kinds`, and that nothing has changed."""
    uses = (
        lambda: at.host.map_ref(wire),
        lambda: at.host.map_ref(wire, copy=True),
        lambda: at.host.map_ref(bytearray(wire)),
        lambda: Ref.from_bytes(wire, at.host).accept(),
        lambda: Ref.from_bytes(wire).clone(),
        lambda: at.host.map_ref(Ref.from_bytes(wire)),
    )
    with nothing_changes(at.host.fabric):
        for use in uses:
            with pytest.raises(kinds) as caught:
                use()
            assert isinstance(caught.value, ValueError)
        if kinds == (RefConsumed,):
            assert Ref.from_bytes(wire).drop() is False


def variants(wire: bytes) -> Iterator[bytes]:
    for place in range(len(wire)):
        for bit in range(8):
            yield wire[:place] + bytes([wire[place] ^ 1 << bit]) + wire[place + 1 :]


# ---------------------------------------------------------------- good bytes


@in_host
def test_a_ref_has_forty_bytes_whatever_it_covers(at: At) -> None:
    refs = [
        at.host.create_ref(at.host.ralloc(1), move=True),
        at.host.create_ref(at.host.ralloc(1 << 20), move=True),
        at.host.create_ref(at.host.ralloc(1 << 20, lazy=True), move=True),
    ]
    for ref in refs:
        assert len(ref.to_bytes()) == LAYOUT["REF_WIRE_BYTES"] == 40
        assert ref.to_bytes() == ref.to_bytes()
        assert checked(*WIRE.unpack(ref.to_bytes())[:4], *WIRE.unpack(ref.to_bytes())[5:]) == (
            ref.to_bytes()
        )  # or the forgeries below are none
        assert ref.drop()


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
@in_host
def test_bytes_come_in_any_form(at: At, form: type) -> None:
    buffer = at.host.array([1, 2, 3])
    for read in (at.host.map_ref, lambda data: at.host.map_ref(Ref.from_bytes(data))):
        with read(form(at.host.create_ref(buffer).to_bytes())) as received:
            assert bytes(received) == buffer.tobytes()


@in_host
def test_pickling_is_the_same_as_sending_the_bytes(at: At) -> None:
    buffer = at.host.array([1, 2, 3])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        ref = at.host.create_ref(buffer)
        text = pickle.dumps({"ref": ref}, protocol)
        assert ref.to_bytes() in text or protocol < 3
        received = pickle.loads(text)["ref"]
        assert (type(received), len(received), received.host) == (Ref, len(ref), at.host)
        del ref
        gc.collect()  # what was pickled is on its way
        with at.host.map_ref(received) as mapped:
            assert bytes(mapped) == buffer.tobytes()


@in_host
def test_a_copied_ref_object_is_the_same_ref(at: At) -> None:
    ref = at.host.create_ref(at.host.array([1, 2, 3]))
    same = copy.copy(ref)
    assert same.to_bytes() == ref.to_bytes()
    at.host.map_ref(ref).free()
    with pytest.raises(RefConsumed):
        at.host.map_ref(same)


@in_host
def test_a_used_ref_is_not_pickled(at: At) -> None:
    ref = at.host.create_ref(at.host.array([1, 2, 3]))
    ref.drop()
    with pytest.raises(RefConsumed):
        pickle.dumps(ref)


def test_refs_pass_through_hosts_that_do_not_look_at_them(crew: Crew) -> None:
    creator, *forwarders, consumer = crew[:4]
    creator.ralloc("buffer", 100)
    creator.write("buffer", b"made")
    wire = creator.create_ref("buffer")
    for forwarder in forwarders:
        wire = forwarder.call(pass_on, wire)
    consumer.map_ref("buffer", wire)
    assert consumer.read("buffer", 4) == b"made"


def pass_on(at: At, wire: bytes) -> bytes:
    ref = Ref.from_bytes(wire)
    assert at.host.stats()["mappings"] == 0
    return ref.to_bytes()


# ---------------------------------------------------------------- bad bytes


@pytest.mark.parametrize("length", [0, 1, 39, 41, 80, 4096])
@in_host
def test_bytes_of_another_length_are_no_ref(at: At, length: int) -> None:
    wire = at.host.create_ref(at.host.ralloc(10), move=True).to_bytes()
    refused(at, (wire * 103)[:length], BadRef)
    at.host.map_ref(wire).free()


@in_host
def test_a_ref_with_any_bit_flipped_is_refused_and_the_ref_is_still_good(at: At) -> None:
    array = at.host.array([1, 2, 3])
    wire = at.host.create_ref(array).to_bytes()
    with nothing_changes(at.host.fabric):
        for damaged in variants(wire):
            for use in (at.host.map_ref, Ref.from_bytes):
                with pytest.raises(BadRef):
                    use(damaged)
    with at.host.map_ref(wire) as received:
        assert bytes(received) == array.tobytes()


@in_host
def test_random_bytes_are_no_ref(at: At) -> None:
    for _ in range(200):
        refused(at, secrets.token_bytes(40), BadRef)
    refused(at, bytes(40), BadRef)
    refused(at, b"\xff" * 40, BadRef)


@pytest.mark.parametrize("what", [None, "x" * 40, 1.5, [1] * 41])
@in_host
def test_what_is_no_bytes_is_refused(at: At, what: object) -> None:
    with nothing_changes(at.host.fabric):
        for use in (at.host.map_ref, Ref.from_bytes):
            with pytest.raises((TypeError, BadRef)):
                use(what)


@in_host
def test_a_forged_ref_is_refused_and_the_ref_it_imitates_is_still_good(at: At) -> None:
    array = at.host.array([1, 2, 3])
    wire = at.host.create_ref(array).to_bytes()
    magic, reserved, entry, generation, _, fabric, nonce, length = WIRE.unpack(wire)
    for guess in (nonce ^ 1, nonce + 1 & (1 << 64) - 1, 0, secrets.randbits(64)):
        refused(at, checked(magic, reserved, entry, generation, fabric, guess, length), BadRef)
    for other in (1 << 14, (1 << 32) - 1):  # the device has 16384 entries
        refused(at, checked(magic, reserved, other, generation, fabric, nonce, length), BadRef)
    for wrong in (generation + 1, generation - 1 & 0xFFFFFFFF, generation ^ 1 << 31):
        refused(at, checked(magic, reserved, entry, wrong, fabric, nonce, length), RefConsumed)
    refused(at, checked(magic ^ 1, reserved, entry, generation, fabric, nonce, length), BadRef)
    refused(at, checked(magic, 1, entry, generation, fabric, nonce, length), BadRef)
    with at.host.map_ref(wire) as received:
        assert bytes(received) == array.tobytes()


@in_host
def test_a_ref_with_a_forged_length_is_refused(at: At) -> None:
    array = at.host.array([1, 2, 3])
    wire = at.host.create_ref(array).to_bytes()
    for length in (0, 1, 23, 25, 1 << 20, (1 << 64) - 1):
        fields = WIRE.unpack(wire)
        refused(at, checked(*fields[:4], *fields[5:7], length), BadRef)
    with at.host.map_ref(wire) as received:
        assert bytes(received) == array.tobytes()


@in_host
def test_the_bytes_of_a_used_ref_stay_useless_however_often_its_entry_is_used_again(
    at: At,
) -> None:
    array = at.host.array([1, 2, 3])
    stale = [at.host.create_ref(array).to_bytes()]
    at.host.map_ref(stale[0]).free()
    for _ in range(50):
        wire = at.host.create_ref(array).to_bytes()
        assert wire not in stale
        at.host.map_ref(wire).free()
        stale.append(wire)
    assert len({WIRE.unpack(wire)[2] for wire in stale}) < 51  # some entry was used again
    for wire in stale:
        refused(at, wire, RefConsumed)


@in_host
def test_nonces_do_not_repeat_and_look_random(at: At) -> None:
    array = at.host.array([1, 2, 3])
    nonces = set()
    for _ in range(500):
        ref = at.host.create_ref(array)
        nonces.add(WIRE.unpack(ref.to_bytes())[6])
        ref.drop()
    assert len(nonces) == 500
    ones = [sum(nonce >> bit & 1 for nonce in nonces) for bit in range(64)]
    assert all(150 < count < 350 for count in ones)  # 9 standard deviations to either side


@in_host
def test_bytes_that_somebody_else_accepted_are_out_of_date(at: At) -> None:
    array = at.host.array([1, 2, 3])
    with attach(at) as other:
        wire = at.host.create_ref(array).to_bytes()
        ref = Ref.from_bytes(wire, other).accept()
        for host in (at.host, other):
            with nothing_changes(at.host.fabric), pytest.raises(RefConsumed):
                host.map_ref(wire)
        other.map_ref(ref).free()


# ---------------------------------------------------------------- other fabrics


def test_a_ref_of_another_fabric_is_refused(crew: Crew) -> None:
    with running(size=4 << 20) as elsewhere:
        crew[0].call(use_two_fabrics, elsewhere.name)


def use_two_fabrics(at: At, name: str) -> None:
    with dmrpc_cxl.attach(name) as other:
        here, there = at.host.array([1]), other.array([2])
        ours, theirs = at.host.create_ref(here), other.create_ref(there)
        refused_by_the_other = (
            lambda: at.host.map_ref(theirs),
            lambda: other.map_ref(ours),
            lambda: at.host.map_ref(theirs.to_bytes()),
            lambda: Ref.from_bytes(theirs.to_bytes(), at.host),
            lambda: Ref.from_bytes(ours.to_bytes(), other),
        )
        with nothing_changes(at.host.fabric), nothing_changes(name):
            for use in refused_by_the_other:
                with pytest.raises(BadRef):
                    use()
        # By default a Ref finds the host of its own fabric.
        assert Ref.from_bytes(theirs.to_bytes()).host is other
        assert pickle.loads(pickle.dumps(ours)).host is at.host
        with at.host.map_ref(ours) as one, other.map_ref(theirs) as two:
            assert (bytes(one)[0], bytes(two)[0]) == (1, 2)
        wire = other.create_ref(there).to_bytes()
        del there
    with pytest.raises(BadRef):
        Ref.from_bytes(wire)

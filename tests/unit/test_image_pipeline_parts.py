"""What the image pipeline is made of and needs no fabric: bitmaps, what is computed, users, the books of the object store."""

from __future__ import annotations

import io
import random
import zlib

import numpy as np
import pytest
from PIL import Image

from examples.image_pipeline import bmp, photographs
from examples.image_pipeline.hosts import hosts
from examples.image_pipeline.store import ALIGNMENT, ObjectStore, StoreFull, UnknownObject
from examples.image_pipeline.users import TOKEN_BYTES, UserTable
from examples.image_pipeline.work import WORKS, Op, checksum, compute


def noise(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(width * 1000 + height)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


# ---------------------------------------------------------------- bitmaps

SHAPES = [(34, 40), (35, 41), (36, 10), (37, 113), (1, 1), (2, 3), (3, 2), (136, 160)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_a_bitmap_is_one_for_others_too(width: int, height: int) -> None:
    pixels = noise(width, height)
    file = bmp.from_pixels(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.tobytes()))), pixels)
    assert np.array_equal(bmp.to_pixels(file), pixels)


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_a_bitmap_of_others_is_read(width: int, height: int) -> None:
    pixels = noise(width, height)
    with io.BytesIO() as written:
        Image.fromarray(pixels).save(written, "BMP")
        file = np.frombuffer(written.getvalue(), np.uint8)
    assert bmp.read_header(file) == (width, height)
    assert np.array_equal(bmp.to_pixels(file), pixels)


def damaged(how: str) -> np.ndarray:
    file = bmp.from_pixels(noise(34, 40))
    if how == "cut short":
        return file[:-1]
    if how == "headers only":
        return file[: bmp.HEADER_BYTES]
    if how == "nothing":
        return file[:0]
    if how == "a JPEG":
        return compute(Op.COMPRESS, "real", file).result
    at = {"magic": 0, "size": 2, "pixels begin": 10, "info": 14, "bits": 28, "compression": 30}[how]
    file[at] ^= 1
    return file


DAMAGES = (
    "cut short", "headers only", "nothing", "a JPEG", "magic", "size", "pixels begin", "info", "bits", "compression",
)  # fmt: skip


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_no_such_bitmap_is_refused_by_every_work(how: str, work: str) -> None:
    for op in Op:
        with pytest.raises(bmp.NotABitmap):
            compute(op, work, damaged(how))


@pytest.mark.parametrize("at", [18, 22])
def test_impossible_dimensions_are_refused(at: int) -> None:
    for value in (0, -1, 2**31 - 1, -(2**31)):
        file = bmp.from_pixels(noise(34, 40))
        file[at : at + 4] = np.frombuffer(value.to_bytes(4, "little", signed=True), np.uint8)
        with pytest.raises(bmp.NotABitmap):
            bmp.read_header(file)


# ---------------------------------------------------------------- scaling down


def scaled_pixel_by_pixel(file: bytes, scale: float) -> bytes:
    """Do what scale_down does, one pixel after the other, on bytes, with a header of its own."""
    width = int.from_bytes(file[18:22], "little")
    height = int.from_bytes(file[22:26], "little")
    new_width, new_height = int(width * scale), int(height * scale)
    row, new_row = 3 * width + width % 4, 3 * new_width + new_width % 4
    result = bytearray(54 + new_row * new_height)
    result[:54] = file[:54]
    result[2:6] = len(result).to_bytes(4, "little")
    result[18:22] = new_width.to_bytes(4, "little")
    result[22:26] = new_height.to_bytes(4, "little")
    result[34:38] = (new_row * new_height).to_bytes(4, "little")
    for i in range(new_height):
        source_row = min(height - 1, int(i / scale + 0.5))
        for j in range(new_width):
            source = 54 + source_row * row + 3 * min(width - 1, int(j / scale + 0.5))
            target = 54 + i * new_row + 3 * j
            result[target : target + 3] = file[source : source + 3]
    return bytes(result)


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.3, 1.0])
@pytest.mark.parametrize(("width", "height"), [*SHAPES, (95, 112), (192, 227)])
def test_scaling_down_is_what_it_is_pixel_by_pixel(width: int, height: int, scale: float) -> None:
    file = bmp.from_pixels(noise(width, height))
    if not int(scale * width) or not int(scale * height):
        with pytest.raises(bmp.NotABitmap):
            bmp.scale_down(file, scale)
        return
    assert bmp.scale_down(file, scale).tobytes() == scaled_pixel_by_pixel(file.tobytes(), scale)


SCALED = {
    4: 102,
    8: 114,
    16: 214,
    32: 362,
    64: 694,
    128: 1374,
    256: 2742,
    512: 5274,
    1024: 10550,
    2048: 20934,
}


@pytest.mark.parametrize("kib", SCALED)
def test_photographs_scaled_down_have_the_sizes_that_follow_from_their_dimensions(kib: int) -> None:
    [picture] = photographs.pictures(kib << 10, 1)
    smaller = bmp.scale_down(picture.file)
    assert smaller.nbytes == SCALED[kib]
    header = bmp.read_header(smaller)
    assert header == tuple(int(0.1 * length) for length in photographs.SIZES[kib << 10])


# ---------------------------------------------------------------- other work


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 4096, 65541])
def test_a_checksum_changes_with_every_byte(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    before = checksum(data)
    for at in {*range(min(nbytes, 20)), *range(max(0, nbytes - 20), nbytes)}:
        data[at] ^= 0x80
        assert checksum(data) != before
        data[at] ^= 0x80
    assert checksum(data) == before


def test_compressed_pictures_are_the_same_again() -> None:
    [picture] = photographs.pictures(64 << 10, 1)
    light = compute(Op.COMPRESS, "light", picture.file).result
    assert zlib.decompress(light.tobytes()) == picture.file.tobytes()
    assert light.nbytes < picture.file.nbytes
    real = Image.open(io.BytesIO(compute(Op.COMPRESS, "real", picture.file).result.tobytes()))
    assert real.format == "JPEG"
    difference = np.asarray(real).astype(int) - bmp.to_pixels(picture.file)
    assert abs(difference).mean() < 12


def test_a_picture_that_is_really_transcoded_is_half_as_wide() -> None:
    [picture] = photographs.pictures(64 << 10, 1)
    real = Image.open(io.BytesIO(compute(Op.TRANSCODE, "real", picture.file).result.tobytes()))
    assert real.format == "JPEG"
    whole = Image.fromarray(np.ascontiguousarray(bmp.to_pixels(picture.file)))
    half = np.asarray(whole.resize(real.size, Image.Resampling.BILINEAR)).astype(int)
    assert real.size == (68, 80)
    assert abs(np.asarray(real) - half).mean() < 12


def test_no_work_changes_its_picture() -> None:
    [picture] = photographs.pictures(16 << 10, 1)
    before = picture.file.copy()
    picture.file.flags.writeable = False
    for op in Op:
        for work in WORKS:
            compute(op, work, picture.file)
    assert np.array_equal(picture.file, before)


# ---------------------------------------------------------------- photographs


@pytest.mark.parametrize("nominal", photographs.SIZES)
def test_pictures_have_about_their_nominal_size_and_are_all_different(nominal: int) -> None:
    number = photographs.NR_PICTURES if nominal <= 64 << 10 else 9
    made = list(photographs.pictures(nominal, number))
    assert len({picture.name for picture in made}) == number
    assert len({picture.file.tobytes() for picture in made}) == number
    for picture in made:
        assert abs(picture.file.nbytes / nominal - 1) < 0.05
    assert photographs.size_named(photographs.name_of(nominal)) == nominal


def test_sizes_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="4K, 8K"):
        photographs.size_named("5K")
    with pytest.raises(ValueError, match="there are"):
        next(photographs.pictures(4096, photographs.NR_PICTURES + 1))


# ---------------------------------------------------------------- users


def test_a_token_is_good_for_its_user_and_request_alone() -> None:
    users = UserTable.of_fabric(b"s" * 32)
    token = users.token(3, 1000)
    assert len(bytes.fromhex(token)) == TOKEN_BYTES
    assert users.admits(3, 1000, token)
    assert not users.admits(3, 1001, token)
    assert not users.admits(4, 1000, token)
    assert not users.admits(99, 1000, token)
    assert not UserTable.of_fabric(b"t" * 32).admits(3, 1000, token)
    assert UserTable.of_fabric(b"s" * 32).admits(3, 1000, token)


@pytest.mark.parametrize("token", ["", "0" * 32, "é" * 32, "0" * 1000])
def test_a_token_of_nobody_is_refused(token: str) -> None:
    users = UserTable.of_fabric(b"s" * 32)
    assert not users.admits(1, 1, token)


@pytest.mark.parametrize("req_id", [-1, 1 << 64])
def test_a_request_number_that_cannot_be_signed_is_refused(req_id: int) -> None:
    users = UserTable.of_fabric(b"s" * 32)
    assert not users.admits(1, req_id, users.token(1, 1))


def test_unknown_users_cannot_sign() -> None:
    with pytest.raises(KeyError):
        UserTable.of_fabric(b"s" * 32).token(99, 1)


# ---------------------------------------------------------------- hosts


def test_seven_hosts_share_the_work_and_the_store_joins_when_it_is_needed() -> None:
    names = [host.name for host in hosts()]
    assert names == [
        "client", "firewall", "balancer", "processor-1", "processor-2", "transcoder", "compressor",
    ]  # fmt: skip
    more = hosts(["--variants", "value,store", "--transport", "tcp"], nr_processors=3)
    assert [host.name for host in more][-1] == "store"
    assert len(more) == 9
    for host in more[1:]:
        argv = host.programs[0].argv
        assert argv[argv.index("--transport") + 1] == "tcp"
        assert argv[argv.index("--processors") + 1] == "3"


# ---------------------------------------------------------------- the store


def test_the_store_gives_out_room_that_nobody_has_and_takes_it_back() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    drawn = random.Random(seed)
    pages = 64
    store = ObjectStore(pages * ALIGNMENT)
    there: dict[int, tuple[int, int]] = {}
    for _ in range(3000):
        if there and drawn.random() < 0.5:
            number = drawn.choice(list(there))
            del there[number]
            store.delete(number)
        else:
            nbytes = drawn.randrange(1, 12 * ALIGNMENT)
            try:
                place = store.create(nbytes)
            except StoreFull:
                continue
            there[place.number] = (place.offset, place.offset + nbytes)
        ends = sorted(there.values())
        assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
        assert not ends or ends[-1][1] <= pages * ALIGNMENT
    for number in there:
        store.delete(number)
    assert store.nr_objects() == 0
    assert store.create(pages * ALIGNMENT).offset == 0  # all of it, in one piece


def test_an_object_stays_as_long_as_somebody_looks_at_it() -> None:
    store = ObjectStore(ALIGNMENT)
    place = store.create(100)
    with pytest.raises(UnknownObject):
        store.get(place.number)  # not sealed
    store.seal(place.number)
    assert store.get(place.number) == place
    store.delete(place.number)
    with pytest.raises(UnknownObject):
        store.get(place.number)
    with pytest.raises(StoreFull):
        store.create(1)
    store.release(place.number)
    assert store.nr_objects() == 0
    store.create(1)

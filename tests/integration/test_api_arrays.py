"""The interface: arrays that live in DM, made by the host or laid over a Buffer."""

import gc

import numpy as np
import pytest

from dmrpc_cxl.errors import BadAddress, BadSize, BufferInUse, MisuseError, OutOfFrames
from tests.crews import in_host
from tests.fabrics import At
from tests.pictures import nothing_changes

DTYPES = ["u1", "<i2", ">i4", "=f8", ">f4", "c16", "?", "S7", "U3", "M8[ns]", "V5", "f2",
          "i4,f8", "(2,3)i2"]  # fmt: skip


# ---------------------------------------------------------------- empty, zeros, array


@pytest.mark.parametrize("dtype", DTYPES)
@in_host
def test_zeros_is_as_numpys(at: At, dtype: str) -> None:
    for shape in (1, 7, (3,), (2, 3), [4, 1], (2, 1, 5), ()):
        ours, numpys = at.host.zeros(shape, dtype), np.zeros(shape, dtype)
        assert (ours.shape, ours.dtype, ours.strides) == (
            numpys.shape,
            numpys.dtype,
            numpys.strides,
        )
        assert ours.tobytes() == numpys.tobytes()
        assert type(ours) is np.ndarray
        assert ours.flags.writeable
        assert ours.flags.c_contiguous
        assert at.host.contains(ours)


@pytest.mark.parametrize("dtype", DTYPES)
@in_host
def test_array_copies_values_with_their_type(at: At, dtype: str) -> None:
    rng = np.random.default_rng(2)
    zeros = np.zeros((3, 4), dtype)
    values = np.frombuffer(rng.integers(0, 2, zeros.nbytes, "u1").tobytes(), zeros.dtype).reshape(
        zeros.shape
    )
    ours = at.host.array(values)
    assert ours.dtype == values.dtype
    assert ours.tobytes() == values.tobytes()
    assert not np.shares_memory(ours, values)
    ours[...] = 0 if values.dtype.kind in "uifc" else zeros
    assert values.tobytes() != ours.tobytes()


@in_host
def test_array_takes_what_numpy_takes(at: At) -> None:
    assert at.host.array([1, 2, 3]).dtype == np.array([1, 2, 3]).dtype
    assert at.host.array([1, 2.5], dtype=">f4").tolist() == [1.0, 2.5]
    assert at.host.array(7).shape == ()
    assert at.host.array(7)[()] == 7
    assert at.host.array("text").item() == "text"
    assert at.host.array(range(4)).tolist() == [0, 1, 2, 3]
    fortran = np.arange(6).reshape(2, 3, order="F")[::-1]
    assert at.host.array(fortran).tolist() == fortran.tolist()
    assert at.host.array(at.host.array([1, 2])[::-1]).tolist() == [2, 1]
    masked = np.ma.masked_array([1, 2], [True, False])
    assert type(at.host.array(masked)) is np.ndarray


@in_host
def test_empty_has_the_shape_and_may_be_anything(at: At) -> None:
    array = at.host.empty((10, 20), ">i2")
    assert (array.shape, array.dtype, array.nbytes) == ((10, 20), np.dtype(">i2"), 400)
    array[:] = 5
    assert array.sum() == 1000
    assert at.host.empty(3).dtype == np.dtype(float)
    assert at.host.zeros(3).dtype == np.dtype(float)


@pytest.mark.parametrize("shape", [0, (0,), (0, 5), (5, 0, 2)])
@in_host
def test_arrays_without_elements_exist(at: At, shape: object) -> None:
    for array in (at.host.zeros(shape), at.host.empty(shape), at.host.array(np.zeros(shape))):
        assert array.shape == np.zeros(shape).shape
        assert array.size == 0
        assert array.tolist() == np.zeros(shape).tolist()


@in_host
def test_a_zero_dimensional_array_is_written_and_shared(at: At) -> None:
    array = at.host.array(7, dtype=">i8")
    ref = at.host.create_ref(array)
    array[()] = 8
    with at.host.map_ref(ref) as buffer:
        assert int.from_bytes(bytes(buffer), "big") == 7
    assert array == 8


@pytest.mark.parametrize("shape", [np.int64(3), np.uint8(3), (np.int32(3), 2), np.array([3, 2])])
@in_host
def test_shapes_may_be_numpys_integers(at: At, shape: object) -> None:
    assert at.host.zeros(shape).shape == np.zeros(shape).shape
    assert at.host.empty(shape).shape == np.zeros(shape).shape


@pytest.mark.parametrize("shape", [-1, (-1,), (2, -3), (-1, -1)])
@in_host
def test_a_negative_shape_is_refused_and_leaves_nothing(at: At, shape: object) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(ValueError):
        at.host.zeros(shape)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [1 << 50, (1 << 40, 1 << 40), 1 << 70, (np.int64(1 << 40),) * 2])
@in_host
def test_an_array_too_large_is_refused_and_leaves_nothing(at: At, shape: object) -> None:
    with nothing_changes(at.host.fabric), pytest.raises((OutOfFrames, ValueError)):
        at.host.zeros(shape)


@pytest.mark.parametrize("shape", [None, "3", 2.5, (2, "x"), (2.5,)])
@in_host
def test_what_is_no_shape_is_refused_and_leaves_nothing(at: At, shape: object) -> None:
    with nothing_changes(at.host.fabric), pytest.raises(TypeError):
        at.host.empty(shape)


@pytest.mark.parametrize("dtype", [object, "O", "i4,O", [("a", "i4"), ("b", object)], "(2,)O"])
@in_host
def test_python_objects_are_refused(at: At, dtype: object) -> None:
    with nothing_changes(at.host.fabric):
        for make in (at.host.empty, at.host.zeros):
            with pytest.raises(TypeError):
                make(3, dtype)
        with pytest.raises(TypeError):
            at.host.array([None], dtype)
        with pytest.raises(TypeError):
            at.host.array([object(), {}])
    buffer = at.host.ralloc(4096)
    with pytest.raises(TypeError):  # its bytes would be taken for pointers
        buffer.numpy(dtype, (1,))
    assert buffer.views == 0


# ---------------------------------------------------------------- life of an array


@in_host
def test_an_array_is_freed_with_its_last_view(at: At) -> None:
    before = at.host.stats()["mappings"]
    array = at.host.array(np.arange(1000))
    column = array.reshape(10, 100)[:, 3]
    view = memoryview(column)
    del array
    assert at.host.stats()["mappings"] == before + 1
    del column
    assert at.host.stats()["mappings"] == before + 1
    assert view[1] == 103
    del view
    assert at.host.stats()["mappings"] == before


@in_host
def test_an_array_in_cyclic_garbage_is_freed(at: At) -> None:
    before = at.host.stats()["mappings"]
    cycle: list[object] = [at.host.zeros(10)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert at.host.stats()["mappings"] == before


@pytest.mark.parametrize("dtype", ["u1", ">i4", "f8"])
@in_host
def test_arrays_over_a_buffer_are_views_that_keep_it(at: At, dtype: str) -> None:
    buffer = at.host.ralloc(80)
    array = buffer.numpy(dtype)
    assert array.nbytes == 80
    assert array.dtype == np.dtype(dtype)
    assert array.flags.writeable
    array[-1] = 1
    assert bytes(buffer) == array.tobytes() != bytes(80)
    assert buffer.views >= 1
    with nothing_changes(at.host.fabric):
        for take_away in (
            buffer.free,
            lambda: at.host.create_ref(buffer, move=True),
            lambda: at.host.rfree(buffer.address),
            lambda: at.host.create_ref(buffer.address, move=True),
        ):
            with pytest.raises(BufferInUse):
                take_away()
    part = array[1:2]
    del array
    with pytest.raises(BufferInUse):
        buffer.free()
    del part
    buffer.free()


@in_host
def test_the_memory_of_a_made_array_cannot_be_taken_away(at: At) -> None:
    for array in (at.host.array([1, 2, 3]), at.host.zeros(5), at.host.empty(5)):
        address = array.__array_interface__["data"][0]
        with nothing_changes(at.host.fabric):
            with pytest.raises(BufferInUse):
                at.host.rfree(address)
            with pytest.raises(BufferInUse):
                at.host.create_ref(address, move=True)
            with pytest.raises(BufferInUse):
                at.host.create_ref(array, move=True)
            with pytest.raises(BufferInUse):
                at.host.detach()
        array[0] = 9


# ---------------------------------------------------------------- Buffer.numpy


@in_host
def test_numpy_takes_type_shape_and_offset(at: At) -> None:
    buffer = at.host.ralloc(120)
    memoryview(buffer)[:] = bytes(range(120))
    assert buffer.numpy().shape == (120,)
    assert buffer.numpy("u2").shape == (60,)
    assert buffer.numpy(">u2", offset=20)[0] == 20 * 256 + 21
    assert buffer.numpy("u1", (2, 5), offset=100).tolist() == [
        [*range(100, 105)],
        [*range(105, 110)],
    ]
    assert buffer.numpy("u1", 3).tolist() == [0, 1, 2]
    assert buffer.numpy("u1", (), offset=7) == 7
    assert buffer.numpy("u1", offset=120).shape == (0,)
    assert buffer.numpy("i8", (0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("args", "offset"),
    [
        (("i8",), 4),  # no whole number of elements
        (("i4", 31), 0),  # beyond the end
        (("i4", (4, 8)), 0),
        (("u1", 1), 120),
        (("u1",), 121),
        (("u1",), -1),  # before the start
        (("u1", 4), -4),
        (("u1",), -121),
        (("S",), 0),  # elements without size
        (("V0",), 0),
        (("u1", (-2, -3)), 0),
    ],
)
@in_host
def test_numpy_refuses_what_does_not_fit(at: At, args: tuple[object, ...], offset: int) -> None:
    buffer = at.host.ralloc(120)
    with pytest.raises((BadSize, ValueError, TypeError)):
        buffer.numpy(*args, offset=offset)
    assert buffer.views == 0


# ---------------------------------------------------------------- create_ref of arrays


@in_host
def test_a_ref_to_an_array_is_what_the_array_was(at: At) -> None:
    array = at.host.array(np.arange(3000, dtype=">i4").reshape(30, 100))
    expected = array.tobytes()
    ref = at.host.create_ref(array)
    assert (ref.nbytes, len(ref)) == (12000, 12000)
    array[...] = 0
    buffer = at.host.map_ref(ref)
    assert bytes(buffer) == expected
    assert buffer.numpy(">i4", (30, 100))[29, 99] == 2999


@in_host
def test_a_ref_to_a_slice_is_that_slice(at: At) -> None:
    array = at.host.array(np.arange(10_000, dtype="i4"))
    for start, stop in ((0, 1), (1, 2), (1023, 1025), (500, 9500), (9999, 10_000), (1024, 2048)):
        part = array[start:stop]
        with at.host.map_ref(at.host.create_ref(part)) as buffer:
            assert bytes(buffer) == part.tobytes()
            assert buffer.address % 4096 == (start * 4) % 4096
    rows = array.reshape(100, 100)[17:19]
    with at.host.map_ref(at.host.create_ref(rows)) as buffer:
        assert bytes(buffer) == rows.tobytes()


@in_host
def test_a_ref_to_a_memoryview_is_that_view(at: At) -> None:
    buffer = at.host.ralloc(9000)
    buffer.numpy()[:] = np.arange(9000) % 251
    for view in (
        memoryview(buffer),
        memoryview(buffer)[4000:5000],
        memoryview(buffer)[5000:].cast("i"),
        memoryview(buffer).toreadonly(),
    ):
        with at.host.map_ref(at.host.create_ref(view)) as received:
            assert bytes(received) == view.tobytes()


@in_host
def test_stores_through_every_view_are_copied_on_write(at: At) -> None:
    array = at.host.array(np.zeros(5000, "u1"))
    ref = at.host.create_ref(array[4000:4200])
    memoryview(array)[4100] = 1
    array.view("i1")[4101] = 2
    array[::-1][0] = 3  # another page
    np.frombuffer(array, "u1")[4000] = 4
    with at.host.map_ref(ref) as received:
        assert bytes(received) == bytes(200)


@pytest.mark.parametrize("pick", ["[::2]", "[::-1]", ".T", "[:, 0]", "[:, ::3]"])
@in_host
def test_an_array_that_is_not_contiguous_is_refused(at: At, pick: str) -> None:
    array = at.host.array(np.arange(100).reshape(10, 10))
    view = eval("array" + pick, {"array": array})
    with nothing_changes(at.host.fabric), pytest.raises(BadAddress) as caught:
        at.host.create_ref(view)
    assert "contiguous" in str(caught.value)
    array[...] = 1  # and it is not protected


@in_host
def test_an_array_that_is_not_in_dm_is_refused(at: At) -> None:
    for elsewhere in (np.zeros(10), b"bytes", bytearray(5), memoryview(b"x"), np.float64(3)):
        with nothing_changes(at.host.fabric), pytest.raises(BadAddress) as caught:
            at.host.create_ref(elsewhere)
        assert isinstance(caught.value, ValueError)


@in_host
def test_an_array_without_bytes_makes_no_ref(at: At) -> None:
    array = at.host.zeros((0, 5))
    with nothing_changes(at.host.fabric), pytest.raises(BadSize):
        at.host.create_ref(array)
    with nothing_changes(at.host.fabric), pytest.raises(BadSize):
        at.host.create_ref(at.host.zeros(10)[5:5])


@in_host
def test_a_view_beyond_its_buffer_makes_no_ref(at: At) -> None:
    page = at.host.page_size
    buffer = at.host.ralloc(page + 100)
    # Padding up to the end of the page belongs to the buffer's frames, but is not the user's.
    with nothing_changes(at.host.fabric), pytest.raises(MisuseError):
        at.host.create_ref(buffer.address, page + 101)
    with nothing_changes(at.host.fabric), pytest.raises(MisuseError):
        at.host.create_ref(buffer.address + page + 100, 1)
    strided = np.lib.stride_tricks.as_strided(buffer.numpy(), (2 * page,), (1,))
    with nothing_changes(at.host.fabric), pytest.raises(MisuseError):
        at.host.create_ref(strided)


# ---------------------------------------------------------------- contains


@in_host
def test_contains_tells_what_lies_in_dm_of_this_host(at: At) -> None:
    buffer = at.host.ralloc(2 * at.host.page_size)
    array = buffer.numpy("i4")
    inside = (buffer, array, array[5:7], array[::-2], array[3:3], memoryview(buffer)[7:],
              buffer.address, buffer.address + len(buffer) - 1)  # fmt: skip
    assert all(at.host.contains(target) for target in inside)
    outside = (np.zeros(3), b"x", bytearray(1), 0, -1, 1 << 64, 1 << 70, id(buffer),
               buffer.address - 1 - at.host.page_size * 10_000)  # fmt: skip
    assert not any(at.host.contains(target) for target in outside)
    address = buffer.address
    del array, inside
    buffer.free()
    assert not at.host.contains(address)
    for target in (None, "x", 1.5):
        with pytest.raises(TypeError):
            at.host.contains(target)

"""24-bit bitmaps: what a picture is while it travels, and scaling one down. Knows nothing of DM.

A file has a header of 14 bytes, one of 40, and the rows of pixels, the lowest first, blue before green before red. A row is
padded to a multiple of 4 bytes; at 3 bytes a pixel that is width mod 4 bytes of padding. Nothing else is accepted: no palette,
no compression, no other depth, no rows from top to bottom.

Files are arrays of bytes. They are looked at where they lie: in a message, or in DM.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

# magic, bytes of the file, 2 reserved, where the pixels begin | 40, width, height, planes, bits, compression,
# bytes of the pixels, 2 resolutions, 2 sizes of a palette
_HEADERS = struct.Struct("<2sIHHIIiiHHIIiiII")
HEADER_BYTES = _HEADERS.size
_INFO_BYTES = 40
_BITS = 24
_UNCOMPRESSED = 0
SCALE = 0.1


class NotABitmap(ValueError):
    """These bytes are no picture of the only kind that is understood here."""


class Header(NamedTuple):
    """What the headers say."""

    width: int
    height: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padding included."""
        return 3 * self.width + self.width % 4

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return HEADER_BYTES + self.row_bytes * self.height


def read_header(file: Bytes) -> Header:
    """Read the headers of a file.

    Raises:
        NotABitmap: it is something else, or not whole.
    """
    if file.nbytes < HEADER_BYTES:
        raise NotABitmap(f"{file.nbytes} bytes: not even the headers of a bitmap")
    magic, size, _, _, begin, info, width, height, _, bits, compression, *_ = _HEADERS.unpack_from(
        file.data
    )
    if (magic, begin, info, bits, compression) != (
        b"BM",
        HEADER_BYTES,
        _INFO_BYTES,
        _BITS,
        _UNCOMPRESSED,
    ):
        raise NotABitmap("not a 24-bit uncompressed bitmap")
    header = Header(width, height)
    if width < 1 or height < 1 or header.file_bytes != file.nbytes or size != file.nbytes:
        raise NotABitmap(f"{width} x {height} pixels in a file of {file.nbytes} bytes")
    return header


def rows_of(file: Bytes, header: Header) -> Bytes:
    """Return the rows, lowest first, padding included: height x row_bytes; nothing is copied."""
    return file[HEADER_BYTES:].reshape(header.height, header.row_bytes)


def _new_file(header: Header) -> Bytes:
    file = np.zeros(header.file_bytes, np.uint8)
    _HEADERS.pack_into(
        file.data, 0, b"BM", header.file_bytes, 0, 0, HEADER_BYTES, _INFO_BYTES, header.width,
        header.height, 1, _BITS, _UNCOMPRESSED, header.row_bytes * header.height, 0, 0, 0, 0,
    )  # fmt: skip
    return file


def from_pixels(pixels: npt.NDArray[np.uint8]) -> Bytes:
    """Make a file of pixels: height x width x 3, red first, the highest row first."""
    height, width, _ = pixels.shape
    header = Header(width, height)
    file = _new_file(header)
    rows_of(file, header)[:, : 3 * width] = pixels[::-1, :, ::-1].reshape(height, 3 * width)
    return file


def to_pixels(file: Bytes) -> npt.NDArray[np.uint8]:
    """Return the pixels of a file: height x width x 3, red first, the highest row first; nothing is copied.

    Raises:
        NotABitmap: as read_header.
    """
    header = read_header(file)
    rows = rows_of(file, header)[:, : 3 * header.width]
    return rows.reshape(header.height, header.width, 3)[::-1, :, ::-1]


# ---------------------------------------------------------------- scaling down


@functools.lru_cache(maxsize=256)
def _chosen(length: int, scale: float) -> npt.NDArray[np.intp]:
    """Return which of so many rows or columns are nearest to those of the smaller picture."""
    wanted = np.arange(int(scale * length))
    return np.minimum(length - 1, np.floor(wanted / scale + 0.5).astype(np.intp))


@functools.lru_cache(maxsize=256)
def _places(header: Header, scale: float) -> npt.NDArray[np.intp]:
    """Return where in a file the bytes of the smaller picture's rows are, padding left out."""
    rows = HEADER_BYTES + _chosen(header.height, scale) * header.row_bytes
    columns = (3 * _chosen(header.width, scale)[:, None] + np.arange(3)).reshape(-1)
    return rows[:, None] + columns


def scale_down(file: Bytes, scale: float = SCALE) -> Bytes:
    """Return a smaller picture: the nearest neighbour of each of its pixels, scale x the width and height, rounded down.

    Of a large picture that reads about scale^2 of the bytes. Headers are made anew.

    Raises:
        NotABitmap: as read_header, or nothing would be left of it.
    """
    header = read_header(file)
    smaller = Header(int(scale * header.width), int(scale * header.height))
    if not smaller.width or not smaller.height:
        raise NotABitmap(f"{header.width} x {header.height} pixels: too small to be scaled down")
    result = _new_file(smaller)
    rows_of(result, smaller)[:, : 3 * smaller.width] = file.take(_places(header, scale))
    return result

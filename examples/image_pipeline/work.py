"""What is computed on a picture: a function for each operation and amount of work. Knows nothing of DM.

==========  ==================================  ==========================================
work        transcode                           compress
==========  ==================================  ==========================================
none        a checksum, no picture              the same
scale       a tenth of width and height, by     the same: so does the program that the
            nearest neighbour, as a bitmap      paper's authors published
light       as scale                            zlib, level 1, over the file
real        half of width and height, bilinear  a JPEG of quality 75
            filter, a JPEG of quality 75
==========  ==================================  ==========================================

A picture is read where it lies. None of these changes it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from . import bmp
from .bmp import Bytes

Work: TypeAlias = Literal["none", "scale", "light", "real"]
WORKS: tuple[Work, ...] = ("none", "scale", "light", "real")
JPEG_QUALITY = 75
EMPTY = np.zeros(0, np.uint8)


class Op(IntEnum):
    """What a client can ask for."""

    TRANSCODE = 1
    COMPRESS = 2


class Outcome(NamedTuple):
    """What came of it."""

    result: Bytes
    checksum: int
    """Of the picture as it came, where nothing else is computed; 0 elsewhere."""


def checksum(file: Bytes) -> int:
    """Add up the bytes as words of 8: a way to read all of them at the speed of memory."""
    whole = file.nbytes // 8 * 8
    words = np.add.reduce(file[:whole].view(np.uint64))
    return (int(words) + int.from_bytes(file[whole:].tobytes(), "little")) % (1 << 64)


def _none(file: Bytes) -> Outcome:
    bmp.read_header(file)
    return Outcome(EMPTY, checksum(file))


def _scaled(file: Bytes) -> Outcome:
    return Outcome(bmp.scale_down(file), 0)


def _deflated(file: Bytes) -> Outcome:
    bmp.read_header(file)
    return Outcome(np.frombuffer(zlib.compress(file.data, 1), np.uint8), 0)


def _jpeg(file: Bytes, divisor: int) -> Outcome:
    from PIL import Image  # not needed by those who do not ask for it

    header = bmp.read_header(file)
    pixels: Any = file[bmp.HEADER_BYTES :].data
    size = (header.width, header.height)
    image = Image.frombuffer("RGB", size, pixels, "raw", "BGR", header.row_bytes, -1)
    if divisor > 1:
        smaller = (max(1, header.width // divisor), max(1, header.height // divisor))
        image = image.resize(smaller, Image.Resampling.BILINEAR)
    with io.BytesIO() as written:
        image.save(written, "JPEG", quality=JPEG_QUALITY)
        return Outcome(np.frombuffer(written.getvalue(), np.uint8), 0)


_FUNCTIONS: dict[tuple[Op, Work], Callable[[Bytes], Outcome]] = {
    (Op.TRANSCODE, "none"): _none,
    (Op.TRANSCODE, "scale"): _scaled,
    (Op.TRANSCODE, "light"): _scaled,
    (Op.TRANSCODE, "real"): lambda file: _jpeg(file, 2),
    (Op.COMPRESS, "none"): _none,
    (Op.COMPRESS, "scale"): _scaled,
    (Op.COMPRESS, "light"): _deflated,
    (Op.COMPRESS, "real"): lambda file: _jpeg(file, 1),
}


def compute(op: Op, work: Work, file: Bytes) -> Outcome:
    """Do it.

    Raises:
        NotABitmap: the file is not a picture that is understood.
    """
    return _FUNCTIONS[op, work](file)

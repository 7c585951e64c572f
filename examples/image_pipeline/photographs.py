"""The photographs, as bitmaps of about the size that is asked for; those of a folder, or those shipped.

The latter come with scikit-image. What its documentation says of their rights is in PHOTOGRAPHS; pictures about whose rights it says
nothing definite are not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import bmp
from .bmp import Bytes

PHOTOGRAPHS = {
    "astronaut": "NASA; no known copyright restrictions, released into the public domain",
    "chelsea": "Stefan van der Walt; CC0",
    "coffee": "Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0",
    "hubble_deep_field": "NASA; may be freely used in the public domain",
    "immunohistochemistry": "Center for Microscopy and Molecular Imaging; no known copyright restrictions",
    "retina": "Mikael Häggström; CC0",
    "rocket": "SpaceX; released in the public domain",
}
# Nominal size in bytes to width and height. Real files are up to 5 % off, and three of them just above the nominal size,
# so that they take a page more.
SIZES = {
    4 << 10: (34, 40),
    8 << 10: (48, 57),
    16 << 10: (68, 80),
    32 << 10: (95, 112),
    64 << 10: (136, 160),
    128 << 10: (192, 227),
    256 << 10: (272, 321),
    512 << 10: (385, 454),
    1 << 20: (544, 642),
    2 << 20: (770, 907),
    4 << 20: (1088, 1284),
}
_MIRRORS: dict[str, tuple[int, int]] = {  # steps through rows and columns
    "": (1, 1),
    "mirrored": (1, -1),
    "upside-down": (-1, 1),
    "turned": (-1, -1),
}
_QUARTERS = ("", "quarter")
_WAYS = len(_MIRRORS) * len(_QUARTERS)
NR_PICTURES = len(PHOTOGRAPHS) * _WAYS
"""Different ones of each size."""
LEAST_PIXELS = 8  # in width and height


class Picture(NamedTuple):
    """A bitmap and where it comes from."""

    name: str
    nominal: int
    file: Bytes


class Album(NamedTuple):
    """Where photographs come from: their names, and what gives the pixels of one."""

    names: tuple[str, ...]
    pixels: Callable[[str], npt.NDArray[np.uint8]]

    @property
    def nr_pictures(self) -> int:
        """Different ones of each size."""
        return len(self.names) * _WAYS


def album_of(folder: Path, warn: Callable[[str], None]) -> Album:
    """Return the photographs in a folder, of all formats that Pillow reads, by file name; what is none is left out.

    Args:
        warn: told of each file that is left out.

    Raises:
        ValueError: no such folder, or no photograph in it.
    """
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            with Image.open(path) as image:
                image.verify()
                if min(image.size) < LEAST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels")
        except Exception as error:  # Pillow raises nearly anything for these
            warn(f"{path.name} is left out: {error}")
        else:
            found[path.name] = path
    if not found:
        raise ValueError(f"{folder} has no photographs in it")

    @cache
    def pixels(name: str) -> npt.NDArray[np.uint8]:
        with Image.open(found[name]) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))

    return Album(tuple(found), pixels)


@cache
def _photograph(name: str) -> npt.NDArray[np.uint8]:
    import skimage.data  # takes half a second, and only clients need it

    pixels: npt.NDArray[np.uint8] = getattr(skimage.data, name)()
    return pixels


SHIPPED = Album(tuple(PHOTOGRAPHS), _photograph)


def _resized(pixels: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the middle of a photograph, cut to those proportions, in that size."""
    from PIL import Image

    scale = min(pixels.shape[1] / width, pixels.shape[0] / height)
    wide, high = int(scale * width), int(scale * height)
    left, top = (pixels.shape[1] - wide) // 2, (pixels.shape[0] - high) // 2
    image = Image.fromarray(pixels[top : top + high, left : left + wide])
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def pictures(nominal: int, number: int | None = None, album: Album = SHIPPED) -> Iterator[Picture]:
    """Yield that many different pictures of one of SIZES, made one by one; None: as many as there are.

    Raises:
        KeyError: not one of SIZES.
        ValueError: there are not so many.
    """
    number = album.nr_pictures if number is None else number
    if not 0 <= number <= album.nr_pictures:
        raise ValueError(f"{number} pictures: there are {album.nr_pictures} of each size")
    width, height = SIZES[nominal]
    resized: dict[tuple[str, str], npt.NDArray[np.uint8]] = {}
    made = itertools.product(_QUARTERS, _MIRRORS.items(), album.names)
    for quarter, (mirror, (down, right)), name in itertools.islice(made, number):
        if (quarter, name) not in resized:
            pixels = album.pixels(name)
            turned = np.ascontiguousarray(np.rot90(pixels)) if quarter else pixels
            resized[quarter, name] = _resized(turned, width, height)
        file = bmp.from_pixels(resized[quarter, name][::down, ::right])
        yield Picture("-".join(filter(None, (name, quarter, mirror))), nominal, file)


def size_named(text: str) -> int:
    """Return the nominal size that a text such as 64K or 4M names.

    Raises:
        ValueError: there is none of that name.
    """
    for nominal in SIZES:
        if text.upper().removesuffix("B") == name_of(nominal):
            return nominal
    raise ValueError(f"size {text!r}: one of {', '.join(names(SIZES))}")


def name_of(nominal: int) -> str:
    """Return a nominal size as 64K or 4M."""
    return f"{nominal >> 20}M" if nominal >= 1 << 20 else f"{nominal >> 10}K"


def names(sizes: Iterable[int]) -> list[str]:
    """Return nominal sizes as texts."""
    return [name_of(nominal) for nominal in sizes]

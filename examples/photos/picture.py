"""The photographs, and what is done to them. Knows nothing of DM: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

COLOUR = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)
GREY = (
    "brick",
    "camera",
    "cell",
    "clock",
    "coins",
    "grass",
    "gravel",
    "microaneurysms",
    "moon",
    "page",
    "text",
)
VARIANTS: dict[str, Callable[[Pixels], Pixels]] = {
    "original": lambda pixels: pixels,
    "mirrored": lambda pixels: pixels[:, ::-1],
    "turned-90": lambda pixels: np.rot90(pixels, 1),
    "turned-180": lambda pixels: np.rot90(pixels, 2),
    "turned-270": lambda pixels: np.rot90(pixels, 3),
    "upside-down": lambda pixels: pixels[::-1],
}


def _load() -> dict[str, Pixels]:
    """Read the photographs that come with scikit-image: height x width for grey, x 3 for colour."""
    import skimage.data  # takes half a second, and only the client needs it

    found = {name: getattr(skimage.data, name)() for name in (*COLOUR, *GREY)}
    found["motorcycle-left"], found["motorcycle-right"], _ = skimage.data.stereo_motorcycle()
    return found


def pictures() -> Iterator[tuple[str, Pixels]]:
    """Return 120 pictures with their names: every photograph in every variant, contiguous in memory.

    The photographs are read now, the variants are made one by one.
    """
    photographs = _load()
    return (
        (f"{name}-{variant}", np.ascontiguousarray(change(pixels)))
        for variant, change in VARIANTS.items()
        for name, pixels in photographs.items()
    )


# ---------------------------------------------------------------- histogram


def histogram(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Count the values of each channel: channels x 256."""
    channels = pixels.reshape(-1, 1 if pixels.ndim == 2 else pixels.shape[2])
    return np.stack([np.bincount(channel, minlength=256) for channel in channels.T])


# ---------------------------------------------------------------- edits

_VALUES = np.arange(256) / 255
TABLES: dict[str, Pixels] = {
    name: np.rint(255 * curve).astype(np.uint8)
    for name, curve in {
        "gamma": _VALUES**0.5,
        "darken": _VALUES * 0.6,
        "negative": 1 - _VALUES,
    }.items()
}


class Edit(msgspec.Struct):
    """A change of the rows from top to bottom: every value is looked up in TABLES[name]."""

    name: str
    top: int
    bottom: int

    @classmethod
    def number(cls, number: int, height: int) -> Edit:
        """Return one of several edits for a picture of that height; it changes a fifth of the rows."""
        band = max(height // 5, 1)
        top = number * 37 % (height - band + 1)
        return cls(list(TABLES)[number % len(TABLES)], top, top + band)

    def apply(self, pixels: Pixels) -> None:
        """Change the pixels in place."""
        rows = pixels[self.top : self.bottom]
        rows[...] = TABLES[self.name][rows]

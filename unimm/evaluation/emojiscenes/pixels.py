"""Pixel rules: which background an image has, where its objects are, how two of them stand.

They know no artwork and no model, so they judge drawings, reconstructions and real renders alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from unimm.data.emojiscenes.scenes import BACKGROUNDS
from unimm.images import Pixels

THRESHOLD = 30  # of 255 in any channel: further from the background colour is object
REACH = 1 / 16  # of the side: parts nearer than this to each other belong to one object
SMALLEST = 1 / 340  # of the image's area: a smaller object is a speck
OBJECT_MARGIN = 1 / 16  # of the side, left around a cut-out object


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom lie just outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def centre(self) -> tuple[float, float]:
        """The middle, x and y."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def border_colour(image: Pixels) -> NDArray[np.float64]:
    """Median colour [3] of the image's border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    colour: NDArray[np.float64] = np.median(border, axis=0)
    return colour


def background_name(image: Pixels) -> str:
    """The background whose colour is nearest to that of the border of an image [H, W, 3]."""
    names, colours = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), float)
    distance = np.linalg.norm(colours - border_colour(image), axis=1)
    return names[int(distance.argmin())]


def find_objects(image: Pixels) -> list[Box]:
    """The objects of an image [H, W, 3], the largest first.

    An object is a connected component of what differs from the background, once parts that nearly touch (a
    balloon and its string) are joined.
    """
    differs = np.abs(image - border_colour(image)).max(axis=-1) > THRESHOLD
    side = min(image.shape[:2])
    radius = max(1, round(side * REACH / 2))
    joined = ndimage.binary_dilation(differs, np.ones((2 * radius + 1, 2 * radius + 1), bool))
    labels, count = ndimage.label(joined, np.ones((3, 3), bool))
    labels = np.where(differs, labels, 0)
    areas = ndimage.sum_labels(differs, labels, np.arange(1, count + 1))
    boxes = ndimage.find_objects(labels, count)
    found = [
        (area, Box(box[1].start, box[0].start, box[1].stop, box[0].stop))
        for area, box in zip(areas, boxes, strict=True)
        if area >= SMALLEST * differs.size
    ]
    return [box for _, box in sorted(found, key=lambda pair: (-pair[0], pair[1]))]


def relation(first: Box, second: Box) -> str:
    """How the first box stands to the second, along the axis on which they are further apart."""
    x, y = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(x) >= abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def enclose(boxes: list[Box]) -> Box:
    """The smallest box around all boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return Box(min(lefts), min(tops), max(rights), max(bottoms))


def cut_out(image: Pixels, box: Box, side: int) -> Pixels:
    """The square around a box with a little margin, in the background colour where it leaves the image.

    Args:
        image: uint8 [H, W, 3].
        box: what to cut out.
        side: pixels a side of the result.

    Returns:
        uint8 [side, side, 3].
    """
    margin = round(min(image.shape[:2]) * OBJECT_MARGIN)
    width = max(box.right - box.left, box.bottom - box.top) + 2 * margin
    left, top = (round(middle - width / 2) for middle in box.centre)
    fill = tuple(int(value) for value in border_colour(image))
    square = Image.new("RGB", (width, width), fill)
    square.paste(Image.fromarray(image), (-left, -top))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))

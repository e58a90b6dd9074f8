"""How an image becomes what a model sees: brought to a size, as pixels, with the rows and columns it has in the stream.

`SquareViews` bring every image to one square (Janus), `AreaViews` keep its ratio within an area (Emu3). Images to
learn drawing from are brought to a `TargetSize`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unimm.errors import UserError
from unimm.images import read_image, to_tensor
from unimm.models.inputs import Images
from unimm.models.parts import AreaViewsConfig, SquareViewsConfig, TimmEncoderConfig
from unimm.processing.sizes import area_size, check_ratio

if TYPE_CHECKING:
    from unimm.images import ImageInput
    from unimm.models.configuration import UniMMConfig

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation that bring [0, 1] to [-1, 1]
MIN_SIDE = 14  # pixels that the short side of a very long image keeps, as Janus has it


@dataclass(frozen=True)
class Views(ABC):
    """What images to understand are brought to.

    Attributes:
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def prepare(self, images: Sequence[ImageInput]) -> Images:
        """Return images as pixels, with their grids.

        Raises:
            UserError: one cannot be read, or has no such form.
        """

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image of which nothing is known."""

    def _normal(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of one size as float [N, 3, H, W] with mean and deviation taken out."""
        pixels = to_tensor(np.stack([np.asarray(image) for image in images]))
        if (self.mean, self.std) == HALVES:
            return pixels
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels + 1) / 2 - mean) / std


@dataclass(frozen=True)
class SquareViews(Views):
    """One square an image: its long side to `side`, filled up.

    Attributes:
        side: pixels.
        pad_colour: RGB 0..255 of the filling.
        cells: rows, and columns, of the features that an image has in the stream.
    """

    side: int
    pad_colour: tuple[int, ...]
    cells: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of every image."""
        return self.cells, self.cells

    def prepare(self, images: Sequence[ImageInput]) -> Images:
        """Return images as pixels [N, 3, side, side]; see `Views.prepare`."""
        squares = [letterbox(read_image(image), self.side, self.pad_colour) for image in images]
        return Images(pixels=self._normal(squares), grids=torch.tensor([self.grid] * len(squares)))


@dataclass(frozen=True)
class AreaViews(Views):
    """An image at its own ratio, its sides multiples of `stride`, its area within limits.

    Attributes:
        least: pixels of the smallest area.
        most: of the largest.
        stride: pixels a side of a code.
    """

    least: int
    most: int
    stride: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the largest square."""
        side = math.isqrt(self.most) // self.stride
        return side, side

    def prepare(self, images: Sequence[ImageInput]) -> Images:
        """Return images as pixels, filled up with 0 to the largest, and their sizes; see `Views.prepare`."""
        resized = []
        for image in images:
            opened = read_image(image)
            height, width = area_size(opened.height, opened.width, self.stride, self.least, self.most)
            resized.append(opened.resize((width, height), Image.Resampling.BICUBIC))
        sizes = torch.tensor([(opened.height, opened.width) for opened in resized])
        pixels = torch.zeros(len(resized), 3, int(sizes[:, 0].max()), int(sizes[:, 1].max()))
        for i, opened in enumerate(resized):
            pixels[i, :, : opened.height, : opened.width] = self._normal([opened])[0]
        return Images(pixels=pixels, sizes=sizes, grids=sizes // self.stride)


def make_views(config: UniMMConfig) -> Views | None:
    """Return what a model of this configuration sees of an image; None where it sees none."""
    views, encoder = config.views_config(), config.encoder_config()
    if isinstance(views, SquareViewsConfig) and isinstance(encoder, TimmEncoderConfig):
        pad = views.pad_value
        colour = (pad,) * 3 if isinstance(pad, int) else tuple(pad)
        cells = encoder.side // config.reducer_config().side
        return SquareViews(views.mean, views.std, views.image_size, colour, cells)
    if isinstance(views, AreaViewsConfig):
        return AreaViews(views.mean, views.std, views.least, views.most, views.stride)
    return None


def letterbox(image: Image.Image, side: int, colour: tuple[int, ...]) -> Image.Image:
    """Return an image brought to `side` pixels by its long side and padded (transformers' `JanusImageProcessor`)."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), MIN_SIDE) for length in image.size)
    square = Image.new("RGB", (max(width, height),) * 2, colour)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((square.width - width) // 2, (square.height - height) // 2))
    return square


def square_pixels(images: Sequence[ImageInput], side: int) -> Tensor:
    """Return images to tokenise, float [M, 3, side, side] in [-1, 1]: short side to `side`, cropped."""
    squares = [ImageOps.fit(read_image(image), (side, side), Image.Resampling.BICUBIC) for image in images]
    return to_tensor(np.stack([np.asarray(square) for square in squares]))


@dataclass(frozen=True)
class TargetSize:
    """What images to learn drawing are brought to.

    Attributes:
        side: pixels.
        stride: pixels a side of a code.
        keep_ratio: images keep their ratio, in an area of `side` squared at most, their sides multiples of
            `stride` (Emu3, `prepare_data.py`: `smart_resize`); else they are squares, cropped from the middle.

    Raises:
        UserError: the side is no multiple of the stride.
    """

    fingerprint_name: ClassVar[str] = "Canvas"  # its name when data that people have was encoded

    side: int
    stride: int
    keep_ratio: bool = False

    def __post_init__(self) -> None:
        if self.side % self.stride:
            near = max(round(self.side / self.stride), 1) * self.stride
            raise UserError(f"size: {self.side}; give a multiple of {self.stride}, such as {near}")

    def pixels(self, image: ImageInput) -> Tensor:
        """Return an image to tokenise, float [3, H, W] in [-1, 1].

        Raises:
            UserError: it cannot be read, or one side is more than 200 times the other.
        """
        if not self.keep_ratio:
            return square_pixels([image], self.side)[0]
        opened = read_image(image)
        check_ratio(opened.height, opened.width)
        scale = self.side / math.sqrt(opened.height * opened.width) / self.stride
        width, height = (max(int(length * scale), 1) * self.stride for length in opened.size)
        return to_tensor(ImageOps.fit(opened, (width, height), Image.Resampling.BICUBIC))

    def __str__(self) -> str:
        """What stored codes are marked by."""
        return f"{self.side} of any ratio" if self.keep_ratio else str(self.side)

"""How an image becomes what a model sees: brought to a size, as pixels, with the rows and columns it has in the stream.

`SquareViews` bring every image to one square (Janus), `AreaViews` keep its ratio within an area (Emu3, Qwen2-VL),
`FitViews` within a rectangle (Pixtral, Fuyu, Aria), and `CanvasViews` cut it into tiles (NVLM, Molmo, Llama 3.2).
Images to learn drawing from are brought to a `TargetSize`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unimm.errors import UserError
from unimm.images import read_image, to_tensor
from unimm.models.inputs import Images
from unimm.models.part_types import PadValue
from unimm.models.parts import (
    AreaViewsConfig,
    CanvasViewsConfig,
    FitViewsConfig,
    NaflexEncoderConfig,
    SquareViewsConfig,
    TiledEncoderConfig,
)
from unimm.models.seeing import Seeing
from unimm.processing.canvas import filled, float_canvas, padding_of_views
from unimm.processing.clips import video_views
from unimm.processing.sizes import (
    GridOrder,
    area_size,
    check_ratio,
    choose_ratio,
    choose_scale,
    choose_shrink,
    fit_size,
    letterbox_size,
    size_in_canvas,
    tile_grids,
)
from unimm.videos import Video

if TYPE_CHECKING:
    from unimm.images import ImageInput
    from unimm.models.configuration import UniMMConfig

HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation that bring [0, 1] to [-1, 1]
RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
LIMITS = ("min_pixels", "max_pixels", "max_tiles")
"""Of images to understand, where a model lets them be chosen."""
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

    @abstractmethod
    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of an image of so many pixels: of its tokens, or of its tiles on a canvas.

        Raises:
            UserError: such an image has no such form.
        """

    def limited(self, limits: Mapping[str, int]) -> Views:
        """Return these views with other limits.

        Args:
            limits: some of `LIMITS`.

        Raises:
            UserError: there is no such limit here, or it makes no sense.
        """
        for name, value in limits.items():
            if name not in LIMITS:
                raise UserError(f"views: no limit is called {name!r}; use {', '.join(LIMITS)}")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {value!r}; give a whole number of 1 or more")
        return self._limited(limits)

    def _limited(self, limits: Mapping[str, int]) -> Views:
        for name in limits:
            raise UserError(f"{name}: the images that this model sees have no such limit; leave it out")
        return self

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

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """See `Views.grid_of`."""
        return self.grid

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
        frames: of a time of a video; 0: no videos are seen.
        frame_least: pixels of the smallest area of a frame.
        frame_most: of the largest.
    """

    least: int
    most: int
    stride: int
    frames: int = 0
    frame_least: int = 0
    frame_most: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the largest square."""
        side = math.isqrt(self.most) // self.stride
        return side, side

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """See `Views.grid_of`."""
        rows, columns = area_size(height, width, self.stride, self.least, self.most)
        return rows // self.stride, columns // self.stride

    def _limited(self, limits: Mapping[str, int]) -> Views:
        if "max_tiles" in limits:
            raise UserError("max_tiles: this model sees no tiles; use min_pixels and max_pixels")
        least, most = limits.get("min_pixels", self.least), limits.get("max_pixels", self.most)
        if least > most or most < self.stride**2:
            raise UserError(
                f"max_pixels: {most}; give at least {self.stride**2} (one token), and min_pixels ({least})"
            )
        return replace(self, least=least, most=most, frame_least=least, frame_most=most)

    def prepare(self, images: Sequence[ImageInput | Video]) -> Images:
        """Return images as pixels, filled up with 0 to the largest, and their sizes; see `Views.prepare`.

        Videos among them are pixels [times, 3 frames, H, W] each.
        """
        still = [image for image in images if not isinstance(image, Video)]
        if len(still) < len(images):
            return self._with_videos(images)
        resized = []
        for image in still:
            opened = read_image(image)
            height, width = area_size(opened.height, opened.width, self.stride, self.least, self.most)
            resized.append(opened.resize((width, height), Image.Resampling.BICUBIC))
        sizes = torch.tensor([(opened.height, opened.width) for opened in resized])
        pixels = filled([self._normal([opened])[0] for opened in resized])
        return Images(pixels=pixels, sizes=sizes, grids=sizes // self.stride)

    def _with_videos(self, images: Sequence[ImageInput | Video]) -> Images:
        """Images and videos in their order."""
        bundles = [
            self._video(image) if isinstance(image, Video) else self.prepare([image]) for image in images
        ]
        together = Images.cat(bundles)
        assert together is not None
        return together

    def _video(self, video: Video) -> Images:
        """A video, its frames brought to limits of their own."""
        least = video.min_pixels or min(self.frame_least, video.max_pixels or self.frame_least)
        most = video.max_pixels or max(self.frame_most, least)
        if least > most or most < self.stride**2:
            raise UserError(
                f"video: max_pixels: {most}; give at least {self.stride**2} (one token), and min_pixels ({least})"
            )
        return video_views(
            video.read(),
            lambda height, width: area_size(height, width, self.stride, least, most),
            self._normal,
            self.frames,
            self.stride,
        )


@dataclass(frozen=True)
class FitViews(Views):
    """An image at its own ratio within a rectangle, its sides multiples of a unit; see `FitViewsConfig`.

    Attributes:
        rule: how it is brought to its size.
        seeing: how many tokens that gives.
    """

    rule: FitViewsConfig
    seeing: Seeing

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the largest."""
        return self.seeing.tokens(*self.rule.bounds)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """See `Views.grid_of`."""
        return self.seeing.tokens(*self._sizes(height, width)[1])

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) that an image is resized to, before anything is put around it."""
        return self._sizes(height, width)[0]

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What an image is resized to, and padded to."""
        rule, whole = self.rule, self.rule.fill == "whole"
        return fit_size(
            height,
            width,
            rule.bounds,
            max(rule.bounds) if whole else rule.unit,
            stretch=rule.fill == "stretch",
            exact=whole,
            min_side=rule.least,
        )

    def _limited(self, limits: Mapping[str, int]) -> Views:
        unknown = limits.keys() - {"max_pixels"}
        if unknown or self.rule.fill == "whole":
            return super()._limited(limits if not unknown else dict.fromkeys(unknown, 1))
        scale = math.sqrt(min(1.0, limits["max_pixels"] / math.prod(self.rule.bounds)))
        height, width = (max(int(side * scale), self.rule.unit) for side in self.rule.bounds)
        return replace(self, rule=replace(self.rule, bounds=(height, width)))

    def prepare(self, images: Sequence[ImageInput]) -> Images:
        """Return images as pixels, filled up with 0 to the largest, and their sizes; see `Views.prepare`."""
        rule = self.rule
        padded, sizes = [], []
        for image in images:
            opened = read_image(image)
            size, canvas = self._sizes(opened.height, opened.width)
            resized = opened.resize(size[::-1], RESAMPLES[rule.resample])
            padded.append(_on_canvas(resized, canvas, rule.pad_value, centred=False))
            sizes.append(
                size if rule.fill == "whole" else canvas
            )  # of a padded view, what is real is looked at
        grids = torch.tensor([self.seeing.tokens(*size) for size in sizes])
        return Images(
            pixels=filled([self._normal([one])[0] for one in padded]), sizes=torch.tensor(sizes), grids=grids
        )


@dataclass(frozen=True)
class CanvasViews(Views):
    """An image as tiles, and the whole of it beside them; see `CanvasViewsConfig`.

    Attributes:
        rule: how it is cut.
        patch: pixels a side of a feature, where the model asks which are of padding.
        tiles: most tiles that the model's encoder takes; None: any number.
    """

    rule: CanvasViewsConfig
    patch: int | None = None
    tiles: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles of a square image that takes many of them."""
        side = math.isqrt(self.rule.most)
        return side, side

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """See `Views.grid_of`."""
        rule, inner = self.rule, 2 * self.rule.overlap
        order: GridOrder = "area_columns" if rule.choose == "ratio" else "area_rows"
        choose = {"ratio": choose_ratio, "scale": choose_scale, "pad": choose_shrink}[rule.choose]
        grids = tile_grids(rule.most, rule.least, order)
        return choose(height - inner, width - inner, rule.tile - inner, grids)

    def prepare(self, images: Sequence[ImageInput]) -> Images:
        """Return images as pixels [V, 3, tile, tile], with the views and tiles of each; see `Views.prepare`."""
        rule = self.rule
        views: list[Tensor] = []
        counts, grids, padding = [], [], []
        for image in images:
            opened = read_image(image)
            grid = self.grid_of(opened.height, opened.width)
            own = self._views(opened, grid)
            views += own
            if self.patch is not None:
                canvas = self._canvas(grid)
                inner = self._inner(opened, canvas, rule.place)
                padding.append(padding_of_views(inner, canvas, grid, rule.tile, self.patch))
            counts.append(len(own))
            grids.append(grid)
        assert counts == [rule.views(*grid) for grid in grids]
        return Images(
            pixels=torch.stack(views),
            views=torch.tensor(counts),
            grids=torch.tensor(grids),
            padding=torch.cat(padding) if padding else None,
        )

    def _limited(self, limits: Mapping[str, int]) -> Views:
        most = limits.get("max_tiles", self.rule.most)
        if unknown := limits.keys() - {"max_tiles"}:
            raise UserError(f"{min(unknown)}: this model sees tiles of one size; use max_tiles")
        if self.tiles is not None and most > self.tiles:
            raise UserError(f"max_tiles: {most}; this model's encoder takes {self.tiles} at most")
        return replace(self, rule=replace(self.rule, most=most, least=min(self.rule.least, most)))

    def _canvas(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of all tiles together."""
        inner = 2 * self.rule.overlap
        rows, columns = (count * (self.rule.tile - inner) + inner for count in grid)
        return rows, columns

    def _views(self, image: Image.Image, grid: tuple[int, int]) -> list[Tensor]:
        """The views [3, tile, tile] of an image, in the order of the stream."""
        rule = self.rule
        whole = (
            [] if rule.whole == "none" else [self._placed(image, (rule.tile, rule.tile), rule.whole_place)]
        )
        if rule.alone and grid == (1, 1):
            return whole
        step = rule.tile - 2 * rule.overlap
        canvas = self._placed(image, self._canvas(grid), rule.place)
        tiles = [
            canvas[:, row * step : row * step + rule.tile, column * step : column * step + rule.tile]
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        return whole + tiles if rule.whole == "first" else tiles + whole

    def _inner(self, image: Image.Image, size: tuple[int, int], place: str) -> tuple[int, int]:
        """Height and width of an image on a canvas."""
        if place == "stretch":
            return size
        if place == "corner":
            return size_in_canvas(image.height, image.width, size, self.rule.tile)
        return letterbox_size(image.height, image.width, size, self.rule.precise)

    def _placed(self, image: Image.Image, size: tuple[int, int], place: str) -> Tensor:
        """An image on a canvas, normalised: [3, height, width]."""
        rule, inner = self.rule, self._inner(image, size, place)
        if rule.precise:
            pixels = float_canvas(image, inner, size, pad_colour(rule.pad_value), rule.resample)
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
            return (pixels - mean) / std
        resized = image.resize(inner[::-1], RESAMPLES[rule.resample])
        return self._normal([_on_canvas(resized, size, rule.pad_value, centred=place == "centre")])[0]


def _on_canvas(image: Image.Image, size: tuple[int, int], pad: PadValue, centred: bool) -> Image.Image:
    """An image with padding around, or on the right and below."""
    if (image.height, image.width) == size:
        return image
    canvas = Image.new("RGB", size[::-1], pad_colour(pad))
    left, top = ((size[1] - image.width) // 2, (size[0] - image.height) // 2) if centred else (0, 0)
    canvas.paste(image, (left, top))
    return canvas


def pad_colour(pad: PadValue) -> tuple[int, ...]:
    """Return the RGB of a padding, given as a grey level or as one for each channel."""
    return (pad,) * 3 if isinstance(pad, int) else tuple(pad)


def make_views(config: UniMMConfig) -> Views | None:
    """Return what a model of this configuration sees of an image; None where it sees none."""
    views, seeing = config.views_config(), config.seeing()
    if isinstance(views, SquareViewsConfig):
        assert seeing.tile is not None
        colour = pad_colour(views.pad_value)
        return SquareViews(views.mean, views.std, views.image_size, colour, seeing.tile[0])
    if isinstance(views, AreaViewsConfig):
        frames = seeing.encoder.frames if isinstance(seeing.encoder, NaflexEncoderConfig) else 0
        return AreaViews(
            views.mean, views.std, views.least, views.most, views.stride,
            frames if config.image_layout().video is not None else 0,
            views.frame_least or views.least, views.frame_most or views.most,
        )  # fmt: skip
    if isinstance(views, FitViewsConfig):
        return FitViews(views.mean, views.std, views, seeing)
    if views is None:
        return None
    patch = views.tile // (seeing.side or 1) if seeing.marks_padding else None
    tiles = seeing.encoder.tiles if isinstance(seeing.encoder, TiledEncoderConfig) else None
    return CanvasViews(views.mean, views.std, views, patch, tiles)


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

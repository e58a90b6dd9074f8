"""The way of an image to understand in numbers: from pixels to features to tokens, without building any part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.models.inputs import Images
from unimm.models.layout import Grid, ImageLayout
from unimm.models.parts import (
    AbstractReducerConfig,
    AreaViewsConfig,
    AttendReducerConfig,
    CanvasViewsConfig,
    CodesEncoderConfig,
    EncoderConfig,
    FitViewsConfig,
    LinearEncoderConfig,
    MeanReducerConfig,
    NaflexEncoderConfig,
    ReducerConfig,
    ResampleReducerConfig,
    SquareViewsConfig,
    TiledEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
    ViewsConfig,
)
from unimm.models.tiled import tile_ratios


class Seen(NamedTuple):
    """How the features of a batch of images lie.

    Attributes:
        shapes: rows and columns of features of each view.
        grids: of each image, rows and columns as the grammar has them: of tokens, or of tiles on a canvas.
        padding: which features are of padding, as `Images` has it; None: that is not asked.
    """

    shapes: Sequence[Grid]
    grids: Sequence[Grid]
    padding: Tensor | None = None


class Seeing(NamedTuple):
    """The parts that an image to understand goes through; None where a model looks at none.

    Attributes:
        views: what it is brought to.
        encoder: what makes features of them.
        reducer: what makes tokens of these.
    """

    views: ViewsConfig | None
    encoder: EncoderConfig | None
    reducer: ReducerConfig

    @property
    def patch(self) -> int | None:
        """Pixels a side of a feature, or of a code that an image is seen by; None where that is not said."""
        encoder = self.encoder
        if isinstance(encoder, CodesEncoderConfig) and isinstance(self.views, AreaViewsConfig):
            return self.views.stride
        if isinstance(
            encoder,
            NaflexEncoderConfig | TransformersEncoderConfig | LinearEncoderConfig | TiledEncoderConfig,
        ):
            return encoder.patch
        return encoder.kwargs.get("patch_size") if isinstance(encoder, TimmEncoderConfig) else None

    @property
    def side(self) -> int | None:
        """Features a side of every view; None where views differ, or their features are no square."""
        encoder = self.encoder
        if isinstance(encoder, TimmEncoderConfig):
            return encoder.side
        if isinstance(encoder, TransformersEncoderConfig | NaflexEncoderConfig):
            return encoder.side or None
        return None

    @property
    def alike(self) -> Grid | None:
        """Rows and columns of features of every view; None where views differ."""
        if isinstance(self.encoder, TiledEncoderConfig):
            return 1, self.encoder.tokens
        return None if self.side is None else (self.side, self.side)

    @property
    def unit(self) -> int:
        """Pixels a side of a token, where views keep their own sizes."""
        return (self.patch or 1) * getattr(self.reducer, "side", 1)

    def features(self, height: int, width: int) -> Grid:
        """Return rows and columns of features of a view."""
        if self.alike is not None:
            return self.alike
        assert self.patch is not None
        return -(-height // self.patch), -(-width // self.patch)

    def tokens(self, height: int, width: int) -> Grid:
        """Return rows and columns of tokens of a view of so many pixels."""
        rows, columns = self.features(height, width)
        reducer = self.reducer
        if isinstance(reducer, AbstractReducerConfig):
            return reducer.side, reducer.side
        if isinstance(reducer, ResampleReducerConfig):
            padded = (
                self.features(*self.views.bounds)
                if isinstance(self.views, FitViewsConfig)
                else (rows, columns)
            )
            return 1, dict(reducer.queries).get(padded[0] * padded[1], 0)
        columns += reducer.side - 1 if isinstance(reducer, MeanReducerConfig) else 0
        return rows // reducer.side, columns // reducer.side

    def counted(self, grid: Grid) -> int | None:
        """Return the features of an image of a grid; None where several numbers of them have the same."""
        if self.alike is None and isinstance(self.reducer, ResampleReducerConfig):
            return None
        return sum(self.each(grid))

    def view_count(self, grid: Grid) -> int:
        """Return the views of an image of a grid."""
        return self.views.views(*grid) if isinstance(self.views, CanvasViewsConfig) else 1

    def each(self, grid: Grid) -> list[int]:
        """Return the features of each view of an image of a grid, at most."""
        rows, columns = grid
        if self.alike is not None:
            return [math.prod(self.alike)] * self.view_count(grid)
        if isinstance(self.reducer, ResampleReducerConfig):
            most = {count: features for features, count in self.reducer.queries}
            return [most[rows * columns]]
        return [rows * columns * getattr(self.reducer, "side", 1) ** 2]

    def passes(self, grid: Grid) -> list[int]:
        """Return the features that look at each other in the encoder, those of padding too, for an image of a grid."""
        return self._together(1) or self.each(grid)

    def passes_of(self, seen: Seen) -> list[int]:
        """Return the same for the images of a batch."""
        return self._together(len(seen.grids)) or [rows * columns for rows, columns in seen.shapes]

    def _together(self, images: int) -> list[int]:
        """The features of all tiles of so many images, where all are looked at together."""
        encoder = self.encoder
        return [encoder.tiles * encoder.tokens] * images if isinstance(encoder, TiledEncoderConfig) else []

    def tokens_of(self, grid: Grid) -> list[int]:
        """Return the tokens of each view of an image of a grid."""
        return [math.prod(self.tile or grid)] * self.view_count(grid)

    @property
    def tile(self) -> Grid | None:
        """Rows and columns of tokens of every view; None where views differ."""
        if isinstance(self.views, CanvasViewsConfig):
            return self.tokens(self.views.tile, self.views.tile)
        if isinstance(self.views, SquareViewsConfig):
            return self.tokens(self.views.image_size, self.views.image_size)
        return None

    @property
    def blank(self) -> tuple[int, int, int, int]:
        """Shape of the smallest views, those of an image that stands for none."""
        views = self.views
        if isinstance(views, SquareViewsConfig):
            return 1, 3, views.image_size, views.image_size
        if isinstance(views, CanvasViewsConfig):
            return views.views(1, 1), 3, views.tile, views.tile
        return 1, 3, self.unit, self.unit

    @property
    def blank_seen(self) -> Seen:
        """How the features of these views lie."""
        count, _, height, width = self.blank
        grid = (1, 1) if isinstance(self.views, CanvasViewsConfig) else self.tokens(height, width)
        return Seen([self.features(height, width)] * count, [grid])

    @property
    def marks_padding(self) -> bool:
        """Whether the reducer asks which features are of padding."""
        return isinstance(self.reducer, AttendReducerConfig) and self.reducer.padding

    @property
    def overlap(self) -> int:
        """Features at each side of a tile that its neighbours show too."""
        views = self.views
        return (
            views.overlap // (views.tile // (self.side or 1)) if isinstance(views, CanvasViewsConfig) else 0
        )


def seen_of(seeing: Seeing, images: Images, layout: ImageLayout) -> Seen:
    """Return how the features of images lie; where grids are not given, views are of one size or say theirs.

    Raises:
        ValueError: the reducer asks which features are of padding, and the images do not say.
    """
    if images.grids is not None:
        grids = [(rows, columns) for rows, columns in images.grids.tolist()]
    elif images.pixels is not None and seeing.alike is None and seeing.patch is not None:
        grids = [seeing.tokens(*size) for size in images.view_sizes()]
    else:
        grids = [seeing.tile or layout.grid] * len(images)
    shapes = _shapes(seeing, images, grids)
    if not seeing.marks_padding or not len(images):
        return Seen(shapes, grids)
    if images.padding is None or len(images.padding) != len(shapes):
        found = "none" if images.padding is None else f"that of {len(images.padding)}"
        raise ValueError(
            f"images: padding: {found}, but there are {len(shapes)} views; prepare images as `views` does"
        )
    return Seen(shapes, grids, images.padding)


def _shapes(seeing: Seeing, images: Images, grids: Sequence[Grid]) -> list[Grid]:
    """Return rows and columns of the features of each view."""
    if seeing.alike is not None:
        return [seeing.alike] * sum(map(seeing.view_count, grids))
    if isinstance(seeing.reducer, ResampleReducerConfig):  # which does not ask how they lie, only how many
        return [(1, count) for count in _counts(seeing, images)]
    side = getattr(seeing.reducer, "side", 1)
    return [(rows * side, columns * side) for rows, columns in grids]


def _counts(seeing: Seeing, images: Images) -> list[int]:
    """Return the features of each image of one view."""
    computed = iter([] if images.pixels is None else images.view_sizes())
    given = iter([] if images.features is None else images.each_length())
    return [
        next(given) if featured else math.prod(seeing.features(*next(computed)))
        for featured in images.which().tolist()
    ]


def feature_counts(seeing: Seeing, images: Images, layout: ImageLayout) -> list[int]:
    """Return how many features each image has."""
    seen = seen_of(seeing, images, layout)
    counts = iter([rows * columns for rows, columns in seen.shapes])
    return [sum(next(counts) for _ in range(seeing.view_count(grid))) for grid in seen.grids]


def check_room(layout: ImageLayout, seen: Seen, room: int) -> None:
    """Refuse images that do not fit their placeholders, before anything is computed.

    Raises:
        ValueError: they do not.
    """
    wanted = sum(layout.features(rows, columns) for rows, columns in seen.grids)
    if wanted != room:
        raise ValueError(
            f"images: features: {wanted} given, but the tokens have room for {room}; a prompt may have been cut inside "
            "an image"
        )


def in_order(seeing: Seeing, images: Images, computed: Tensor, given: Tensor) -> Tensor:
    """Return features of images of which some are given, in the order of the stream.

    Args:
        seeing: the parts that they come from.
        images: the images.
        computed: [V, tokens, width] or [P, width], of those that come as pixels.
        given: of the others.

    Returns:
        [N, tokens, width], or [P, width] where images have unlike many.

    Raises:
        ValueError: the images do not say which are which.
    """
    if images.featured is None:
        raise ValueError("featured: missing; it says which images are features where others are pixels")
    if computed.ndim == 3 and given.ndim == 3 and images.views is None:
        together = computed.new_empty(len(images.featured), *computed.shape[1:])
        together[images.featured], together[~images.featured] = given, computed
        return together
    if computed.ndim == 3:
        views = [1] * len(computed) if images.views is None else images.views.tolist()
        own = [part.flatten(0, 1) for part in computed.split(views)]
    else:
        each = [math.prod(seeing.features(*size)) for size in images.view_sizes()]
        if images.views is not None:  # the times of a video
            left = iter(each)
            each = [sum(next(left) for _ in range(views)) for views in images.views.tolist()]
        own = list(computed.split(each))
    parts = {True: iter(images.each_feature()), False: iter(own)}
    return torch.cat([next(parts[featured]) for featured in images.featured.tolist()])


def read_inputs(inputs: dict[str, Any], seeing: Seeing) -> Images | None:
    """Take the images out of keyword inputs as transformers' processors give them; None where there are none."""
    if (ratios := inputs.pop("aspect_ratio_ids", None)) is not None:
        for name in (
            "aspect_ratio_mask",
            "cross_attention_mask",
        ):  # which follow from those and from the tokens
            inputs.pop(name, None)
        return from_tiles(inputs.pop("pixel_values"), ratios, seeing)
    kinds = inputs.pop("mm_token_type_ids", None)
    bundles = [
        from_patches(inputs.pop(pixels), grids, seeing, moving)
        for pixels, name, moving in PATCHES
        if (grids := inputs.pop(name, None)) is not None
    ]
    if len(bundles) < 2:
        return bundles[0] if bundles else Images.from_inputs(inputs)
    if kinds is None:
        raise ValueError("mm_token_type_ids: missing; it says in which order images and videos stand")
    left, parts = [0, 0], []
    for kind in _runs(kinds):
        parts.append(bundles[kind - 1].part(left[kind - 1], left[kind - 1] + 1))
        left[kind - 1] += 1
    return Images.cat(parts)


PATCHES = (("pixel_values", "image_grid_thw", False), ("pixel_values_videos", "video_grid_thw", True))
"""Keyword inputs of images and of videos as transformers' Qwen2-VL processor names them: patches and grids."""


def _runs(kinds: Tensor) -> list[int]:
    """Whether an image (1) or a video (2) stands there, of each in the order of the stream, by kinds of tokens."""
    before = torch.cat([torch.zeros_like(kinds[:, :1]), kinds[:, :-1]], dim=1)
    found: list[int] = kinds[(kinds != 0) & (kinds != before)].tolist()
    return found


def from_tiles(pixels: Tensor, ratios: Tensor, seeing: Seeing) -> Images:
    """Return images that transformers' Llama 3.2 processor has cut into tiles, without those that are none.

    Args:
        pixels: `pixel_values` [B, N, T, 3, S, S], filled up with zeros to the most images and tiles.
        ratios: `aspect_ratio_ids` int64 [B, N], arrangements of tiles from 1; 0: no image.
        seeing: the parts that they go through.

    Raises:
        ValueError: they are of other parts.
    """
    encoder = seeing.encoder
    if not isinstance(encoder, TiledEncoderConfig) or int(ratios.max()) > len(tile_ratios(encoder.tiles)):
        raise ValueError("aspect_ratio_ids: only of this model's own tiles")
    known = tile_ratios(encoder.tiles)
    grids = [known[number - 1] for number in ratios.flatten().tolist() if number]
    shown = pixels.flatten(0, 1)[ratios.flatten() > 0]
    tiles = [own[: rows * columns] for own, (rows, columns) in zip(shown, grids, strict=True)]
    return Images(
        pixels=torch.cat(tiles), views=torch.tensor([len(own) for own in tiles]), grids=torch.tensor(grids)
    )


def from_patches(patches: Tensor, grids: Tensor, seeing: Seeing, moving: bool = False) -> Images:
    """Return images, or videos, that transformers' Qwen2-VL processor has cut into patches, put together again.

    Args:
        patches: `pixel_values` [P, 3 · frames · patch²], in squares of `reducer.side` patches a side, of all images.
        grids: `image_grid_thw` int64 [N, 3], times, rows and columns of patches of each image.
        seeing: the parts that they go through.
        moving: whether they are videos, each time of which is several frames.

    Raises:
        ValueError: they are images of several times, or of other parts.
    """
    encoder, side = seeing.encoder, getattr(seeing.reducer, "side", 1)
    if not isinstance(encoder, NaflexEncoderConfig) or not (moving or bool((grids[:, 0] == 1).all())):
        raise ValueError("image_grid_thw: only images of this model's own patches, one time each")
    patch, views = encoder.patch, []
    for part, (times, rows, columns) in zip(
        patches.split(grids.prod(1).tolist()), grids.tolist(), strict=True
    ):
        cells = part.view(times, rows // side, columns // side, side, side, 3 * encoder.frames, patch, patch)
        cells = cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(times, -1, rows * patch, columns * patch)
        views.append(cells if moving else cells[:, :: encoder.frames])
    times = grids[:, 0]
    sizes = (grids[:, 1:] * patch).repeat_interleave(times, dim=0)
    height, width = (int(most) for most in sizes.amax(0))
    pixels = torch.cat([F.pad(view, (0, width - view.shape[3], 0, height - view.shape[2])) for view in views])
    cells = grids[:, 1:] // side
    if not moving:
        return Images(pixels=pixels, sizes=sizes, grids=cells)
    cells = torch.stack([times * cells[:, 0], cells[:, 1]], dim=1)
    return Images(pixels=pixels, sizes=sizes, grids=cells, views=times, times=times)

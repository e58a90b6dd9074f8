"""The rules by which an image gets its size, or the grid of tiles it is cut into: whole numbers in and out.

Sizes are (height, width) in pixels and grids (rows, columns) of tiles, as arrays have them. `area_size`, `fit_size`,
`letterbox_size` and `size_in_canvas` give sizes; `tile_grids` lists grids, of which `choose_scale`, `choose_ratio` or
`choose_shrink` takes one. Each rule rounds where its source does, since a pixel more or less is another model input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from unimm.errors import UserError

Size = tuple[int, int]
Tiling = tuple[int, int]
GridOrder = Literal["rows", "area_rows", "area_columns"]

MAX_RATIO = 200  # of an image's long side to its short one, as Emu3 has it
_KEYS: dict[str, Callable[[Tiling], Tiling]] = {
    "rows": lambda grid: grid,
    "area_rows": lambda grid: (grid[0] * grid[1], grid[0]),
    "area_columns": lambda grid: (grid[0] * grid[1], grid[1]),
}


# --- sizes --------------------------------------------------------------------------------------------------


def check_ratio(height: int, width: int) -> None:
    """Refuse an image that is all but a line.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(
            f"image: {width} x {height} pixels, more than {MAX_RATIO} times longer than wide; crop it first"
        )


def area_size(height: int, width: int, factor: int, min_area: int, max_area: int) -> Size:
    """Return the height and width, multiples of `factor`, that keep an image's ratio within an area.

    Source: Emu3 `image_processing_emu3visionvq.py` (`smart_resize`, from Qwen2-VL).

    Raises:
        UserError: one side is more than 200 times the other.
    """
    check_ratio(height, width)
    rounded = [round(side / factor) * factor for side in (height, width)]
    scale = 1.0
    if rounded[0] * rounded[1] > max_area:
        scale = math.sqrt(height * width / max_area)
        rounded = [max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)]
    elif rounded[0] * rounded[1] < min_area:
        scale = math.sqrt(min_area / (height * width))
        rounded = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def fit_size(
    height: int,
    width: int,
    bounds: Size,
    multiple: int,
    *,
    stretch: bool = False,
    exact: bool = False,
    min_side: int = 0,
) -> tuple[Size, Size]:
    """Return the size of an image within bounds, and that of the canvas whose sides are multiples.

    Fuyu: bounds (1080, 1920), multiple 30. Pixtral: (1024, 1024), 16, `stretch`. Aria: (490, 490) or (980, 980), the
    same side as the multiple, `exact`, `min_side` 336.

    Args:
        height: the image's, in pixels.
        width: the image's.
        bounds: the largest height and width.
        multiple: pixels that both sides of the canvas are multiples of.
        stretch: the image is resized to the canvas itself; else it is padded to it.
        exact: every image is brought to the bounds, a small one enlarged; else a larger one is shrunk to them.
        min_side: pixels that a side of a resized image has at least, whatever becomes of its ratio.

    Raises:
        UserError: an image is so long that its short side would have no pixel.

    Source: transformers `image_processing_fuyu.py` (`resize`), `image_processing_pixtral.py`
    (`get_resize_output_image_size`) and `image_processing_aria.py` (`_preprocess`).
    """
    size = height, width
    if stretch and (height > bounds[0] or width > bounds[1]):
        ratio = max(height / bounds[0], width / bounds[1])  # dividing by it rounds otherwise than multiplying
        size = math.floor(height / ratio), math.floor(width / ratio)
    elif exact or height > bounds[0] or width > bounds[1]:
        factor = min(bounds[0] / height, bounds[1] / width)
        size = max(int(height * factor), min_side), max(int(width * factor), min_side)
        if exact:  # the side that reaches its bound first; of a square the width alone, so the height may lack a pixel
            wide = bounds[1] / width <= bounds[0] / height
            size = (size[0], bounds[1]) if wide else (bounds[0], size[1])
    _check_visible(height, width, size, bounds)
    canvas = -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple
    return (canvas if stretch else size), canvas


def letterbox_size(height: int, width: int, canvas: Size, single_precision: bool = False) -> Size:
    """Return the size of an image that fills a canvas in one direction, and is padded to it in the other.

    Args:
        height: the image's, in pixels.
        width: the image's.
        canvas: height and width to fill.
        single_precision: computed in float32, by which one image in twenty gets a pixel more or less (Molmo).

    Raises:
        UserError: an image is so long that its short side would have no pixel.

    Source: allenai/molmo `olmo/data/model_preprocessor.py` (`resize_and_pad`).
    """
    number: type[float | np.float32] = np.float32 if single_precision else float
    factor = min(number(canvas[0]) / number(height), number(canvas[1]) / number(width))
    size = int(number(height) * factor), int(number(width) * factor)
    _check_visible(height, width, size, canvas)
    return size


def _check_visible(height: int, width: int, size: Size, bounds: Size) -> None:
    """Refuse an image of which nothing would be left."""
    if min(size) < 1:
        raise UserError(
            f"image: {width} x {height} pixels, brought to {bounds[1]} x {bounds[0]} it has no pixel across; "
            "crop it first"
        )


def size_in_canvas(height: int, width: int, canvas: Size, tile: int) -> Size:
    """Return the size of an image in the canvas of its tiles: no side below a tile's, where the ratio lets it.

    Args:
        height: the image's, in pixels.
        width: the image's.
        canvas: height and width of the tiles together.
        tile: pixels a side of a tile.

    Source: transformers `image_processing_mllama.py` (`get_image_size_fit_to_canvas`), Llama 3.2.
    """
    target = min(max(height, tile), canvas[0]), min(max(width, tile), canvas[1])
    tall, wide = target[0] / height, target[1] / width
    if wide < tall:
        return min(math.floor(height * wide) or 1, target[0]), target[1]
    return target[0], min(math.floor(width * tall) or 1, target[1])


# --- grids of tiles -----------------------------------------------------------------------------------------


def tile_grids(max_tiles: int, min_tiles: int = 1, order: GridOrder = "area_rows") -> tuple[Tiling, ...]:
    """Return every grid of `min_tiles` to `max_tiles` tiles.

    Args:
        max_tiles: tiles of the largest.
        min_tiles: of the smallest.
        order: `rows`: by rows, then columns (Llama 3.2, which numbers them so); `area_rows`: by tiles, then rows
            (Molmo); `area_columns`: by tiles, then columns (NVLM, InternVL). Of equally good grids the rules take one
            by this order.
    """
    lines = range(1, max_tiles + 1)
    grids = (
        (rows, columns) for rows in lines for columns in lines if min_tiles <= rows * columns <= max_tiles
    )
    return tuple(sorted(grids, key=_KEYS[order]))


def choose_scale(height: int, width: int, tile: int, grids: Sequence[Tiling]) -> Tiling:
    """Return the grid into which an image fits with the least enlargement, else with the least shrinking.

    Of equally good ones it is the one of fewest tiles, and of those the first. Molmo asks for the image without the
    margins of its overlapping crops, so a side may be 0 or negative: one of 0 is left out of account, and a negative
    one leads to the smallest grid, as in its code. That computes in float32, which below 2^19 pixels a side
    never changes the choice: distinct scales differ by more than float32 rounds off.

    Args:
        height: the image's, in pixels.
        width: the image's.
        tile: pixels a side of a tile.
        grids: to choose from.

    Source: transformers `image_processing_mllama.py` (`get_optimal_tiled_canvas`), allenai/molmo
    `olmo/data/model_preprocessor.py` (`select_tiling`).
    """
    with np.errstate(divide="ignore"):
        scales = (np.array(grids) * tile / np.array((height, width))).min(axis=1)
    enlarging = scales[scales >= 1]
    best = enlarging.min() if enlarging.size else scales.max()
    tied = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    return min(tied, key=_tiles)


def choose_ratio(height: int, width: int, tile: int, grids: Sequence[Tiling]) -> Tiling:
    """Return the grid whose ratio of width to height is nearest to an image's, which is then stretched to it.

    Of equally near ones it is the last whose tiles have less than twice the image's area, else the first.

    Args:
        height: the image's, in pixels.
        width: the image's.
        tile: pixels a side of a tile.
        grids: to choose from, in the source's order: `area_columns`, or Aria's own list.

    Source: transformers `image_processing_got_ocr2.py` (`get_optimal_tiled_canvas`), the same as InternVL's and
    NVLM's `dynamic_preprocess` and rhymes-ai/Aria `vision_processor.py` (`_select_best_resolution`).
    """
    best, least = grids[0], math.inf
    for rows, columns in grids:
        distance = abs(width / height - columns / rows)
        if distance < least or (distance == least and height * width > 0.5 * tile * tile * rows * columns):
            best, least = (rows, columns), distance
    return best


def choose_shrink(height: int, width: int, tile: int, grids: Sequence[Tiling]) -> Tiling:
    """Return the grid that holds an image with the least padding, or where none does, that shrinks it least.

    Padding is what is left of the canvas once the image, its ratio kept, has been enlarged to it. Of equally good
    grids it is the one of fewest tiles, and of those the first.

    Args:
        height: the image's, in pixels.
        width: the image's.
        tile: pixels a side of a tile.
        grids: to choose from.

    Source: MM1.5 (arXiv 2409.20566), equation 1. The paper leaves ties open.
    """

    def scale(grid: Tiling) -> Fraction:
        return min(Fraction(grid[0] * tile, height), Fraction(grid[1] * tile, width))

    def padding(grid: Tiling) -> Fraction:
        return _tiles(grid) * tile**2 - height * width * scale(grid) ** 2

    holding = [grid for grid in grids if scale(grid) >= 1]
    if holding:
        return min(holding, key=lambda grid: (padding(grid), _tiles(grid)))
    return min(grids, key=lambda grid: (-scale(grid), _tiles(grid)))


def _tiles(grid: Tiling) -> int:
    return grid[0] * grid[1]

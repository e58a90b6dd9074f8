"""Rules of sizes and tiles against the code of transformers, and where that has none, against another formulation."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AriaImageProcessor, FuyuImageProcessor
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.got_ocr2 import image_processing_got_ocr2 as got_ocr2
from transformers.models.mllama import image_processing_mllama as mllama
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from unimm.errors import UserError
from unimm.processing import sizes
from unimm.processing.sizes import Size, Tiling

LONGEST = 9000


def random_sizes(count: int, seed: int, longest: int = LONGEST) -> list[Size]:
    """Heights and widths from 1 to `longest`, each magnitude as often as another."""
    logs = np.random.default_rng(seed).uniform(0, math.log(longest + 1), (count, 2))
    return [(height, width) for height, width in np.exp(logs).astype(int).tolist()]


def edge_sizes(*units: int) -> Iterator[Size]:
    """Lines, single pixels, and the units with their halves and multiples and their neighbours."""
    sides = {1, 2, 3, LONGEST}
    for unit in units:
        for near in (unit // 2, unit, 3 * unit // 2, 2 * unit, 3 * unit):
            sides |= {max(near - 1, 1), near, near + 1}
    for height in sorted(sides):
        for width in sorted(sides):
            yield height, width


def compare(ours: Callable[[int, int], object], theirs: Callable[[int, int], object], *units: int) -> None:
    for height, width in [*random_sizes(3000, seed=len(units)), *edge_sizes(*units)]:
        assert ours(height, width) == theirs(height, width), (height, width)


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "least", "most"),
    [(28, 56 * 56, 28 * 28 * 1280), (28, 56 * 56, 14 * 14 * 4 * 1280 * 12), (8, 512 * 512, 1024 * 1024)],
)
def test_area_is_smart_resize(factor: int, least: int, most: int) -> None:
    def theirs(height: int, width: int) -> Size | None:
        try:
            rows, columns = smart_resize(height, width, factor, least, most)
            return rows, columns
        except ValueError:
            return None

    def ours(height: int, width: int) -> Size | None:
        try:
            return sizes.area_size(height, width, factor, least, most)
        except UserError:
            return None

    refused = [size for size in random_sizes(3000, seed=3) if theirs(*size) is None]
    assert 20 < len(refused) < 2000  # both answers are met
    compare(ours, theirs, factor, math.isqrt(least), math.isqrt(most), 5 * factor)


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (10, 2001)])
def test_a_line_has_no_area(height: int, width: int) -> None:
    with pytest.raises(UserError, match=rf"^image: {width} x {height} pixels, more than 200 times.*crop it"):
        sizes.area_size(height, width, 28, 56 * 56, 28 * 28 * 1280)
    sizes.check_ratio(10, 2000)


@pytest.mark.parametrize("longest", [1024, 1540])
def test_stretched_fit_is_pixtrals(longest: int) -> None:
    def theirs(height: int, width: int) -> Size | None:
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        size = get_resize_output_image_size(image, longest, 16, ChannelDimension.LAST)
        return None if 0 in size else size  # for which it would fail at resizing

    def ours(height: int, width: int) -> Size | None:
        try:
            size, canvas = sizes.fit_size(height, width, (longest, longest), 16, stretch=True)
        except UserError:
            return None
        assert size == canvas
        return size

    compare(ours, theirs, 16, longest)
    for long in (
        1668,
        1716,
        1740,
    ):  # to 1540, whether one divides or multiplies makes a row or column of patches
        for short in range(1, long):
            assert ours(short, long) == theirs(short, long), (short, long)


def fuyu_size(height: int, width: int) -> tuple[Size, Size]:
    return sizes.fit_size(height, width, (1080, 1920), 30)


def test_padded_fit_is_fuyus() -> None:
    processor = FuyuImageProcessor()
    seen = [
        *random_sizes(150, seed=1, longest=4000),
        (1080, 1920),
        (1081, 1920),
        (1080, 1921),
        (1, 1),
        (1, 1919),
    ]
    for height, width in [*seen, (2160, 3840), (2159, 3841), (3999, 1080)]:
        if int(min(height, width) * min(1080 / height, 1920 / width)) == 0:
            continue  # it fails; see below
        row = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, height, width)
        resized = processor.resize(row, SizeDict(height=1080, width=1920)).shape[1:]
        assert fuyu_size(height, width)[0] == tuple(resized), (height, width)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (31, 29), (1200, 1921), (30, 1), (1, 900)])
def test_canvas_is_what_fuyu_cuts_into_patches(height: int, width: int) -> None:
    processor = FuyuImageProcessor()
    prepared = processor(Image.new("RGB", (width, height)), return_tensors="pt")
    tokens = processor.preprocess_with_tokenizer_info(
        image_input=prepared["images"],
        image_present=torch.ones(1, 1, 1),
        image_unpadded_h=torch.as_tensor(prepared["image_unpadded_heights"]),
        image_unpadded_w=torch.as_tensor(prepared["image_unpadded_widths"]),
        image_placeholder_id=7,
        image_newline_id=8,
        variable_sized=True,
    )["image_input_ids"][0][0].tolist()
    canvas = fuyu_size(height, width)[1]
    rows, columns = canvas[0] // 30, canvas[1] // 30
    assert tokens == ([7] * columns + [8]) * rows


@pytest.mark.parametrize(("side", "count"), [(490, 60), (980, 12)])
def test_exact_fit_is_arias(side: int, count: int) -> None:
    processor: Any = AriaImageProcessor()
    # of these squares the scale times the height is a hair under the bound
    short = [length for length in range(1, 1200) if int(length * (side / length)) < side]
    assert short
    seen = [
        *random_sizes(count, seed=side, longest=1500),
        (1, 1500),
        (1500, 1),
        (side, side),
        (side + 1, side),
    ]
    for height, width in [*seen, (side, side + 1), (short[0], short[0]), (short[0], short[0] + 1)]:
        prepared = processor(Image.new("RGB", (width, height)), max_image_size=side, return_tensors="pt")
        real = prepared["pixel_mask"][0]
        size, canvas = sizes.fit_size(height, width, (side, side), side, exact=True, min_side=336)
        assert size == (int(real[:, 0].sum()), int(real[0].sum())), (height, width)
        assert canvas == tuple(real.shape) == (side, side)


@pytest.mark.parametrize(
    "rule",
    [
        fuyu_size,
        lambda height, width: sizes.fit_size(height, width, (1024, 1024), 16, stretch=True),
        lambda height, width: sizes.letterbox_size(height, width, (336, 1344), single_precision=True),
    ],
    ids=["fuyu", "pixtral", "molmo"],
)
@pytest.mark.parametrize(("height", "width"), [(1, 9000), (9000, 1)])
def test_an_image_that_would_vanish_is_refused(
    rule: Callable[[int, int], object], height: int, width: int
) -> None:
    with pytest.raises(UserError, match=rf"^image: {width} x {height} pixels, brought to .*; crop it first$"):
        rule(height, width)


def single(value: float) -> float:
    """A number rounded to float32, by its bytes."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_letterbox_in_single_and_double_precision() -> None:
    differing = 0
    for height, width in random_sizes(4000, seed=5, longest=4000):
        rows, columns = height % 4 + 1, width % 3 + 1
        canvas = rows * 224 + 112, columns * 224 + 112
        if max(height, width) > 100 * min(height, width):
            continue
        scale = min(single(canvas[0] / height), single(canvas[1] / width))
        expected = int(single(height * scale)), int(single(width * scale))
        assert sizes.letterbox_size(height, width, canvas, single_precision=True) == expected
        size = sizes.letterbox_size(height, width, canvas)
        differing += size != expected
        share = min(Fraction(canvas[0], height), Fraction(canvas[1], width))
        for length, whole in zip(size, (height * share, width * share), strict=True):
            assert 0 <= whole - length < 1 or length == whole - 1  # floats may miss a whole number by a hair
    assert differing  # or the option would say nothing


@pytest.mark.parametrize("tile", [448, 560])
def test_size_in_canvas_is_llamas(tile: int) -> None:
    def theirs(height: int, width: int) -> Size:
        canvas = mllama.get_optimal_tiled_canvas(height, width, 4, tile)
        inner = mllama.get_image_size_fit_to_canvas(height, width, *canvas, tile)
        return int(inner[0]), int(inner[1])

    def ours(height: int, width: int) -> Size:
        rows, columns = sizes.choose_scale(height, width, tile, sizes.tile_grids(4, order="rows"))
        return sizes.size_in_canvas(height, width, (rows * tile, columns * tile), tile)

    compare(ours, theirs, tile, 4 * tile)


# --- grids --------------------------------------------------------------------------------------------------


def test_grids_are_all_that_hold_the_tiles() -> None:
    for least, most in [(1, 4), (4, 9), (4, 16), (12, 12)]:
        found = sizes.tile_grids(most, least)
        assert {rows * columns for rows, columns in found} == {*range(least, most + 1)}
        divisors = [d for tiles in range(least, most + 1) for d in range(1, tiles + 1) if tiles % d == 0]
        assert len(set(found)) == len(found) == len(divisors)


def test_orders_of_grids() -> None:
    llama = [tuple(grid) for grid in mllama.get_all_supported_aspect_ratios(4)]
    assert list(sizes.tile_grids(4, order="rows")) == llama
    nvlm = [(height, width) for width, height in got_ocr2.get_all_supported_aspect_ratios(1, 6)]
    assert list(sizes.tile_grids(6, order="area_columns")) == nvlm
    assert sizes.tile_grids(3) == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1))  # molmo: by tiles, then rows


@pytest.mark.parametrize(("tile", "most"), [(448, 4), (560, 4), (384, 12)])
def test_least_scale_is_llamas(tile: int, most: int) -> None:
    def theirs(height: int, width: int) -> Tiling:
        canvas = mllama.get_optimal_tiled_canvas(height, width, most, tile)
        return int(canvas[0]) // tile, int(canvas[1]) // tile

    grids = sizes.tile_grids(most, order="rows")
    compare(lambda height, width: sizes.choose_scale(height, width, tile, grids), theirs, tile, most * tile)


def test_the_first_of_equal_grids_is_taken() -> None:
    assert sizes.choose_scale(500, 500, 448, [(1, 3), (1, 2), (2, 1)]) == (1, 2)
    assert sizes.choose_scale(500, 500, 448, [(2, 1), (1, 2)]) == (2, 1)
    assert sizes.choose_shrink(900, 900, 448, [(1, 2), (2, 1)]) == (1, 2)
    assert sizes.choose_shrink(300, 300, 448, [(2, 1), (1, 2)]) == (2, 1)


def molmo_grid(height: int, width: int, tile: int, most: int) -> Tiling:
    """What the description says, in exact numbers: the least enlargement, else the least shrinking, else the first."""
    found: list[tuple[int, Fraction, int, int]] = []
    for rows in range(1, most + 1):
        for columns in range(1, most // rows + 1):
            lines = [(rows, height), (columns, width)]
            scale = min((Fraction(count * tile, side) for count, side in lines if side), default=Fraction(1))
            shrinks = scale < 1
            found.append((shrinks, -scale if shrinks else scale, rows * columns, rows))
    _, _, tiles, rows = min(found)
    return rows, tiles // rows


@pytest.mark.parametrize(("tile", "most"), [(224, 12), (224, 36)])
def test_least_scale_is_molmos(tile: int, most: int) -> None:
    """The image without the margins of 112 pixels, which is nothing or less for a small one."""
    grids = sizes.tile_grids(most)
    edges = [size for size in edge_sizes(tile) if max(size) <= 800] + [(112, 112), (112, 50), (112, 900)]
    for height, width in [*random_sizes(1200 * 12 // most, seed=tile), *edges]:
        ours = sizes.choose_scale(height - 112, width - 112, tile, grids)
        assert ours == molmo_grid(height - 112, width - 112, tile, most), (height, width)


@pytest.mark.parametrize(("tile", "least", "most"), [(448, 1, 6), (384, 1, 12), (448, 2, 5)])
def test_nearest_ratio_is_that_of_transformers(tile: int, least: int, most: int) -> None:
    def theirs(height: int, width: int) -> Tiling:
        columns, rows = got_ocr2.get_optimal_tiled_canvas((height, width), (tile, tile), least, most)
        return rows, columns

    grids = sizes.tile_grids(most, least, "area_columns")
    compare(lambda height, width: sizes.choose_ratio(height, width, tile, grids), theirs, tile, 2 * tile)
    for side in range(1, 1500):  # grids of the same ratio, of which the area decides
        for height, width in [(side, side), (side, 2 * side), (3 * side, side)]:
            assert sizes.choose_ratio(height, width, tile, grids) == theirs(height, width), (height, width)


def padded(height: int, width: int, rows: int, columns: int) -> Fraction:
    """What of a canvas is left over in the direction that the image does not fill, its area being 1."""
    if rows * width <= columns * height:  # as high as the canvas
        return 1 - Fraction(width * rows, height * columns)
    return 1 - Fraction(height * columns, width * rows)


@pytest.mark.parametrize("most", [9, 16])
def test_least_padding_or_shrinking(most: int) -> None:
    tile, grids = 672, sizes.tile_grids(most, 4)
    held = 0
    for height, width in [*random_sizes(700, seed=most), *edge_sizes(tile)]:
        rows, columns = sizes.choose_shrink(height, width, tile, grids)
        holding = [(r, c) for r, c in grids if height <= r * tile and width <= c * tile]
        if holding:
            held += 1
            areas = {(r, c): padded(height, width, r, c) * r * c for r, c in holding}
            best = min(areas.values())
            expected = [grid for grid in holding if areas[grid] == best]
        else:  # the image keeps the most of its pixels
            kept = {(r, c): min(r * width, c * height) for r, c in grids}
            expected = [grid for grid in grids if kept[grid] == max(kept.values())]
        fewest = min(r * c for r, c in expected)
        assert (rows, columns) == next(grid for grid in expected if grid[0] * grid[1] == fewest), (
            height,
            width,
        )
    assert 100 < held < 1200  # both cases are met


@pytest.mark.parametrize(
    ("height", "width", "llama", "molmo", "nvlm", "mm1"),
    [
        (480, 640, (1, 2), (2, 3), (2, 3), (2, 3)),
        (1080, 1920, (2, 2), (3, 4), (1, 2), (2, 4)),
        (2000, 700, (3, 1), (6, 2), (3, 1), (4, 2)),
        (100, 100, (1, 1), (1, 1), (1, 1), (2, 2)),
    ],
)
def test_four_images(
    height: int, width: int, llama: Tiling, molmo: Tiling, nvlm: Tiling, mm1: Tiling
) -> None:
    assert sizes.choose_scale(height, width, 560, sizes.tile_grids(4, order="rows")) == llama
    assert sizes.choose_scale(height - 112, width - 112, 224, sizes.tile_grids(12)) == molmo
    assert sizes.choose_ratio(height, width, 448, sizes.tile_grids(6, order="area_columns")) == nvlm
    assert sizes.choose_shrink(height, width, 672, sizes.tile_grids(9, 4)) == mm1


def test_a_square_takes_the_fewest_tiles_that_hold_it_without_padding() -> None:
    grids = sizes.tile_grids(9, 4)
    assert [sizes.choose_shrink(side, side, 672, grids) for side in (99, 1344, 1345, 5000)] == [
        (2, 2),
        (2, 2),
        (3, 3),
        (3, 3),
    ]

"""Images on a canvas in float32, and which features of its tiles are of padding: what Molmo's processor does.

Also views of unlike sizes as one tensor.

Source: allenai/molmo `olmo/data/model_preprocessor.py` (`resize_and_pad`, `MultiModalPreprocessor`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unimm.models.layout import Grid
from unimm.models.part_types import Resample

ALL, PARTLY = 1, 2  # kinds of padding, as `Images.padding` has them


def float_canvas(
    image: Image.Image, inner: Grid, canvas: Grid, pad: tuple[int, ...], resample: Resample
) -> Tensor:
    """Return an image in the centre of a canvas: float32 [3, H, W] in [0, 1], never rounded to 256 levels.

    Args:
        image: RGB.
        inner: height and width that it is resized to.
        canvas: height and width of the canvas.
        pad: RGB 0..255 around it.
        resample: how pixels are interpolated, with antialiasing.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    resized = F.interpolate(pixels[None], size=inner, mode=resample, antialias=True, align_corners=False)[0]
    found = (torch.tensor(pad) / 255).view(3, 1, 1).repeat(1, *canvas)
    top, left = _starts(inner, canvas)
    found[:, top : top + inner[0], left : left + inner[1]] = resized.clamp(0, 1)
    return found


def padding_of_views(inner: Grid, canvas: Grid, grid: Grid, tile: int, patch: int) -> Tensor:
    """Return which features are of padding, of the whole image and then of its tiles: uint8 [V, n].

    0: the patch is of the image; `ALL` of it is padding; `PARTLY`: some is. As published the rows stand one view too
    early: the whole image has those of the first tile and each tile those of the next, whatever it shows itself.
    The last tile has `PARTLY` everywhere. All of Molmo's checkpoints were trained so.

    Args:
        inner: height and width of the image on the canvas, in its centre.
        canvas: height and width of the canvas.
        grid: rows and columns of tiles.
        tile: pixels a side of a tile; tiles may overlap.
        patch: pixels a side of a feature.
    """
    full, none = zip(
        *(
            _covered(start, length, side, count, tile, patch)
            for start, length, side, count in zip(_starts(inner, canvas), inner, canvas, grid, strict=True)
        ),
        strict=True,
    )
    # [rows, patches], [columns, patches] -> [rows, columns, patches, patches]
    whole = full[0][:, None, :, None] & full[1][None, :, None, :]
    empty = none[0][:, None, :, None] | none[1][None, :, None, :]
    tiles = np.where(whole, 0, np.where(empty, ALL, PARTLY)).reshape(grid[0] * grid[1], -1)
    rows = np.concatenate([tiles, np.full_like(tiles[:1], PARTLY)])
    return torch.from_numpy(rows.astype(np.uint8))


def _starts(inner: Grid, canvas: Grid) -> Grid:
    """Top and left of an image in the centre."""
    return (canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2


def _covered(
    start: int, length: int, side: int, count: int, tile: int, patch: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Along one axis, which patches of each tile the image covers, and which it does not touch: [tiles, patches]."""
    real = np.zeros(side, np.int64)
    real[start : start + length] = 1
    step = (side - tile) // max(count - 1, 1)
    pixels = np.stack([real[number * step : number * step + tile] for number in range(count)])
    covered = pixels.reshape(count, tile // patch, patch).sum(-1)
    return covered == patch, covered == 0


def filled(views: Sequence[Tensor]) -> Tensor:
    """Return views [3, H, W] of unlike sizes as one tensor [V, 3, H, W], filled up with 0 on the right and below."""
    height, width = (max(view.shape[axis] for view in views) for axis in (1, 2))
    pixels = torch.zeros(len(views), 3, height, width)
    for i, view in enumerate(views):
        pixels[i, :, : view.shape[1], : view.shape[2]] = view
    return pixels

"""Changes to training images that leave every caption true: the artwork varies, what is shown does not.

A held-out artwork family differs in outline, shading and exact colour, so these vary; the background keeps
its colour (captions name it), and an image is mirrored only where no caption says left or right. Random
numbers are drawn with the sample, in numpy; the arithmetic is done here on whole batches.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from unimm.sections import Fraction, Section

ELASTIC = 4  # control points a side of the elastic warp
AFFINE = 6  # mirror, scale, aspect, angle, two shifts
COLOUR = 6  # three gains, contrast, saturation, hue
CHANCES = 3  # blur, outline, flat colours
DRAWS = AFFINE + 2 * ELASTIC**2 + COLOUR + CHANCES
INNER = 8 / 255  # nearer than this to the background colour is background
RAMP = 24 / 255  # and this much further it is surely object

Amount = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Section):
    """How far training images may change; 0 turns a change off."""

    scale: Fraction = 0.12
    """Size and, at half that, the ratio of width to height."""
    angle: Annotated[float, Field(ge=0, le=45)] = 12.0
    """Degrees."""
    shift: Amount = 0.06
    """Of half the image's side."""
    elastic: Amount = 0.07
    """Of half the image's side."""
    gain: Fraction = 0.12
    """Of each colour channel, on objects."""
    contrast: Fraction = 0.3
    saturation: Fraction = 0.4
    hue: Annotated[float, Field(ge=0, le=180)] = 14.0
    """Degrees; small, since names such as "red apple" must stay true."""
    blur: Amount = 0.15
    """Chance of a slight blur."""
    outline: Amount = 0.2
    """Chance of a dark outline round the objects."""
    flat: Amount = 0.2
    """Chance of few, flat colours."""
    mirror: bool = True


def draw_numbers(rng: np.random.Generator) -> NDArray[np.float32]:
    """The random numbers of one sample [DRAWS], uniform in [-1, 1)."""
    return rng.random(DRAWS, dtype=np.float32) * 2 - 1


def augment(pixels: Tensor, background: Tensor, mirrored: Tensor, draws: Tensor, how: Augmentation) -> Tensor:
    """Change a batch of images.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
        background: colour of each background [B, 3] in [-1, 1].
        mirrored: bool [B]; whether an image may be mirrored.
        draws: [B, DRAWS] from `draw_numbers`.
        how: the extent of each change.

    Returns:
        [B, 3, H, W] in [-1, 1].
    """
    ends = list(itertools.accumulate((AFFINE, 2 * ELASTIC**2, COLOUR)))
    affine, elastic, colour, chances = draws.tensor_split(ends, dim=1)
    warped = _warp(pixels, affine, elastic, mirrored, how)
    mask = _objects(warped, background)  # [B, 1, H, W]
    changed = torch.lerp(warped, _recolour(warped, mask, colour, how), mask)
    chance = (chances + 1)[:, :, None, None, None] / 2  # [B, CHANCES, 1, 1, 1] in [0, 1)
    levels = (changed * 3).round() / 3
    changed = torch.where((chance[:, 2] < how.flat).logical_and(mask > 0.5), levels, changed)
    grown = F.max_pool2d(mask, 3, stride=1, padding=1)
    inked = torch.lerp(changed, changed * 0.3 - 0.6, (grown - mask).clamp(min=0))
    changed = torch.where(chance[:, 1] < how.outline, inked, changed)
    blurred = F.avg_pool2d(F.pad(changed, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(chance[:, 0] < how.blur, blurred, changed).clamp(-1, 1)


def _warp(pixels: Tensor, affine: Tensor, elastic: Tensor, mirrored: Tensor, how: Augmentation) -> Tensor:
    """Mirror, scale, stretch, turn, shift and bend; what comes in at the border is background."""
    mirror, scale, aspect, angle, x, y = affine.unbind(1)
    flip = 1 - 2 * ((mirror < 0) & mirrored & how.mirror).float()
    size = torch.exp(scale * how.scale)
    stretch = torch.exp(aspect * how.scale / 2)
    turn = angle * math.radians(how.angle)
    cos, sin = turn.cos() * size, turn.sin() * size
    rows = [
        cos * stretch * flip,
        -sin * stretch,
        x * how.shift,
        sin * flip / stretch,
        cos / stretch,
        y * how.shift,
    ]
    matrix = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)  # [B, H, W, 2]
    bend = elastic.view(-1, 2, ELASTIC, ELASTIC) * how.elastic
    bend = F.interpolate(bend, size=pixels.shape[-2:], mode="bicubic", align_corners=True)
    return F.grid_sample(pixels, grid + bend.movedim(1, -1), padding_mode="border", align_corners=False)


def _objects(pixels: Tensor, background: Tensor) -> Tensor:
    """Soft mask [B, 1, H, W] of what is not background."""
    distance = (pixels - background[:, :, None, None]).abs().amax(dim=1, keepdim=True) / 2
    return ((distance - INNER) / RAMP).clamp(0, 1)


# RGB to luma and two chroma axes (ITU-R BT.601 YIQ); turning the chroma plane turns the hue.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def _recolour(pixels: Tensor, mask: Tensor, colour: Tensor, how: Augmentation) -> Tensor:
    """Gain, contrast about the objects' own mean, saturation and hue."""
    gain = 1 + colour[:, :3, None, None] * how.gain
    contrast = 1 + colour[:, 3, None, None, None] * how.contrast
    saturation = 1 + colour[:, 4] * how.saturation
    hue = colour[:, 5] * math.radians(how.hue)
    cos, sin, zero = saturation * hue.cos(), saturation * hue.sin(), torch.zeros_like(hue)
    turn = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(_YIQ) @ turn @ _YIQ  # [B, 3, 3]
    lit = (pixels + 1) * gain - 1
    mean = (lit * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.einsum("bij,bjhw->bihw", matrix, mean + (lit - mean) * contrast).clamp(-1, 1)

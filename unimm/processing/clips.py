"""Videos to views: frames brought to one size, several of which make one time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from unimm.errors import UserError
from unimm.models.inputs import Images
from unimm.models.layout import Grid

MOST_VIDEO_PIXELS = 2**27  # of all frames: more than any published context has room for


def video_views(
    video: Iterable[Image.Image],
    size_of: Callable[[int, int], Grid],
    normal: Callable[[Sequence[Image.Image]], Tensor],
    frames: int,
    stride: int,
) -> Images:
    """Return a video as one image of several views, pixels [times, 3 frames, H, W] of a channel frame by frame.

    Args:
        video: its frames; the last is taken again where they do not fill a time.
        size_of: height and width that a frame of a height and width is brought to.
        normal: frames of one size as float [N, 3, H, W], normalised.
        frames: of a time.
        stride: pixels a side of a token.

    Raises:
        UserError: its frames are of several sizes, or too many.
    """
    found: list[Tensor] = []
    first, size = (0, 0), (0, 0)
    for frame in video:
        if not found:
            first, size = frame.size, size_of(frame.height, frame.width)
        if frame.size != first:
            raise UserError(f"video: a frame of {frame.size}, but the first is of {first}; give one size")
        if (len(found) + 1) * size[0] * size[1] > MOST_VIDEO_PIXELS:
            raise UserError(
                f"video: more than {len(found)} frames of {size[1]} x {size[0]} pixels; give fewer frames or max_pixels"
            )
        found.append(normal([frame.resize(size[::-1], Image.Resampling.BICUBIC)])[0])
    if not found:
        raise UserError("video: has no frames")
    found += found[-1:] * (-len(found) % frames)
    pixels = torch.stack(found).unflatten(0, (-1, frames)).transpose(1, 2).flatten(1, 2)
    times = torch.tensor([len(pixels)])
    rows, columns = (side // stride for side in size)
    return Images(
        pixels=pixels,
        sizes=torch.tensor([size] * len(pixels)),
        grids=torch.tensor([[rows * len(pixels), columns]]),
        views=times,
        times=times,
    )

"""Positions, and who may look at whom in a row that holds several samples, each with branches of its own.

A row is cut into samples, which do not see each other. Within a sample, branch 0 is a shared prefix, and every
other branch sees that prefix and itself. Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FLEX = "flex_attention"  # what transformers calls it


def dense_mask(samples: Tensor, branches: Tensor) -> Tensor:
    """Return who may look where: bool [B, 1, T, T], True at [b, 0, query, key].

    Args:
        samples: number of the sample that a position belongs to, int [B, T]; padding has one of its own.
        branches: number of its branch, int [B, T].
    """
    # causal, within a sample, and within the branch or what all branches share
    order = torch.ones(samples.shape[1], samples.shape[1], dtype=torch.bool, device=samples.device).tril()
    same = samples[:, :, None] == samples[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (order & same & seen)[:, None]


def block_mask(samples: Tensor, branches: Tensor) -> Any:
    """Return the same as a `BlockMask` for FlexAttention, which skips the blocks that no position looks at."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (branches[row, key] == 0) | (branches[row, key] == branches[row, query])
        return (query >= key) & (samples[row, query] == samples[row, key]) & seen

    rows, length = samples.shape
    return create_block_mask(may_look, rows, None, length, length, device=samples.device)


def positions(attention_mask: Tensor) -> Tensor:
    """Return position ids [B, T] that count attended positions only, so that left padding shifts nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


# --- positions of images ------------------------------------------------------------------------------------


class Block(NamedTuple):
    """An image in the stream.

    Attributes:
        row: of the batch.
        places: the positions of its features or codes in the row, in raster order.
        columns: of its raster.
        times: rasters of a video, one below the other; 1 of an image.
    """

    row: int
    places: list[int]
    columns: int
    times: int = 1


def find_blocks(
    placeholders: Tensor, grids: Iterable[tuple[int, int]], times: Iterable[int] = ()
) -> list[Block]:
    """Return where images stand, by their placeholders and rasters.

    Args:
        placeholders: bool [B, T].
        grids: rows and columns of each image, in the order of the stream; further ones are not looked at.
        times: of those that are videos, whose rows are those of all times; 0 of an image, as of those not named.
    """
    where = iter(placeholders.nonzero().tolist())
    blocks, rest = [], iter(times)
    for rows, columns in grids:
        count = max(next(rest, 0), 1)
        own = [place for _, place in zip(range(rows * columns), where, strict=False)]
        if len(own) == rows * columns:
            blocks.append(Block(own[0][0], [place for _, place in own], columns, count))
    return blocks


def raster_positions(counted: Tensor, blocks: Sequence[Block], visible: Tensor | None = None) -> Tensor:
    """Return positions of time, row and column: int64 [3, B, T].

    All of an image has one time, a video has several; rows and columns count from there. What comes after goes on
    behind the largest of the three (Qwen2-VL `get_rope_index`).

    Args:
        counted: [B, T], positions as they would be if all tokens counted one after the other.
        blocks: the images.
        visible: who may look where, bool [B, 1, T, T] or [B, T, T]; None: everything that came before. What does not
            see an image is not moved by it.
    """
    moved = counted.expand(3, *counted.shape).clone()
    for row, places, columns, times in blocks:
        count, last = len(places), places[-1]
        rows = count // columns // times
        seers = torch.arange(counted.shape[1], device=counted.device) > last
        if visible is not None:
            seers &= visible[row, ..., last].reshape(-1, counted.shape[1])[0]
        moved[:, row, seers] += max(rows, columns, times) - count
        order = torch.arange(count, device=counted.device)
        own = torch.stack([order // (rows * columns), order // columns % rows, order % columns])
        moved[:, row, places] += own - order
    return moved


class Mrope(nn.Module):
    """Rotary tables of three positions, in the place of a decoder's own (Qwen2-VL's M-RoPE).

    Args:
        inner: the decoder's own, which gives the frequencies, and the tables where positions are counted.
        sections: how many frequencies turn with time, row and column.
    """

    def __init__(self, inner: Any, sections: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.sections = inner, list(sections)

    def forward(self, x: Tensor, position_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, T, D] of positions [3, B, T], or counted ones [B, T]."""
        if position_ids.ndim == 2:
            counted: tuple[Tensor, Tensor] = self.inner(x, position_ids, **options)
            return counted
        angles = position_ids[..., None].float() * self.inner.inv_freq.float()
        angles = torch.cat([part[axis] for axis, part in enumerate(angles.split(self.sections, -1))], -1)
        angles = torch.cat([angles, angles], -1)
        scale = self.inner.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

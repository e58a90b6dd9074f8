"""How what an encoder saw reaches the decoder: as rows of the stream, in the place of placeholders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Embedded(NamedTuple):
    """What the decoder reads.

    Attributes:
        stream: [B, T, C], a row for each token.
        memory: what the decoder looks at by cross-attention; None: nothing.
        positions: [3, B, T], of time, row and column, where images have these; None: tokens are counted.
    """

    stream: Tensor
    memory: Tensor | None = None
    positions: Tensor | None = None


def scatter_rows(target: Tensor, mask: Tensor, rows: Tensor, what: str, add: bool = False) -> Tensor:
    """Return `target` [B, T, C] with its masked positions filled, in order, by `rows` [N, C].

    Args:
        target: the stream.
        mask: bool [B, T].
        rows: what is put there.
        what: for errors.
        add: whether rows are added to what is there.

    Raises:
        ValueError: the number of rows is not that of the masked positions.
    """
    places = int(mask.sum())
    if places != rows.shape[0]:
        raise ValueError(
            f"{what}: {rows.shape[0]} given, but the tokens have room for {places}; was the prompt cut in an image?"
        )
    if not places:
        return target
    where, rows = mask.unsqueeze(-1), rows.to(target.dtype)
    if add:
        return target + torch.zeros_like(target).masked_scatter(where, rows)
    return target.masked_scatter(where, rows)

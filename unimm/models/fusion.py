"""How what an encoder saw reaches the decoder: as rows of the stream, in the place of placeholders."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Embedded(NamedTuple):
    """What the decoder reads.

    Attributes:
        stream: [B, T, C], a row for each token.
        memory: what the decoder looks at by cross-attention; None: nothing.
        positions: [B, T], where they follow from the images; None: they count the tokens that are attended to.
    """

    stream: Tensor
    memory: Tensor | None = None
    positions: Tensor | None = None


def scatter_rows(target: Tensor, mask: Tensor, rows: Tensor, what: str) -> Tensor:
    """Return `target` [B, T, C] with its masked positions filled, in order, by `rows` [N, C].

    Raises:
        ValueError: the number of rows is not that of the masked positions.
    """
    places = int(mask.sum())
    if places != rows.shape[0]:
        raise ValueError(f"{what}: {rows.shape[0]} given, but the tokens have room for {places}")
    return target.masked_scatter(mask.unsqueeze(-1), rows.to(target.dtype)) if places else target

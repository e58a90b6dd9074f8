"""Reducers: fewer features of many, for each image as its views lie.

Each takes the features of all views and says, by an index table, which of them make a token. Shape suffixes: V views,
P features of all views, F tokens of all views, k features that make a token, C width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.models.layout import Grid
from unimm.models.parts import (
    AbstractReducerConfig,
    AttendReducerConfig,
    JoinReducerConfig,
    MeanReducerConfig,
    ResampleReducerConfig,
)
from unimm.models.seeing import Seeing, Seen


class Reducer(nn.Module):
    """Base of reducers."""

    def width(self, width: int) -> int:
        """Return the width of a token, for features of a width."""
        return width

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """Return tokens, [V, n, C] where all views have as many, else [F, C].

        Args:
            features: [V, n, C], or [P, C].
            seen: how they lie.
        """
        raise NotImplementedError


class JoinReducer(Reducer):
    """Joins neighbouring features, channel after channel (pixel shuffle, the merger of Qwen2-VL)."""

    def __init__(self, config: JoinReducerConfig) -> None:
        super().__init__()
        self.side = config.side

    def width(self, width: int) -> int:
        """See `Reducer`."""
        return width * self.side**2

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """See `Reducer`."""
        if self.side == 1:
            return features
        if features.ndim == 3:
            return join_neighbours(features, self.side)
        return features[_table(seen.shapes, self.side, features.device)].flatten(1)


class MeanReducer(Reducer):
    """The mean of neighbouring features: whole rows of squares, at an odd column of what there is."""

    def __init__(self, config: MeanReducerConfig) -> None:
        super().__init__()
        self.side = config.side

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """See `Reducer`."""
        views = features.shape[0] if features.ndim == 3 else 0
        flat = features.flatten(0, 1) if views else features
        table = _table(seen.shapes, self.side, features.device)
        tokens = _gathered(flat, table).sum(1) / (table >= 0).sum(1, keepdim=True)
        return tokens.unflatten(0, (views, -1)) if views else tokens


class AttendReducer(Reducer):
    """Attention from the mean of neighbouring features to each of them, over tiles that overlap (Molmo).

    Source: allenai/molmo `olmo/model.py` (`OLMoVisionBackbone`).

    Args:
        config: of the reducer.
        width: of a feature.
        overlap: features at each side of a tile that its neighbours show too.
    """

    def __init__(self, config: AttendReducerConfig, width: int, overlap: int) -> None:
        super().__init__()
        self.side, self.heads, self.out, self.overlap = config.side, config.heads, config.width, overlap
        self.padding = nn.Parameter(torch.zeros(2, width)) if config.padding else None
        self.q, self.k, self.v = (nn.Linear(width, config.width) for _ in range(3))
        self.output = nn.Linear(config.width, config.width)

    def width(self, width: int) -> int:
        """See `Reducer`."""
        return self.out

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """See `Reducer`; features [V, n, C] or [P, C] of the whole and the tiles of each image, tokens [F, C]."""
        side = seen.shapes[0][0]
        table = _stacked(
            [
                overlapping_windows(rows, columns, side, self.overlap, self.side)
                for rows, columns in seen.grids
            ],
            [(1 + rows * columns) * side**2 for rows, columns in seen.grids],
        )
        flat = features.flatten(0, 1) if features.ndim == 3 else features
        if self.padding is not None:
            marks = torch.cat([torch.zeros_like(self.padding[:1]), self.padding])
            kinds = flat.new_zeros(len(flat)) if seen.padding is None else seen.padding.flatten()
            flat = flat + marks[kinds.long()]
        groups = flat[table.to(flat.device)]
        query = groups.mean(1, keepdim=True)
        q, k, v = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.q, query), (self.k, groups), (self.v, groups))
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens: Tensor = self.output(found)
        return tokens[:, 0]


class ResampleReducer(Reducer):
    """Learned queries that look at all features of a view (Aria `modeling_aria.py`: `AriaProjector`).

    Args:
        config: of the reducer.
        width: of a feature.
    """

    def __init__(self, config: ResampleReducerConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Parameter(torch.zeros(max(count for _, count in config.queries), width))
        self.norm, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.output = nn.Linear(width, width)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """See `Reducer`; the columns of an image's grid say how many queries look at it."""
        lengths = [rows * columns for rows, columns in seen.shapes]
        counts = [rows * columns for rows, columns in seen.grids]
        flat = features.flatten(0, 1) if features.ndim == 3 else features
        longest, most = max(lengths), max(counts)
        padded = flat.new_zeros(len(lengths), longest, flat.shape[-1])
        hidden = torch.ones(len(lengths), longest, dtype=torch.bool, device=flat.device)
        for view, own in enumerate(flat.split(lengths)):
            padded[view, : len(own)], hidden[view, : len(own)] = own, False
        query = self.q(self.norm(self.query[:most].to(flat.dtype))).expand(len(lengths), -1, -1)
        known = self.norm_features(padded)
        mask = hidden if len(set(lengths)) > 1 else None
        found = self.attention(
            query, self.k(known), self.v(known), key_padding_mask=mask, need_weights=False
        )[0]
        tokens: Tensor = self.output(found)
        if len(set(counts)) == 1:
            return tokens
        return torch.cat([own[:count] for own, count in zip(tokens, counts, strict=True)])


class AbstractReducer(Reducer):
    """Convolutions, an adaptive mean and convolutions again, over square views (the C-Abstractor).

    Source: Cha et al. 2023 (Honeybee, arXiv 2312.06742), section 4, and khanrc/honeybee
    `honeybee/projectors/projectors.py`.

    Args:
        config: of the reducer.
        width: of a feature.
        features: of a view.
    """

    def __init__(self, config: AbstractReducerConfig, width: int, features: int) -> None:
        super().__init__()
        self.out = config.width
        self.positions = nn.Parameter(torch.zeros(features, width)) if config.positions else None
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)
        block: Any = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
        self.before = RegStage(config.depth, width, config.width, **block)
        self.mean = nn.AdaptiveAvgPool2d(config.side)
        self.after = RegStage(config.depth, config.width, config.width, **block)

    def width(self, width: int) -> int:
        """See `Reducer`."""
        return self.out

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """See `Reducer`."""
        if features.ndim == 2:  # of several images, as they were stored
            features = features.unflatten(0, (len(seen.shapes), -1))
        if self.positions is not None:
            features = features + self.positions.to(features.dtype)
        rows = math.isqrt(features.shape[1])
        images = features.transpose(1, 2).unflatten(2, (rows, rows))
        found: Tensor = self.after(self.mean(self.before(images)))
        return found.flatten(2).transpose(1, 2)


def build_reducer(seeing: Seeing, width: int) -> Reducer:
    """Return the reducer of a kind, for features of a width."""
    config = seeing.reducer
    if isinstance(config, JoinReducerConfig):
        return JoinReducer(config)
    if isinstance(config, MeanReducerConfig):
        return MeanReducer(config)
    if isinstance(config, AttendReducerConfig):
        return AttendReducer(config, width, seeing.overlap)
    if isinstance(config, ResampleReducerConfig):
        return ResampleReducer(config, width)
    assert seeing.side is not None  # as `check_seeing` has it
    return AbstractReducer(config, width, seeing.side**2)


# --- which features make a token ----------------------------------------------------------------------------


def join_neighbours(features: Tensor, side: int) -> Tensor:
    """Join each side x side square of a raster of features: [B, N, C] to [B, N / side², side² C]."""
    batch, tokens, width = features.shape
    rows = math.isqrt(tokens)
    assert rows * rows == tokens and rows % side == 0, f"{tokens} features are no square that {side} divides"
    cells = features.view(batch, rows // side, side, rows // side, side, width)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(batch, tokens // side**2, side**2 * width)


@functools.lru_cache(256)
def neighbours(rows: int, columns: int, side: int) -> NDArray[np.int64]:
    """Return the features of each side x side square of a raster: int64 [F, side²], -1 beyond its last column."""
    down, across = rows // side, -(-columns // side)
    raster = np.full((down * side, across * side), -1, np.int64)
    raster[:, :columns] = np.arange(rows * columns).reshape(rows, columns)[: down * side]
    return raster.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side**2)


@functools.lru_cache(256)
def overlapping_windows(rows: int, columns: int, side: int, margin: int, pool: int) -> NDArray[np.int64]:
    """Return the features of each token of an image and its tiles: int64 [F, pool²].

    The whole comes first, with all of its features. The tiles make one raster: where two overlap, each gives the half
    that is nearer to its middle. Source: allenai/molmo `olmo/data/model_preprocessor.py`.

    Args:
        rows: of tiles.
        columns: of tiles.
        side: features a side of a view.
        margin: features at each side of a tile that do not count where it has a neighbour.
        pool: features a side that make a token.
    """

    def owners(tiles: int) -> list[Grid]:
        return [
            (tile, place)
            for tile in range(tiles)
            for place in range(0 if tile == 0 else margin, side if tile == tiles - 1 else side - margin, pool)
        ]

    def window(view: int, row: int, column: int) -> list[int]:
        first = view * side * side
        return [first + (row + i) * side + column + j for i in range(pool) for j in range(pool)]

    starts = range(0, side, pool)
    whole = [window(0, row, column) for row in starts for column in starts]
    tiles = [
        window(1 + i * columns + j, row, column) for i, row in owners(rows) for j, column in owners(columns)
    ]
    return np.array(whole + tiles, np.int64)


def _table(shapes: Sequence[Grid], side: int, device: torch.device) -> Tensor:
    """The squares of features of all views, as rows of the features of all: int64 [F, side²], -1 for none."""
    counts = [rows * columns for rows, columns in shapes]
    return _stacked([neighbours(rows, columns, side) for rows, columns in shapes], counts).to(device)


def _stacked(tables: Sequence[NDArray[np.int64]], counts: Sequence[int]) -> Tensor:
    """Tables of several rasters as one, each behind the features of those before."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    moved = [np.where(table < 0, -1, table + start) for table, start in zip(tables, starts, strict=True)]
    return torch.from_numpy(np.concatenate(moved))


def _gathered(features: Tensor, table: Tensor) -> Tensor:
    """Features [F, k, C] by a table, 0 where there is none."""
    return features[table.clamp(min=0)] * (table >= 0).unsqueeze(-1)

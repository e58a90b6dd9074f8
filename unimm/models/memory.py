"""Which tokens of images become a memory, and which positions of the stream see them; see `unimm.models.fusion`.

Shape suffixes: B rows, T positions of the stream, C decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.models.configuration import UniMMConfig
from unimm.models.fusion import Looks, Memory, Piece, visible_rows
from unimm.models.fusion_parts import BothFusionConfig, CrossFusionConfig, StreamFusionConfig
from unimm.models.inputs import Rows
from unimm.models.layout import Grid, ImageLayout
from unimm.models.parts import CanvasViewsConfig
from unimm.models.seeing import Seeing

EmbedTokens = Callable[[Tensor], Tensor]


class MemoryPlan(NamedTuple):
    """What becomes a memory, without its states.

    Attributes:
        pieces: in the order of the stream.
        visible: bool [B, T, S], which rows each position sees.
    """

    pieces: list[Piece]
    visible: Tensor


class Remembering(NamedTuple):
    """How a model keeps images in a memory.

    Attributes:
        fusion: of its configuration.
        layout: how images sit among its tokens.
        seeing: the parts that they go through.
    """

    fusion: CrossFusionConfig | BothFusionConfig
    layout: ImageLayout
    seeing: Seeing

    @classmethod
    def of(cls, config: UniMMConfig) -> Remembering | None:
        """Return that of a model's configuration; None where images are no memory."""
        fusion, seeing = config.fusion_part(), config.seeing()
        if isinstance(fusion, StreamFusionConfig) or seeing.encoder is None:
            return None
        return cls(fusion, config.image_layout(), seeing)

    def __call__(
        self, tokens: Tensor, grids: Sequence[Grid], placeholders: Tensor, looks: Looks, embed: EmbedTokens
    ) -> tuple[Tensor | None, Memory | None]:
        """Return the tokens [F, C] that stand in the stream, and the memory; None where there are none.

        Args:
            tokens: [F, C] of all images, view by view.
            grids: see `plan`, as are `placeholders` and `looks`.
            placeholders: bool [B, T].
            looks: who may look at a position.
            embed: token ids [t] to their embeddings [t, C].
        """
        plan = self.plan(placeholders, grids, looks)
        stream, rows = self.share(tokens, grids, embed)
        return stream, None if plan is None else Memory.of(plan.pieces, rows, plan.visible)

    def plan(self, placeholders: Tensor, grids: Sequence[Grid], looks: Looks) -> MemoryPlan | None:
        """Return what becomes a memory; None where nothing does.

        Args:
            placeholders: bool [B, T].
            grids: of the images, in the order of the stream, see `Seen`.
            looks: who may look at a position.
        """
        where = iter(placeholders.nonzero().tolist())
        pieces: list[Piece] = []
        for grid in grids:
            own = [next(where) for _ in range(self.layout.features(*grid))]
            pieces += self._pieces(grid, own)
        shape = (placeholders.shape[0], placeholders.shape[1])
        return MemoryPlan(pieces, visible_rows(pieces, shape, looks, self.fusion.sees)) if pieces else None

    def rows(self, grid: Grid) -> int:
        """Return how many rows an image of a grid gives."""
        return sum(len(tag) + tokens for tag, tokens in self._views(grid))

    def counts(self, placeholders: Tensor, grids: Sequence[Grid], looks: Looks) -> dict[str, int]:
        """Return the rows of all memories, positions that see any, and pairs of these; arguments as of `plan`."""
        plan = self.plan(placeholders, grids, looks)
        if plan is None:
            return {"memory": 0, "looking": 0, "looks": 0}
        return {
            "memory": sum(piece.size for piece in plan.pieces),
            "looking": int(plan.visible.any(-1).sum()),
            "looks": int(plan.visible.sum()),
        }

    def _pieces(self, grid: Grid, places: list[list[int]]) -> list[Piece]:
        """What an image gives, its placeholders at [row, position]."""
        row, first = places[0]
        last = places[-1][1]
        counts = [len(tag) + tokens for tag, tokens in self._views(grid)]
        if self.fusion.sees == "tile":
            marks = [mark for _, mark in places]
            return [Piece(row, mark, last, count) for mark, count in zip(marks, counts, strict=True)]
        return [Piece(row, first, last, sum(counts))] if counts else []

    def _views(self, grid: Grid) -> list[tuple[tuple[int, ...], int]]:
        """Of each view of an image that is a memory: the tag before it, and its tokens."""
        tokens = self.seeing.tokens_of(grid)
        if isinstance(self.fusion, CrossFusionConfig):
            return [((), count) for count in tokens]
        tiles = tokens[:-1]  # the whole is one more
        tags = self.fusion.tags or ((),) * len(tiles)
        return list(zip(tags, tiles, strict=False))

    def share(
        self, tokens: Tensor, grids: Sequence[Grid], embed: EmbedTokens
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the tokens [F, C] that stand in the stream, and the rows of each piece of the memory.

        Args:
            tokens: of all images, view by view.
            grids: see `plan`.
            embed: token ids [t] to their embeddings [t, C].
        """
        views = [count for grid in grids for count in self.seeing.tokens_of(grid)]
        parts = iter(tokens.split(views))
        stream: list[Tensor] = []
        rows: list[Tensor] = []
        for grid in grids:
            own = [next(parts) for _ in self.seeing.tokens_of(grid)]
            if isinstance(self.fusion, BothFusionConfig):
                stream.append(own.pop(self._whole(len(own))))
            tagged = [
                torch.cat([embed(torch.tensor(tag, device=tokens.device)), view]) if tag else view
                for (tag, _), view in zip(self._views(grid), own, strict=True)
            ]
            rows += tagged if self.fusion.sees == "tile" else [torch.cat(tagged)] if tagged else []
        return torch.cat(stream) if stream else None, rows

    def _whole(self, views: int) -> int:
        """Which view is the whole."""
        assert isinstance(self.seeing.views, CanvasViewsConfig)
        return 0 if self.seeing.views.whole == "first" else views - 1


def who_looks(length: int, rows: Rows | None, visible: Tensor | None, device: torch.device) -> Looks:
    """Return who may look at a position, in rows of so many.

    Args:
        length: T.
        rows: where rows hold several samples or branches.
        visible: bool [B, 1, T, T]; None, where there are no such rows: all that comes behind.
        device: of the batch.
    """
    time = torch.arange(length, device=device)

    def looks(row: int, place: int) -> Tensor:
        if rows is not None:
            samples, branches = rows.samples[row], rows.branches[row]
            same = (branches[place] == 0) | (branches == branches[place])
            return (samples == samples[place]) & same & (time >= place)
        return time >= place if visible is None else visible[row, 0, :, place]

    return looks

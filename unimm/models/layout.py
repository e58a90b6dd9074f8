"""The token grammar of images in the stream: the one place that knows how an image sits among the tokens.

The processor asks it which tokens to insert, the loss which positions are code positions, and the sampler
what comes next. Nothing else in the package may depend on a model family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

IGNORED = -100  # a label that no loss counts, as everywhere in transformers
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
GridSide = Annotated[int, Field(gt=0, le=2**10)]
LayoutPart = str | Sequence[int]
"""A piece of a prompt: words that are still to be tokenised, or tokens as they are."""


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """How images are written: Janus's grammar by default, Emu3's with the fields at the end.

    In Janus's an image is `begin`, its positions in raster order, `end`; codes have a vocabulary of their own. In
    Emu3's codes are tokens (`shared`), so an image to understand and one to generate are the same: `begin`, its
    rows and columns in words, `wrapper`, each row followed by `end_of_line`, `end_of_frame`, `end`.

    Attributes:
        begin: token id that opens an image; after it a drawing starts.
        end: token id that closes an image.
        feature: token id that stands where an encoder feature goes (an image to understand).
        code: token id that stands where an image code goes (an image to generate); if `shared`, that of code 0.
        grid: (rows, columns) of codes of a drawing, unless asked otherwise.
        codes: how many codes are tokens, from `code` on; 0 where codes have a vocabulary of their own.
        wrapper: token id between the size and the first code; None: no size is written.
        end_of_line: token id after each row of codes.
        end_of_frame: token id after the last row.
    """

    begin: TokenId
    end: TokenId
    feature: TokenId
    code: TokenId
    grid: Annotated[tuple[GridSide, GridSide], Field(strict=False)]
    codes: Annotated[int, Field(ge=0, le=2**22)] = 0
    wrapper: TokenId | None = None
    end_of_line: TokenId | None = None
    end_of_frame: TokenId | None = None

    @property
    def shared(self) -> bool:
        """Whether codes are tokens of the text vocabulary."""
        return self.codes > 0

    @property
    def sized(self) -> bool:
        """Whether an image says its size, so that it may have any; else all have the layout's grid."""
        return self.wrapper is not None

    @property
    def first_code(self) -> int:
        """The label of code 0."""
        return self.code if self.shared else 0

    def opening(self, rows: int, columns: int) -> list[LayoutPart]:
        """Return what comes before an image of this grid."""
        if self.wrapper is None:
            return [[self.begin]]
        return [[self.begin], f"{rows}*{columns}", [self.wrapper]]

    def closing(self) -> list[int]:
        """Return what comes after an image."""
        return [self.end] if self.end_of_frame is None else [self.end_of_frame, self.end]

    def understanding(self, rows: int, columns: int) -> list[LayoutPart]:
        """Return an image to understand, with a placeholder for each feature (Emu3: code and line end)."""
        ends = 0 if self.end_of_line is None else 1
        return [*self.opening(rows, columns), [self.feature] * (rows * (columns + ends)), self.closing()]

    def drawing_steps(self, rows: int | None = None, columns: int | None = None) -> list[int]:
        """Return what a drawing consists of after its opening, step by step.

        A step that equals `code` is drawn from the code vocabulary (and nothing else is allowed there); any
        other id is forced.
        """
        rows, columns = rows or self.grid[0], columns or self.grid[1]
        line = [self.code] * columns
        return (line if self.end_of_line is None else [*line, self.end_of_line]) * rows

    def drawing(self, codes: Tensor) -> tuple[list[int], list[int]]:
        """Return the tokens of a drawing after its opening, and their labels; forced tokens have none.

        Args:
            codes: int64 [h, w].
        """
        left = iter((codes.flatten() + self.first_code).tolist())
        steps = self.drawing_steps(codes.shape[0], codes.shape[1])
        labels = [next(left) if step == self.code else IGNORED for step in steps]
        if not self.shared:
            return steps, labels
        return [
            step if label == IGNORED else label for step, label in zip(steps, labels, strict=True)
        ], labels

    def tokens(self, codes: Tensor) -> Tensor:
        """Return the tokens of one image's codes [h, w], line ends included, where codes are tokens: [h · (w + 1)]."""
        assert self.shared and self.end_of_line is not None
        ends = codes.new_full((codes.shape[0], 1), self.end_of_line)
        return torch.cat([codes + self.code, ends], dim=1).flatten()

    def code_positions(self, input_ids: Tensor) -> Tensor:
        """Return where codes stand: bool, of the shape of `input_ids`."""
        if self.shared:
            return (input_ids >= self.code) & (input_ids < self.code + self.codes)
        return input_ids == self.code

    def feature_positions(self, input_ids: Tensor) -> Tensor:
        """Return where encoder features stand: bool, of the shape of `input_ids`."""
        return input_ids == self.feature


def shorter(tokens: int, words: int, room: int, images: bool) -> str:
    """Return what is to be done about a prompt that does not fit.

    Args:
        tokens: of the prompt.
        words: how many of them are the user's.
        room: how many there may be.
        images: whether the others are images too.
    """
    if tokens - words < room:
        return "shorten it or give fewer" if images else "shorten it"
    return "give fewer images" if images and room else "give a smaller size"

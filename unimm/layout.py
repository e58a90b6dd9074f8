"""The token grammar of images in the stream: the one place that knows how an image sits among the tokens.

The processor asks it which tokens to insert, the loss which positions are code positions, and the sampler
what comes next. Nothing else in the package may depend on a model family.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """Janus's grammar: an image is `begin`, its positions in raster order, `end`.

    Attributes:
        begin: token id that opens an image; after it a drawing starts.
        end: token id that closes an image.
        feature: token id that stands where an encoder feature goes (an image to understand).
        code: token id that stands where an image code goes (an image to generate).
        features: positions of an image to understand.
        grid: (rows, columns) of codes of a drawing, unless asked otherwise.
    """

    begin: int
    end: int
    feature: int
    code: int
    features: int
    grid: tuple[int, int]

    def understanding_tokens(self) -> list[int]:
        """Return the tokens of an image to understand."""
        return [self.begin, *[self.feature] * self.features, self.end]

    def generation_tokens(self, rows: int | None = None, columns: int | None = None) -> list[int]:
        """Return the tokens of an image to generate, with a placeholder at each code."""
        return [self.begin, *self.drawing_steps(rows, columns), self.end]

    def drawing_steps(self, rows: int | None = None, columns: int | None = None) -> list[int]:
        """Return what a drawing consists of after `begin`, step by step.

        A step that equals `code` is drawn from the code vocabulary (and nothing else is allowed there); any
        other id is forced.
        """
        return [self.code] * ((rows or self.grid[0]) * (columns or self.grid[1]))

    def code_positions(self, input_ids: Tensor) -> Tensor:
        """Return where codes stand: bool, of the shape of `input_ids`."""
        return input_ids == self.code

    def feature_positions(self, input_ids: Tensor) -> Tensor:
        """Return where encoder features stand: bool, of the shape of `input_ids`."""
        return input_ids == self.feature

"""The token grammar of images in the stream: the one place that knows how an image sits among the tokens.

The processor asks it which tokens to insert, the loss which positions are code positions, and the sampler
what comes next. Nothing else in the package may depend on a model family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from unimm.sections import read_dataclass

IGNORED = -100  # a label that no loss counts, as everywhere in transformers
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
GridSide = Annotated[int, Field(gt=0, le=2**10)]
Raster = Annotated[tuple[GridSide, GridSide], Field(strict=False)]
Tag = Annotated[str, Field(max_length=256)]
Grid: TypeAlias = tuple[int, int]
"""Rows and columns of codes, of features, of tokens or of tiles."""
ImageGrid: TypeAlias = "Grid | tuple[int, int, int]"
"""An image to understand by its grid; a video by rows of all times, columns and times."""
LayoutPart = str | Sequence[int]
"""A piece of a prompt: words that are still to be tokenised, or tokens as they are."""


@dataclasses.dataclass(frozen=True)
class PictureLayout:
    """What stands around and between the features of an image to understand, where that is more than two tokens.

    An image of one view has one raster of features. One on a canvas (see `CanvasViewsConfig`) has a raster for each
    tile, or one for all of them, and one for the whole.

    Attributes:
        opening: words before the first raster.
        closing: words after the last.
        begin: token id before each raster.
        end: token id after each raster.
        row_end: token id after each row of features.
        last_row_end: token id after the last row, where that has another.
        tile: rows and columns of features of a tile; None: there is no canvas.
        whole: of the whole image; None: as of a tile.
        whole_at: where the whole stands.
        alone: whether an image of one tile is the whole alone.
        joint: whether the tiles make one raster.
        overlap: rows and columns of a tile, at each side, that do not count in it where there is a neighbour.
        tile_tag: words before each tile, in which `{}` is its number from 1.
        whole_tag: words before the whole.
        add: whether features are added to the embedding of their placeholders, not put in its place (Molmo).
        mark: where features are a memory, what stands for them: one placeholder for an "image" or for each "tile" (and
            the whole), which is embedded as the token that it is; "none": features stand in the stream.
        apart: whether tiles are a memory and the whole alone stands in the stream (NVLM-H).
    """

    opening: Tag = ""
    closing: Tag = ""
    begin: TokenId | None = None
    end: TokenId | None = None
    row_end: TokenId | None = None
    last_row_end: TokenId | None = None
    tile: Raster | None = None
    whole: Raster | None = None
    whole_at: Literal["first", "last", "none"] = "none"
    alone: bool = False
    joint: bool = False
    overlap: Annotated[int, Field(ge=0, lt=2**10)] = 0
    tile_tag: Tag = ""
    whole_tag: Tag = ""
    add: bool = False
    mark: Literal["none", "image", "tile"] = "none"
    apart: bool = False

    def rasters(self, rows: int, columns: int) -> list[tuple[str, int, int]]:
        """Return each raster of placeholders of an image: the words before it, its rows and columns.

        Args:
            rows: of the image's features, or of its tiles where there is a canvas.
            columns: likewise.
        """
        if self.mark == "image":
            return [("", 1, 1)]
        views = [("", rows, columns)] if self.tile is None else self._on_canvas(self.tile, rows, columns)
        return [(tag, 1, 1) for tag, _, _ in views] if self.mark == "tile" else views

    def _on_canvas(self, tile: Raster, rows: int, columns: int) -> list[tuple[str, int, int]]:
        """The rasters of an image of so many tiles."""
        whole = [] if self.whole_at == "none" else [(self.whole_tag, *(self.whole or tile))]
        if self.apart or (self.alone and rows == columns == 1):
            return whole
        if self.joint:
            down, across = (
                side * count - 2 * self.overlap * (count - 1)
                for side, count in zip(tile, (rows, columns), strict=True)
            )
            tiles = [(self.tile_tag, down, across)]
        else:
            tiles = [(self.tile_tag.format(i), *tile) for i in range(1, rows * columns + 1)]
        return whole + tiles if self.whole_at == "first" else tiles + whole

    def tokens(self) -> dict[str, int | None]:
        """Return its token ids, by their names."""
        return {name: getattr(self, name) for name in ("begin", "end", "row_end", "last_row_end")}


def _read_picture(value: Any) -> Any:
    return read_dataclass(PictureLayout, value, "", "layout.picture") if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """How images are written: Janus's grammar by default, Emu3's with the fields at the end.

    In Janus's an image is `begin`, its positions in raster order, `end`; codes have a vocabulary of their own. In
    Emu3's codes are tokens (`shared`), so an image to understand and one to generate are the same: `begin`, its
    rows and columns in words, `wrapper`, each row followed by `end_of_line`, `end_of_frame`, `end`.

    Attributes:
        begin: token id that opens an image; after it a drawing starts. None: none does, and nothing is drawn.
        end: token id that closes an image, if one does.
        feature: token id that stands where an encoder feature goes (an image to understand).
        code: token id that stands where an image code goes (an image to generate); if `shared`, that of code 0.
        grid: (rows, columns) of codes of a drawing, unless asked otherwise.
        codes: how many codes are tokens, from `code` on; 0 where codes have a vocabulary of their own.
        wrapper: token id between the size and the first code; None: no size is written.
        end_of_line: token id after each row of codes.
        end_of_frame: token id after the last row.
        picture: what more stands in an image to understand.
        video: token id that stands where a feature of a video goes; None: there are no videos.
    """

    begin: TokenId | None
    end: TokenId | None
    feature: TokenId
    code: TokenId
    grid: Annotated[tuple[GridSide, GridSide], Field(strict=False)]
    codes: Annotated[int, Field(ge=0, le=2**22)] = 0
    wrapper: TokenId | None = None
    end_of_line: TokenId | None = None
    end_of_frame: TokenId | None = None
    picture: Annotated[PictureLayout, BeforeValidator(_read_picture)] | None = None
    video: TokenId | None = None

    @property
    def shared(self) -> bool:
        """Whether codes are tokens of the text vocabulary."""
        return self.codes > 0

    @property
    def placeholders(self) -> tuple[int | None, ...]:
        """Tokens that stand where features go: of an image, and of a video."""
        return self.feature, self.video

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
        begin = [] if self.begin is None else [self.begin]
        if self.wrapper is None:
            return [begin]
        return [begin, f"{rows}*{columns}", [self.wrapper]]

    def closing(self) -> list[int]:
        """Return what comes after an image."""
        return [token for token in (self.end_of_frame, self.end) if token is not None]

    def understanding(self, rows: int, columns: int, times: int = 0) -> list[LayoutPart]:
        """Return an image to understand, with a placeholder for each feature (Emu3: code and line end).

        Args:
            rows: of its features, or of its tiles where there is a canvas; of a video, those of all times.
            columns: likewise.
            times: of a video; 0: it is an image.
        """
        if times:
            assert self.video is not None
            return [*self.opening(rows, columns), [self.video] * (rows * columns), self.closing()]
        if self.picture is not None:
            return [*self.opening(rows, columns), *self._picture(self.picture, rows, columns), self.closing()]
        ends = 0 if self.end_of_line is None else 1
        return [*self.opening(rows, columns), [self.feature] * (rows * (columns + ends)), self.closing()]

    def _picture(self, picture: PictureLayout, rows: int, columns: int) -> list[LayoutPart]:
        """The rasters of an image, and what stands around them."""
        parts: list[LayoutPart] = [picture.opening]
        for tag, down, across in picture.rasters(rows, columns):
            parts += [tag, [] if picture.begin is None else [picture.begin]]
            for row in range(down):
                end = picture.row_end
                if row == down - 1 and picture.last_row_end is not None:
                    end = picture.last_row_end
                parts.append([self.feature] * across + ([] if end is None else [end]))
            parts.append([] if picture.end is None else [picture.end])
        return [part for part in [*parts, picture.closing] if part]

    def rasters(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Return rows and columns of the placeholders of an image to understand, raster by raster."""
        if self.picture is None:
            return [(rows, columns + (self.end_of_line is not None))]
        return [(down, across) for _, down, across in self.picture.rasters(rows, columns)]

    def features(self, rows: int, columns: int) -> int:
        """Return how many placeholders an image to understand has; arguments as those of `understanding`."""
        return sum(down * across for down, across in self.rasters(rows, columns))

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
        of_images = input_ids == self.feature
        return of_images if self.video is None else of_images | (input_ids == self.video)


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

"""Synthetic tables by random access: table `i` of a split depends on nothing but the settings, the seed and `i`.

Splits: `train`; `seen` (sizes, styles and fonts as trained, contents held out); `larger` (more columns or rows than
trained); `font` (font families held out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unimm.data.tables.content import TableContent, TableQuestion, draw_content
from unimm.data.tables.fonts import HELD_OUT_FONTS, TRAINED_FONTS
from unimm.data.tables.markup import to_latex, to_markdown
from unimm.data.tables.settings import (
    TABLE_SPLITS,
    MarkupName,
    TableLimits,
    TableSettings,
    TableSplit,
)
from unimm.data.tables.style import EDGE_MARGIN, TableGrid, TableStyle, draw_style, fit_style, render_table
from unimm.errors import UserError

ENDLESS_TABLES = 2**40
TRIES = 100  # contents that do not fit before a size is given up


@dataclass(frozen=True)
class SyntheticTable:
    """One table before it is drawn.

    Attributes:
        content: what stands in it.
        style: how it looks.
        size: width and height of its image.
        corner: where in it the table's top left corner is.
    """

    content: TableContent
    style: TableStyle
    size: tuple[int, int]
    corner: tuple[int, int]

    def render(self) -> NDArray[np.uint8]:
        """Draw the table as RGB [H, W, 3]."""
        return render_table(self.content, self.style, self.size, self.corner)

    def image(self) -> Image.Image:
        """Return the drawing as a Pillow image."""
        return Image.fromarray(self.render())

    def text(self, markup: MarkupName) -> str:
        """Return the table as Markdown or LaTeX."""
        cells = self.content.cells
        return (
            to_markdown(cells) if markup == "markdown" else to_latex(cells, self.style.letters(self.content))
        )

    def questions(self) -> list[TableQuestion]:
        """Return every question that the table answers."""
        return self.content.questions()


class SyntheticTables(Sequence[SyntheticTable]):
    """A split of the tables as a seeded, indexable source.

    Args:
        split: train, seen, larger or font.
        seed: another seed is another sample.
        settings: which tables.
        length: how many.

    Raises:
        ValueError: an unknown split.
        UserError: matplotlib, which brings the fonts, is missing.
    """

    def __init__(
        self,
        split: TableSplit,
        seed: int = 0,
        settings: TableSettings | None = None,
        length: int = ENDLESS_TABLES,
    ) -> None:
        if split not in TABLE_SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(TABLE_SPLITS)}")
        self.split, self.seed, self.length = split, seed, length
        self.limits: TableLimits = (settings or TableSettings()).limits()
        self.families = HELD_OUT_FONTS if split == "font" else TRAINED_FONTS
        self.most = self.limits.larger_most if split == "larger" else self.limits.most

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> SyntheticTable:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(f"table {index} of {self.length}")
        rng = np.random.default_rng([self.seed, TABLE_SPLITS.index(self.split), int(index)])
        # The shape is drawn once and kept, so that rejection below cannot shift the ratio of sizes.
        rows, columns = self._shape(rng)
        misfits = 0
        while misfits < TRIES:
            content = draw_content(rng, rows, columns, self.limits)
            if not self._belongs(content):
                continue
            style = fit_style(content, draw_style(rng, self.families, self.limits), self.most)
            if style is not None:
                return self._placed(rng, content, style)
            misfits += 1
        raise UserError(
            f"tables: {columns} x {rows} cells do not fit {self.most[0]} x {self.most[1]} pixels; give a larger size, "
            "fewer columns or rows, or shorter words"
        )

    def _shape(self, rng: np.random.Generator) -> tuple[int, int]:
        """Rows and columns."""
        limits = self.limits
        trained = limits.rows[1], limits.columns[1]
        most = trained
        if self.split == "larger":
            most = max(trained[0], limits.larger[1]), max(trained[1], limits.larger[0])
        while True:
            rows = int(rng.integers(limits.rows[0], most[0] + 1))
            columns = int(rng.integers(limits.columns[0], most[1] + 1))
            if self.split != "larger" or rows > trained[0] or columns > trained[1]:
                return rows, columns

    def _belongs(self, content: TableContent) -> bool:
        if self.split in ("train", "seen"):
            return content.is_held_out() == (self.split == "seen")
        return True

    def _placed(self, rng: np.random.Generator, content: TableContent, style: TableStyle) -> SyntheticTable:
        """A table somewhere on an image that is large enough."""
        own = TableGrid(content, style).size
        size, corner = [], []
        page = rng.random() < self.limits.pages
        for axis in range(2):
            room = EDGE_MARGIN + round(style.font_size * float(rng.uniform(0, 1)))
            wanted = int(rng.integers(own[axis], self.most[axis] + 1)) if page else own[axis] + 2 * room
            pixels = min(max(wanted, own[axis] + 2 * EDGE_MARGIN, self.limits.least[axis]), self.most[axis])
            size.append(pixels)
            corner.append(int(rng.integers(EDGE_MARGIN, pixels - own[axis] - EDGE_MARGIN + 1)))
        return SyntheticTable(content, style, (size[0], size[1]), (corner[0], corner[1]))

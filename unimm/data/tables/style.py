"""How a synthetic table looks, and the drawing of it with Pillow: every pixel follows from content, style and key."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unimm.data.tables.content import WORDS, TableContent
from unimm.data.tables.fonts import load_font
from unimm.data.tables.settings import SMALLEST_FONT, TableLimits

RuleKind = Literal["grid", "lines", "head", "booktabs", "none"]
ShadingKind = Literal["none", "head", "dark head", "stripes"]
AlignmentKind = Literal["left", "center", "right", "by kind"]
RULE_KINDS: tuple[RuleKind, ...] = ("grid", "lines", "head", "booktabs", "none")
SHADING_KINDS: tuple[ShadingKind, ...] = ("none", "head", "dark head", "stripes")
ALIGNMENT_KINDS: tuple[AlignmentKind, ...] = ("left", "center", "right", "by kind")
PAPERS = ("#ffffff", "#fdfbf5", "#f4f6f8", "#f6f2ea")
INKS = ("#000000", "#1c1f26", "#1d2a4a", "#33302c")
SHADES = ("#dfe3e8", "#d8e6f5", "#dcefdd", "#efe4cf", "#f3dcdc")
DARK_SHADES = ("#24344d", "#2f4a36", "#4a2f3a", "#3b3b3b")
LIGHT_INK = "#ffffff"  # on a dark head
EDGE_MARGIN = 3  # pixels around a table at least
MOST_NOISE = 7.0  # standard deviation in levels of 255
JPEG_QUALITY = (60, 95)


@dataclass(frozen=True)
class TableStyle:
    """How a table looks.

    Attributes:
        family: one of `FONT_FAMILIES`.
        font_size: pixels.
        bold_head: whether the head is bold.
        rules: which lines are drawn.
        thickness: pixels of a line.
        shading: what is behind the head or every other row.
        alignment: how cells stand in their columns.
        padding: pixels at the left and right, and above and below a cell's text.
        paper: colour of the image.
        ink: of text and lines.
        shade: of the shading.
        noise: standard deviation of the noise; 0: none.
        quality: of the JPEG that the image went through; None: none.
        key: seeds the noise.
    """

    family: str
    font_size: int
    bold_head: bool
    rules: RuleKind
    thickness: int
    shading: ShadingKind
    alignment: AlignmentKind
    padding: tuple[int, int]
    paper: str
    ink: str
    shade: str
    noise: float
    quality: int | None
    key: int

    def letters(self, content: TableContent) -> str:
        """Return l, c or r for each column."""
        if self.alignment != "by kind":
            return self.alignment[0] * len(content.kinds)
        return "".join("l" if kind == WORDS else "r" for kind in content.kinds)


def draw_style(rng: np.random.Generator, families: Sequence[str], limits: TableLimits) -> TableStyle:
    """Draw a style of one of these font families."""

    def one(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    size = int(rng.integers(limits.font_size[0], limits.font_size[1] + 1))
    shading = SHADING_KINDS[rng.integers(len(SHADING_KINDS))]
    return TableStyle(
        family=one(families),
        font_size=size,
        bold_head=bool(rng.random() < 0.5),
        rules=RULE_KINDS[rng.integers(len(RULE_KINDS))],
        thickness=1 if size < 18 else int(rng.integers(1, 3)),
        shading=shading,
        alignment=ALIGNMENT_KINDS[rng.integers(len(ALIGNMENT_KINDS))],
        padding=(round(size * rng.uniform(0.3, 0.8)), round(size * rng.uniform(0.1, 0.5))),
        paper=one(PAPERS),
        ink=one(INKS),
        shade=one(DARK_SHADES if shading == "dark head" else SHADES),
        noise=float(rng.uniform(0, MOST_NOISE)) if limits.degraded and rng.random() < 0.5 else 0.0,
        quality=int(rng.integers(*JPEG_QUALITY)) if limits.degraded and rng.random() < 0.5 else None,
        key=int(rng.integers(2**31)),
    )


class TableGrid:
    """Where everything of a table stands, from its own top left corner.

    Args:
        content: what stands in it.
        style: how it looks.
    """

    def __init__(self, content: TableContent, style: TableStyle) -> None:
        self.head = load_font(style.family, style.bold_head, style.font_size)
        self.body = load_font(style.family, False, style.font_size)
        across, above = style.padding
        widths = [
            max(round(self.font(row).getlength(text)) for row, text in enumerate(column)) + 2 * across
            for column in zip(*content.cells, strict=True)
        ]
        self.ascent, descent = (
            max(values) for values in zip(self.head.getmetrics(), self.body.getmetrics(), strict=True)
        )
        heights = [self.ascent + descent + 2 * above] * len(content.cells)
        self.columns = [0, *itertools.accumulate(widths)]
        self.rows = [0, *itertools.accumulate(heights)]

    def font(self, row: int) -> ImageFont.FreeTypeFont:
        """The face of a row."""
        return self.body if row else self.head

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, an outer line not counted."""
        return self.columns[-1], self.rows[-1]


def fit_style(content: TableContent, style: TableStyle, most: tuple[int, int]) -> TableStyle | None:
    """Return the style with the largest font, no larger than its own, at which a table fits an image.

    Args:
        content: what stands in the table.
        style: how it looks.
        most: width and height of the image.

    Returns:
        None where it does not fit even with the smallest font.
    """
    for size in range(style.font_size, SMALLEST_FONT - 1, -1):
        scale = size / style.font_size
        across, above = (round(pixels * scale) for pixels in style.padding)
        for padding in ((across, above), (min(across, 3), min(above, 1))):
            smaller = replace(style, font_size=size, padding=padding)
            width, height = TableGrid(content, smaller).size
            if width + 2 * EDGE_MARGIN <= most[0] and height + 2 * EDGE_MARGIN <= most[1]:
                return smaller
    return None


def render_table(
    content: TableContent, style: TableStyle, size: tuple[int, int], corner: tuple[int, int]
) -> NDArray[np.uint8]:
    """Draw a table.

    Args:
        content: what stands in it.
        style: how it looks.
        size: width and height of the image.
        corner: where the table's top left corner is.

    Returns:
        RGB [H, W, 3].
    """
    image = Image.new("RGB", size, style.paper)
    pen = ImageDraw.Draw(image)
    grid = TableGrid(content, style)
    columns = [corner[0] + x for x in grid.columns]
    rows = [corner[1] + y for y in grid.rows]
    _shade(pen, style, columns, rows)
    _rule(pen, style, columns, rows)
    letters = style.letters(content)
    for row, texts in enumerate(content.cells):
        fill = LIGHT_INK if row == 0 and style.shading == "dark head" else style.ink
        base = rows[row] + style.padding[1] + grid.ascent
        for column, text in enumerate(texts):
            free = columns[column + 1] - columns[column] - round(grid.font(row).getlength(text))
            left = {"l": style.padding[0], "c": free // 2, "r": free - style.padding[0]}[letters[column]]
            pen.text((columns[column] + left, base), text, fill=fill, font=grid.font(row), anchor="ls")
    return _degrade(image, style)


def _shade(pen: ImageDraw.ImageDraw, style: TableStyle, columns: list[int], rows: list[int]) -> None:
    count = len(rows) - 1
    shaded = {"none": range(0), "head": range(1), "dark head": range(1), "stripes": range(1, count, 2)}
    for row in shaded[style.shading]:
        pen.rectangle((columns[0], rows[row], columns[-1] - 1, rows[row + 1] - 1), fill=style.shade)


def _rule(pen: ImageDraw.ImageDraw, style: TableStyle, columns: list[int], rows: list[int]) -> None:
    """Draw the lines; those of the outer edge lie inside of the table."""
    levels = {
        "grid": rows,
        "lines": rows,
        "head": rows[1:2],
        "booktabs": [rows[0], rows[min(1, len(rows) - 1)], rows[-1]],
        "none": [],
    }[style.rules]
    for y in levels:
        top = min(y, rows[-1] - style.thickness)
        pen.rectangle((columns[0], top, columns[-1] - 1, top + style.thickness - 1), fill=style.ink)
    for x in columns if style.rules == "grid" else ():
        left = min(x, columns[-1] - style.thickness)
        pen.rectangle((left, rows[0], left + style.thickness - 1, rows[-1] - 1), fill=style.ink)


def _degrade(image: Image.Image, style: TableStyle) -> NDArray[np.uint8]:
    """Add the noise and what JPEG does to the image."""
    pixels = np.asarray(image)
    if style.noise:
        noise = np.random.default_rng(style.key).normal(0, style.noise, (*pixels.shape[:2], 1))
        pixels = np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    if style.quality is not None:
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "JPEG", quality=style.quality)
        pixels = np.asarray(Image.open(packed).convert("RGB"))
    return np.ascontiguousarray(pixels)

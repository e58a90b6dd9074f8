"""Contact sheets: images on cards with text under them, in titled sections, drawn with Pillow alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

SHEET_COLUMNS = 6
IMAGE_WIDTH = 192  # width of an image on the sheet, in pixels
PADDING = 14  # inside a card
CARD_GAP = 18  # between cards
SHEET_MARGIN = 44  # around the sheet
TEXT, LEADING = 16, 21  # size of the text under images, and from line to line
PAGE, CARD, BORDER = "#f3f4f7", "#ffffff", "#dfe2e8"
INK, MUTED, GOOD, BAD, ACCENT = "#1c2030", "#6d7385", "#1a7f45", "#c0392b", "#3a4cc0"
COLOURS = {"text": INK, "muted": MUTED, "good": GOOD, "bad": BAD}


@dataclass(frozen=True)
class Line:
    """A paragraph under an image; `style` is one of text, muted, good, bad."""

    text: str
    style: str = "text"


@dataclass(frozen=True)
class Card:
    """Images side by side (usually one) and what is said about them."""

    images: Sequence[Image.Image]
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class SheetSection:
    """A titled group of cards."""

    title: str
    cards: Sequence[Card]
    note: str = ""


@dataclass
class _Pen:
    """Where the next thing goes on a sheet that grows downwards."""

    image: Image.Image
    y: int = SHEET_MARGIN
    draw: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)


def draw_sheet(
    title: str, subtitle: str, sections: Sequence[SheetSection], columns: int = SHEET_COLUMNS
) -> Image.Image:
    """Draw a contact sheet.

    Args:
        title: the head line.
        subtitle: a line under it.
        sections: what to show; the cards of a section flow in rows of `columns` images.
        columns: images in a row; a card of k images is k columns wide.

    Returns:
        An RGB image, as high as its contents need.
    """
    width = 2 * SHEET_MARGIN + columns * (IMAGE_WIDTH + 2 * PADDING) + (columns - 1) * CARD_GAP
    rows = [(section, _rows(section.cards, columns)) for section in sections]
    height = 2 * SHEET_MARGIN + 96 + sum(_section_height(section, packed) for section, packed in rows)
    pen = _Pen(Image.new("RGB", (width, height), PAGE))
    pen.draw.text((SHEET_MARGIN, pen.y), title, fill=INK, font=_font(38))
    pen.draw.text((SHEET_MARGIN, pen.y + 54), subtitle, fill=MUTED, font=_font(18))
    pen.y += 96
    for section, packed in rows:
        _draw_section(pen, section, packed)
    return pen.image


def _draw_section(pen: _Pen, section: SheetSection, rows: list[list[Card]]) -> None:
    """Draw a section's title, note and rows of cards, and move the pen below them."""
    pen.y += 16
    pen.draw.rectangle((SHEET_MARGIN, pen.y + 4, SHEET_MARGIN + 5, pen.y + 28), fill=ACCENT)
    pen.draw.text((SHEET_MARGIN + 18, pen.y), section.title, fill=INK, font=_font(25))
    offset = SHEET_MARGIN + 18 + round(pen.draw.textlength(section.title, font=_font(25))) + 14
    pen.draw.text((offset, pen.y + 9), section.note, fill=MUTED, font=_font(16))
    pen.y += 44
    for row in rows:
        height = max(_card_height(card) for card in row)
        x = SHEET_MARGIN
        for card in row:
            _draw_card(pen.draw, pen.image, card, (x, pen.y), height)
            x += _card_width(card) + CARD_GAP
        pen.y += height + CARD_GAP


def _draw_card(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, card: Card, corner: tuple[int, int], height: int
) -> None:
    """Draw one card with its upper left corner at `corner`."""
    x, y = corner
    draw.rounded_rectangle(
        (x, y, x + _card_width(card) - 1, y + height - 1), radius=12, fill=CARD, outline=BORDER
    )
    left, y = x + PADDING, y + PADDING
    for image in card.images:
        shown = _scaled(image)
        mask = Image.new("L", shown.size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, *(side - 1 for side in shown.size)), radius=8, fill=255)
        sheet.paste(shown, (left, y), mask)
        left += IMAGE_WIDTH + 2 * PADDING + CARD_GAP
    y += max((_scaled(image).height for image in card.images), default=0) + 10
    for line in card.lines:
        for part in _wrap(line.text, _text_width(card)):
            draw.text((x + PADDING, y), part, fill=COLOURS[line.style], font=_font(TEXT))
            y += LEADING
        y += 3


def _rows(cards: Sequence[Card], columns: int) -> list[list[Card]]:
    """Break cards into rows of at most `columns` images."""
    rows: list[list[Card]] = []
    room = 0
    for card in cards:
        need = max(1, len(card.images))
        if not rows or need > room:
            rows.append([])
            room = columns
        rows[-1].append(card)
        room -= need
    return rows


def _section_height(section: SheetSection, rows: list[list[Card]]) -> int:
    """Height that `_draw_section` will use."""
    return 16 + 44 + sum(max(_card_height(card) for card in row) + CARD_GAP for row in rows)


def _card_height(card: Card) -> int:
    """Height of a card with its text wrapped."""
    images = max((_scaled(image).height for image in card.images), default=0)
    text = sum(LEADING * len(_wrap(line.text, _text_width(card))) + 3 for line in card.lines)
    return PADDING + images + 10 + text + PADDING - 6


def _card_width(card: Card) -> int:
    """Width of a card: so many whole columns as it has images."""
    columns = max(1, len(card.images))
    return columns * (IMAGE_WIDTH + 2 * PADDING) + (columns - 1) * CARD_GAP


def _text_width(card: Card) -> int:
    """Width of the text under a card's images."""
    return _card_width(card) - 2 * PADDING


def _scaled(image: Image.Image) -> Image.Image:
    """Bring an image to the width of a column."""
    height = max(1, round(image.height * IMAGE_WIDTH / image.width))
    return image.convert("RGB").resize((IMAGE_WIDTH, height), Image.Resampling.LANCZOS)


def _wrap(text: str, width: int) -> list[str]:
    """Break text at spaces into lines of at most `width` pixels; a longer word is cut anywhere."""
    font = _font(TEXT)
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
            if not word:
                break
        lines.extend([word] if word else [])
    return lines or [""]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that a sheet looks the same on every machine."""
    return ImageFont.load_default(size)

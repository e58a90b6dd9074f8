"""A contact sheet of synthetic tables at their own size, with what is asked of them."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from unimm.data.tables.settings import TableSettings, TableSplit
from unimm.data.tables.tables import SyntheticTable, SyntheticTables
from unimm.sheet import CARD, INK, MUTED, PAGE

TABLE_CARDS = 12
SHEET_LANES = 3
LANE_WIDTH = 640  # pixels; wider images are brought to it
LANE_GAP = 16
LINE_HEIGHT = 18


def table_sheet(
    split: TableSplit = "train", seed: int = 0, settings: TableSettings | None = None
) -> Image.Image:
    """Draw the first tables of a split.

    Args:
        split: train, seen, larger or font.
        seed: another seed is another sample.
        settings: which tables.

    Raises:
        ValueError: an unknown split.
        UserError: matplotlib, which brings the fonts, is missing.
    """
    cards = [_card(table) for table in SyntheticTables(split, seed, settings, TABLE_CARDS)]
    ends = [LANE_GAP] * SHEET_LANES
    places = []
    for card in cards:
        lane = ends.index(min(ends))
        places.append((LANE_GAP + lane * (LANE_WIDTH + LANE_GAP), ends[lane]))
        ends[lane] += card.height + LANE_GAP
    sheet = Image.new("RGB", (SHEET_LANES * (LANE_WIDTH + LANE_GAP) + LANE_GAP, max(ends)), PAGE)
    for card, place in zip(cards, places, strict=True):
        sheet.paste(card, place)
    return sheet


def _card(table: SyntheticTable) -> Image.Image:
    """A table, and under it one question of each kind."""
    image = table.image()
    if image.width > LANE_WIDTH:
        height = round(image.height * LANE_WIDTH / image.width)
        image = image.resize((LANE_WIDTH, height), Image.Resampling.LANCZOS)
    rows, columns = table.content.shape
    about = f"{columns} x {rows} cells, {table.size[0]} x {table.size[1]} pixels, {table.style.family}"
    by_kind = {one.kind: one for one in table.questions()}
    lines = [(f"{one.question}  {one.answer}", INK) for one in by_kind.values()] + [(about, MUTED)]
    card = Image.new("RGB", (LANE_WIDTH, image.height + LINE_HEIGHT * len(lines) + 12), CARD)
    card.paste(image)
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(13)
    for number, (text, colour) in enumerate(lines):
        pen.text((8, image.height + 6 + LINE_HEIGHT * number), text, fill=colour, font=font)
    return card

"""Synthetic tables: the same table from its index, splits that keep their promise, and pictures that show it all."""

from __future__ import annotations

import hashlib
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unimm.data.tables import fonts
from unimm.data.tables.content import WORDS
from unimm.data.tables.fonts import FONT_FAMILIES, HELD_OUT_FONTS, TRAINED_FONTS, font_folder, load_font
from unimm.data.tables.preview import table_sheet
from unimm.data.tables.settings import TABLE_SPLITS, TableSettings, TableSplit
from unimm.data.tables.style import ALIGNMENT_KINDS, RULE_KINDS, SHADING_KINDS, TableGrid, render_table
from unimm.data.tables.tables import SyntheticTable, SyntheticTables
from unimm.data.tables.vocabulary import NUMBER_HEADS, TOPICS, WORD_HEADS
from unimm.errors import UserError
from unimm.sections import validate

SAMPLES = 300
SMALL = TableSettings(difficulty="small")
SETTINGS = {"full": TableSettings(), "small": SMALL}


def first(
    split: TableSplit, count: int = SAMPLES, settings: TableSettings | None = None
) -> list[SyntheticTable]:
    tables = SyntheticTables(split, 0, settings)
    return [tables[index] for index in range(count)]


@pytest.fixture(scope="module", params=["full", "small"])
def splits(request: pytest.FixtureRequest) -> tuple[TableSettings, dict[str, list[SyntheticTable]]]:
    settings = SETTINGS[request.param]
    return settings, {split: first(split, settings=settings) for split in TABLE_SPLITS}


def digest(table: SyntheticTable) -> str:
    return hashlib.sha256(table.render().tobytes()).hexdigest()


@pytest.mark.parametrize("difficulty", SETTINGS)
@pytest.mark.parametrize("split", TABLE_SPLITS)
def test_a_table_follows_from_its_index_bit_for_bit(split: TableSplit, difficulty: str) -> None:
    tables, again = (SyntheticTables(split, 3, SETTINGS[difficulty]) for _ in range(2))
    backwards = [again[index] for index in reversed(range(6))][::-1]
    assert [tables[index] for index in range(6)] == backwards
    assert [digest(tables[index]) for index in range(6)] == [digest(table) for table in backwards]
    other = SyntheticTables(split, 4, SETTINGS[difficulty])
    assert all(other[index] != tables[index] for index in range(6))


def test_what_a_table_is_does_not_change() -> None:
    """Tables of earlier runs can be drawn again; where this is to change, results on tables have to be made anew."""
    assert SyntheticTables("train", 0, SMALL)[0].text("markdown").splitlines() == [
        "| City | Width | Goals |", "|---|---|---|", "| gold | 2 | 729 |", "| coral | 394 | 846 |",
        "| grey | 857 | 175 |", "| amber | 554 | 89 |", "| ivory | 33 | 863 |",
    ]  # fmt: skip
    assert SyntheticTables("seen", 1)[5].text("latex").splitlines() == [
        r"\begin{tabular}{ccccc}", r"Material & Color & Votes & Item & Pages \\", r"\hline",
        r"cow & red & \$702 & miner & \$0 \\", r"\end{tabular}",
    ]  # fmt: skip


def test_splits_hold_what_training_never_shows(
    splits: tuple[TableSettings, dict[str, list[SyntheticTable]]],
) -> None:
    settings, found = splits
    limits = settings.limits()
    contents = {split: {table.content.cells for table in tables} for split, tables in found.items()}
    for split in ("seen", "larger", "font"):
        assert not contents[split] & contents["train"]
    for split, tables in found.items():
        families = {table.style.family for table in tables}
        assert families == set(HELD_OUT_FONTS if split == "font" else TRAINED_FONTS)
        for table in tables:
            rows, columns = table.content.shape
            trained = rows <= limits.rows[1] and columns <= limits.columns[1]
            assert trained == (split != "larger")
            assert table.content.is_held_out() or split != "seen"
            assert not table.content.is_held_out() or split != "train"


def test_fonts_of_the_held_out_split_are_of_other_files() -> None:
    held_out = {file for family in HELD_OUT_FONTS for file in FONT_FAMILIES[family]}
    trained = {file for family in TRAINED_FONTS for file in FONT_FAMILIES[family]}
    assert held_out and trained and not held_out & trained


def test_sizes_lie_within_bounds_and_reach_them(
    splits: tuple[TableSettings, dict[str, list[SyntheticTable]]],
) -> None:
    settings, found = splits
    limits = settings.limits()
    for split, tables in found.items():
        most = limits.larger_most if split == "larger" else limits.most
        for table in tables:
            assert all(limits.least[axis] <= table.size[axis] <= most[axis] for axis in range(2))
            own = TableGrid(table.content, table.style).size
            for axis in range(2):  # nothing is cut off
                assert table.corner[axis] > 0 and table.corner[axis] + own[axis] < table.size[axis]
        shapes = Counter(table.content.shape for table in tables)
        columns, rows = limits.larger if split == "larger" else (limits.columns[1], limits.rows[1])
        assert max(shape[0] for shape in shapes) == rows and max(shape[1] for shape in shapes) == columns
        assert min(shape[0] for shape in shapes) == 2 and min(shape[1] for shape in shapes) == 2
    if settings.difficulty == "full":
        sizes = np.array([table.size for tables in found.values() for table in tables])
        assert sizes.min(0).tolist() == [320, 200]
        assert (sizes.max(0) > (1100, 1450)).all()


def test_every_feature_of_style_and_content_occurs(
    splits: tuple[TableSettings, dict[str, list[SyntheticTable]]],
) -> None:
    settings, found = splits
    limits = settings.limits()
    for tables in found.values():
        styles = [table.style for table in tables]
        assert {style.rules for style in styles} == set(RULE_KINDS)
        assert {style.shading for style in styles} == set(SHADING_KINDS)
        assert {style.alignment for style in styles} == set(ALIGNMENT_KINDS)
        assert {style.bold_head for style in styles} == {True, False}
        assert 0.3 < np.mean([style.noise > 0 for style in styles]) < 0.7
        assert 0.3 < np.mean([style.quality is not None for style in styles]) < 0.7
        assert {kind for table in tables for kind in table.content.kinds} == {WORDS, *limits.numbers}
        assert {one.kind for table in tables for one in table.questions()} == {"cell", "row", "sum"}


@pytest.mark.parametrize("split", TABLE_SPLITS)
def test_each_cell_is_drawn_whole_in_its_place(split: TableSplit) -> None:
    """Where a cell is emptied, pixels change inside of it and nowhere else; so it was there, and not cut off."""
    for table in first(split, 6, TableSettings(degraded=False)):
        grid = TableGrid(table.content, table.style)
        whole = table.render().astype(int)
        for row, texts in enumerate(table.content.cells):
            for column in range(len(texts)):
                emptied = render_without(table, row, column)
                ys, xs = np.nonzero((whole != emptied).any(-1))
                left, top = table.corner
                assert len(xs) > 10
                assert grid.columns[column] <= xs.min() - left and xs.max() - left < grid.columns[column + 1]
                assert grid.rows[row] <= ys.min() - top and ys.max() - top < grid.rows[row + 1]


def render_without(table: SyntheticTable, row: int, column: int) -> Any:
    """The drawing without the text of a cell, on the same grid."""

    plain = ImageDraw.ImageDraw.text
    number = row * len(table.content.kinds) + column
    calls = iter(range(10_000))

    def skip(self: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls) != number:
            plain(self, *args, **kwargs)

    with patch.object(ImageDraw.ImageDraw, "text", skip):
        return render_table(table.content, table.style, table.size, table.corner).astype(int)


def test_every_font_draws_every_letter_that_is_used() -> None:
    used = sorted(
        set("".join([*WORD_HEADS, *NUMBER_HEADS, *(word for words in TOPICS.values() for word in words)]))
    )
    letters = [*used, *(letter.upper() for letter in used), *"0123456789.%$"]
    for family in FONT_FAMILIES:
        for bold in (False, True):
            font = load_font(family, bold, 24)
            unknown = bytes(font.getmask("\uffff"))
            drawn = {letter: bytes(font.getmask(letter)) for letter in letters}
            assert all(any(pixels) and pixels != unknown for pixels in drawn.values())
            assert len(set(drawn.values())) == len(letters), family  # each has a shape of its own


def test_questions_are_true_of_what_the_table_says() -> None:
    for table in first("train", 100):
        head, *body = table.content.cells
        named = {row[0]: row for row in body}
        assert len(named) == len(body) and len(set(head)) == len(head)
        for kind, question, answer in table.questions():
            if kind == "row":
                assert answer.split(" | ") == list(named[question.removeprefix("read the row of ")])
            elif kind == "cell":
                column, _, row = question.removeprefix("what is the ").removesuffix("?").partition(" of ")
                assert named[row][head.index(column)] == answer
            else:
                column = head.index(question.removeprefix("what is the sum of ").removesuffix("?"))
                assert sum(Decimal(row[column]) for row in body) == Decimal(answer)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"difficulty": "hard"}, "difficulty: "),
        ({"columns": [4, 2]}, r"columns: expected the least first, got \[4, 2\]"),
        ({"columns": [0, 2]}, "columns"),
        ({"rows": [2, 12], "columns": [2, 8]},
         r"larger: expected more columns or rows than \[8, 12\], got \[8, 12\]"),
        ({"most": [100, 100]}, "most: expected a width of at least 320, as least has it, got 100"),
        ({"larger_most": [320, 100]}, "larger_most: expected a height of at least 200, as least has it, got 100"),
        ({"font_size": [4, 20]}, "font_size: expected at least 8, got 4"),
        ({"formats": [], "questions": 0}, "formats: none, and no questions either; give one of markdown, latex"),
        ({"formats": ["html"]}, "formats"),
        ({"formats": ["latex", "latex"]}, "formats: expected each once"),
        ({"word_length": [12, 20]}, "word_length: no word has 12 to 20 letters"),
        ({"cells": 3}, "cells: unknown key"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        validate(TableSettings, settings, "recipe.yaml", "data.tables")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("recipe.yaml: data.tables")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"words": 3}, "rows, but no topic has"),
        ({"columns": [9, 9], "larger": [10, 9], "word_length": [3, 4], "numbers": []}, "9 columns, but"),
        ({"least": [40, 40], "most": [60, 60], "larger_most": [60, 60]}, "do not fit 60 x 60 pixels; give"),
    ],
)
def test_tables_that_cannot_be_are_named_in_one_line(settings: dict[str, Any], line: str) -> None:
    tables = SyntheticTables("train", 0, TableSettings.model_validate(settings))
    with pytest.raises(UserError, match=line) as caught:
        for index in range(60):
            tables[index]
    assert "\n" not in str(caught.value)


def test_an_unknown_split_or_index_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train, seen, larger, font"):
        SyntheticTables("test")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="table 3 of 3"):
        SyntheticTables("train", length=3)[3]


def test_fonts_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fonts, "font_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"tables: .*DejaVuSans\.ttf: not readable as a font"):
        load_font.__wrapped__("DejaVu Sans", False, 12)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"come with matplotlib; install it with: pip install 'unimm\[tables\]'"
    ):
        font_folder.__wrapped__()


def test_the_sheet_shows_a_dozen_tables() -> None:
    sheet = table_sheet("larger", 1, SMALL)
    assert sheet.mode == "RGB" and sheet.width == 3 * 656 + 16
    table = SyntheticTables("larger", 1, SMALL)[0]
    corner = sheet.crop((16, 16, 16 + table.size[0], 16 + table.size[1]))
    assert isinstance(corner, Image.Image)
    np.testing.assert_array_equal(np.asarray(corner), table.render())

"""Tables as Markdown and LaTeX: what is written is read back, by other readers too, and damage costs what it should."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from unimm.data.tables.content import Cells
from unimm.data.tables.markup import cells_right, read_cells, to_latex, to_markdown
from unimm.data.tables.settings import MarkupName, TableSettings
from unimm.data.tables.tables import SyntheticTables

TABLE: Cells = (("Item", "Price"), ("pear", "$3"), ("a|b & c", "12.5%"))
MARKDOWN = "| Item | Price |\n|---|---|\n| pear | $3 |\n| a\\|b & c | 12.5% |"
LATEX = "\\begin{tabular}{lr}\nItem & Price \\\\\n\\hline\npear & \\$3 \\\\\na|b \\& c & 12.5\\% \\\\\n\\end{tabular}"


def by_markdown_it(text: str) -> Cells:
    """The cells as markdown-it reads them, which renders GitHub's own Markdown."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert [token.type for token in tokens[:1]] == ["table_open"] and tokens[-1].type == "table_close"
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token.content)
    return tuple(map(tuple, rows))


def by_letters(text: str) -> Cells:
    """The cells of a LaTeX table, read letter by letter as TeX does: a backslash takes what follows it."""
    opening = re.fullmatch(r"\\begin\{tabular\}\{([lcr]+)\}\n(.*)\n\\end\{tabular\}", text, re.DOTALL)
    assert opening is not None
    letters, rows, cells, cell = iter(opening[2]), [], [], ""
    for letter in letters:
        if letter == "&":
            cells, cell = [*cells, cell.strip()], ""
        elif letter != "\\":
            cell += letter
        elif (follows := next(letters)) == "\\":
            rows.append((*cells, cell.strip()))
            cells, cell = [], ""
        elif follows == "h":
            assert "".join(next(letters) for _ in range(4)) == "line" and not cells and not cell.strip()
            cell = ""
        else:
            assert follows in "&%$#_{}"
            cell += follows
    assert not cells and not cell.strip()
    assert {len(row) for row in rows} == {len(opening[1])}
    return tuple(rows)


def test_both_formats_by_hand() -> None:
    assert to_markdown(TABLE) == MARKDOWN and to_latex(TABLE, "lr") == LATEX
    assert read_cells(MARKDOWN, "markdown") == TABLE == read_cells(LATEX, "latex")
    assert by_letters(LATEX) == TABLE and by_markdown_it(MARKDOWN.replace("\\|", "!"))[1:] == (
        ("pear", "$3"), ("a!b & c", "12.5%")
    )  # fmt: skip


@pytest.mark.parametrize("difficulty", ["full", "small"])
def test_answers_are_read_back_by_others(difficulty: str) -> None:
    tables = SyntheticTables("larger", 0, TableSettings.model_validate({"difficulty": difficulty}))
    for index in range(80):
        table = tables[index]
        markdown, latex = table.text("markdown"), table.text("latex")
        assert by_markdown_it(markdown) == table.content.cells == read_cells(markdown, "markdown")
        assert by_letters(latex) == table.content.cells == read_cells(latex, "latex")


@pytest.mark.parametrize(
    ("text", "markup", "cells"),
    [
        ("", "markdown", ()),
        ("no table here", "markdown", ()),
        ("Here it is:\n\n| a | b |\n| :-- | --: |\n| 1 | 2 |\n\nDone.", "markdown", (("a", "b"), ("1", "2"))),
        ("a | b\n--|--\n1 | 2", "markdown", (("a", "b"), ("1", "2"))),
        ("| a | b |\n| 1 |\n| 2 | 3 | 4", "markdown", (("a", "b"), ("1",), ("2", "3", "4"))),
        ("| a | |\n|---|---|\n| | b |", "markdown", (("a", ""), ("", "b"))),
        ("", "latex", ()),
        ("I see no table.", "latex", ()),
        ("a & b \\\\ 1 & 2", "latex", (("a", "b"), ("1", "2"))),
        ("Sure.\n\\begin{tabular}[t]{l|r}\n\\toprule a & b\\\\ \\midrule\n1&2\\\\\\bottomrule\\end{tabular} A & B.",
         "latex", (("a", "b"), ("1", "2"))),
        ("\\begin{tabular}{ll} a & \\\\ & b \\\\", "latex", (("a", ""), ("", "b"))),
    ],
)  # fmt: skip
def test_damaged_answers_give_the_cells_that_they_have(text: str, markup: MarkupName, cells: Cells) -> None:
    assert read_cells(text, markup) == cells


def test_cells_count_in_their_places() -> None:
    wanted: Cells = (("a", "b"), ("1", "2"), ("3", "4"))
    assert cells_right(wanted, wanted) == 6
    assert (
        cells_right(wanted, (("a", "b"), ("3", "4"))) == 2
    )  # a row is missing: what follows is out of place
    assert cells_right(wanted, (("a",), ("1", "2", "9"), ("3", "5"), ("6",))) == 4
    assert cells_right(wanted, ()) == 0

"""What stands in a synthetic table, and what can be asked of it: nothing here is drawn.

A table has a head and rows below it. Its first column holds words, each once, so that a row can be named by it; the
others hold words or numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from unimm.data.tables.settings import MarkupName, NumberKind, TableLimits, TableQuestionKind
from unimm.data.tables.vocabulary import column_heads, words_by_topic
from unimm.errors import UserError

Cells = tuple[tuple[str, ...], ...]
"""Rows of cells, the head first."""
ColumnKind = NumberKind | str
WORDS = "words"  # the kind of a column that holds words
NUMBER_SHARE = 0.6  # of the columns after the first
HELD_OUT_TABLES = 12  # one table in twelve is kept for `seen`, by what stands in it
TRANSCRIPTION_REQUESTS: dict[MarkupName, tuple[str, ...]] = {
    "markdown": ("write the table as Markdown",),
    "latex": ("write the table as LaTeX",),
}


class TableQuestion(NamedTuple):
    """A question about a table; `kind` is cell, row or sum."""

    kind: TableQuestionKind
    question: str
    answer: str


@dataclass(frozen=True)
class TableContent:
    """What stands in a table.

    Attributes:
        cells: all rows, the head first.
        kinds: of each column: `WORDS`, or the kind of its numbers.
    """

    cells: Cells
    kinds: tuple[ColumnKind, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, the head among them, and columns."""
        return len(self.cells), len(self.kinds)

    def is_held_out(self) -> bool:
        """Whether a table with these contents is kept for the split `seen`."""
        text = "\n".join("|".join(row) for row in self.cells)
        return zlib.crc32(text.encode()) % HELD_OUT_TABLES == 0

    def questions(self) -> list[TableQuestion]:
        """Return every question that the table answers."""
        head, *body = self.cells
        found = [
            TableQuestion("cell", f"what is the {head[column]} of {row[0]}?", row[column])
            for row in body
            for column in range(1, len(head))
        ]
        found += [TableQuestion("row", f"read the row of {row[0]}", " | ".join(row)) for row in body]
        found += [
            TableQuestion("sum", f"what is the sum of {head[column]}?", _sum([row[column] for row in body]))
            for column, kind in enumerate(self.kinds)
            if kind in ("integer", "decimal") and len(body) > 1
        ]
        return found


def _sum(numbers: list[str]) -> str:
    return str(sum(map(Decimal, numbers), Decimal(0)))


def draw_content(rng: np.random.Generator, rows: int, columns: int, limits: TableLimits) -> TableContent:
    """Draw what stands in a table.

    Args:
        rng: where random numbers come from.
        rows: of the table, the head among them.
        columns: of the table.
        limits: which words and numbers there are.

    Raises:
        UserError: there are too few words for so many rows or columns.
    """
    kinds = [WORDS] + [_column_kind(rng, limits) for _ in range(columns - 1)]
    capital = bool(rng.random() < 0.5)
    head = _heads(rng, kinds, limits)
    topics = words_by_topic(limits.word_length, limits.words)
    body = [
        _column(rng, kind, rows - 1, topics, limits, unique=place == 0) for place, kind in enumerate(kinds)
    ]
    if capital:
        head = [name.capitalize() for name in head]
    return TableContent((tuple(head), *zip(*body, strict=True)), tuple(kinds))


def _column_kind(rng: np.random.Generator, limits: TableLimits) -> ColumnKind:
    if not limits.numbers or rng.random() >= NUMBER_SHARE:
        return WORDS
    return limits.numbers[rng.integers(len(limits.numbers))]


def _heads(rng: np.random.Generator, kinds: list[ColumnKind], limits: TableLimits) -> list[str]:
    """Names of the columns, each once."""
    found: dict[int, str] = {}
    for numbers in (False, True):
        places = [place for place, kind in enumerate(kinds) if (kind != WORDS) == numbers]
        known = column_heads(limits.word_length, numbers)
        if len(places) > len(known):
            raise UserError(
                f"tables: {len(places)} columns, but {len(known)} heads of up to {limits.word_length[1]} letters; "
                "give a larger word_length, or fewer columns"
            )
        chosen = rng.choice(len(known), len(places), replace=False)
        found |= {place: known[number] for place, number in zip(places, chosen, strict=True)}
    return [found[place] for place in range(len(kinds))]


def _column(
    rng: np.random.Generator,
    kind: ColumnKind,
    count: int,
    topics: dict[str, tuple[str, ...]],
    limits: TableLimits,
    unique: bool,
) -> list[str]:
    """The cells of a column below its head; those of the first are all different."""
    if kind != WORDS:
        return [
            _number(rng, kind, limits.digits, size) for size in [int(rng.integers(limits.digits)) + 1] * count
        ]
    enough = [words for words in topics.values() if len(words) >= count] if unique else list(topics.values())
    if not enough:
        raise UserError(
            f"tables: {count + 1} rows, but no topic has {count} words of {limits.word_length[0]} to "
            f"{limits.word_length[1]} letters; give more words, or fewer rows"
        )
    words = enough[rng.integers(len(enough))]
    return [words[number] for number in rng.choice(len(words), count, replace=not unique)]


def _number(rng: np.random.Generator, kind: ColumnKind, most: int, digits: int) -> str:
    """A number of up to so many digits before its point."""
    if kind == "percent":
        return f"{rng.integers(0, 1000) / 10:.1f}%"
    whole = str(rng.integers(0, 10 ** min(most, digits)))
    if kind == "integer":
        return whole
    return f"{whole}.{rng.integers(0, 10)}" if kind == "decimal" else f"${whole}"

"""Scores of one answer: of a table that was asked for as Markdown or LaTeX, and of a question about it."""

from __future__ import annotations

from dataclasses import dataclass

from unimm.data.tables.content import Cells
from unimm.data.tables.markup import cells_right, read_cells
from unimm.data.tables.settings import MarkupName
from unimm.evaluation.tables.similarity import table_similarity


@dataclass(frozen=True)
class TableVerdict:
    """What is right of a table that was read.

    Attributes:
        right: cells that are in their places as they should be.
        cells: how many there are.
        similarity: of the trees of both tables, 1 at most (`table_similarity`).
    """

    right: int
    cells: int
    similarity: float

    @property
    def whole(self) -> bool:
        """Whether all of it is right, and nothing is there besides."""
        return self.similarity == 1.0


def score_table(expected: Cells, answer: str, markup: MarkupName) -> TableVerdict:
    """Score an answer that should be a table.

    Args:
        expected: the cells of the right one, the head first.
        answer: what a model said.
        markup: what it was asked to write.

    Raises:
        UserError: a package of the extra `tables` is missing.
    """
    cells = read_cells(answer, markup)
    return TableVerdict(
        cells_right(expected, cells), sum(map(len, expected)), table_similarity(expected, cells)
    )


def answered_rightly(expected: str, answer: str) -> bool:
    """Whether an answer to a question about a table is the right one, blanks aside."""
    return " ".join(answer.split()) == " ".join(expected.split())

"""Tables as Markdown and as LaTeX, and back into cells.

Reading forgives what a model gets wrong: rows of unlike lengths, a rule that is missing, text around the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from unimm.data.tables.content import Cells
from unimm.data.tables.settings import MarkupName

_MARKDOWN_RULE = re.compile(r":?-+:?")
_LATEX_SPECIAL = re.compile(r"([&%$#_{}])")
_LATEX_RULES = re.compile(r"\\(hline|toprule|midrule|bottomrule)\b|\\cline\{[^}]*\}")
_LATEX_CLOSING = re.compile(
    r"\\end\b|(?<!\\)\\(?:e|en)?$"
)  # or the beginning of it, where an answer breaks off
_LATEX_OPENING = re.compile(r"\\begin\{tabular\}(?:\[[^]]*\])?\{[^}]*\}")


def to_markdown(cells: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown (GFM): its head, a rule and its rows."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def to_latex(cells: Sequence[Sequence[str]], alignment: str) -> str:
    """Write a table as LaTeX: its head, a rule and its rows.

    Args:
        cells: rows, the head first.
        alignment: l, c or r for each column.
    """
    lines = [" & ".join(_LATEX_SPECIAL.sub(r"\\\1", cell) for cell in row) + r" \\" for row in cells]
    return "\n".join(
        [rf"\begin{{tabular}}{{{alignment}}}", lines[0], r"\hline", *lines[1:], r"\end{tabular}"]
    )


def read_cells(text: str, markup: MarkupName) -> Cells:
    """Return the cells of an answer, the head first; none where it has no table."""
    return _read_markdown(text) if markup == "markdown" else _read_latex(text)


def _read_markdown(text: str) -> Cells:
    rows = []
    for line in text.splitlines():
        if "|" not in line:
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())]
        cells = cells[not cells[0] : len(cells) - (not cells[-1])]
        if cells and not all(_MARKDOWN_RULE.fullmatch(cell) for cell in cells):
            rows.append(tuple(cells))
    return tuple(rows)


def _read_latex(text: str) -> Cells:
    inside = _LATEX_CLOSING.split(_LATEX_OPENING.split(text, maxsplit=1)[-1], maxsplit=1)[0]
    if "&" not in inside and r"\\" not in inside:
        return ()
    rows = []
    for line in _LATEX_RULES.sub(" ", inside).split(r"\\"):
        if line.strip():
            cells = re.split(r"(?<!\\)&", line)
            rows.append(tuple(re.sub(r"\\([&%$#_{}])", r"\1", cell).strip() for cell in cells))
    return tuple(rows)


def cells_right(expected: Cells, answer: Cells) -> int:
    """Return how many cells an answer has in their places as they should be, blanks around them aside."""
    return sum(
        wanted.strip() == given.strip()
        for rows in zip(expected, answer, strict=False)
        for wanted, given in zip(*rows, strict=False)
    )

"""How alike two tables are: tree edit distance, as the literature on table recognition has it (TEDS).

A table is a tree of its head and body, their rows, and the cells of these. Inserting or deleting a node costs 1; a cell
that says something else costs the edit distance of the texts by the length of the longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unimm.data.tables.content import Cells
from unimm.errors import UserError


@dataclass
class TableNode:
    """A node of a table's tree: its tag, a cell's text, and what is below it."""

    tag: str
    text: str = ""
    children: list[TableNode] = field(default_factory=list)

    def count(self) -> int:
        """Nodes of the tree from here on."""
        return 1 + sum(child.count() for child in self.children)


def table_tree(cells: Cells) -> TableNode:
    """Return a table as a tree: its head, where it has rows, and its body, where it has more."""
    rows = [TableNode("tr", "", [TableNode("td", text) for text in row]) for row in cells]
    parts = [TableNode("thead", "", rows[:1])] if rows else []
    parts += [TableNode("tbody", "", rows[1:])] if rows[1:] else []
    return TableNode("table", "", parts)


def table_similarity(expected: Cells, answer: Cells) -> float:
    """Return how alike two tables are: 1 less their edit distance by the nodes of the larger, the roots not counted.

    It is 1 where they are the same, and below 0 where so little of one is in the other that both are changed nearly
    whole; published code does not cut it there either.

    Raises:
        UserError: `apted` or `rapidfuzz` is not installed.

    Source: Zhong et al. 2020, "Image-based table recognition", arXiv 1911.10683, section 6.
    """
    try:
        from apted import APTED, Config
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError(
            "tables: needs apted and rapidfuzz; install them with: pip install 'unimm[tables]'"
        ) from None

    class TableCosts(Config):  # type: ignore[misc]
        """What it costs to make one node of another."""

        def rename(self, one: TableNode, other: TableNode) -> float:
            if one.tag != other.tag:
                return 1.0
            return float(Levenshtein.normalized_distance(one.text, other.text))

        def children(self, node: TableNode) -> list[Any]:
            return list(node.children)

    if expected == answer:
        return 1.0
    trees = table_tree(expected), table_tree(answer)
    nodes = max(tree.count() - 1 for tree in trees)
    distance: float = APTED(*trees, TableCosts()).compute_edit_distance()
    return 1.0 - distance / nodes if nodes else 1.0

"""Tables that were read, scored: known values by hand, damaged answers, and a model that is asked."""

from __future__ import annotations

from typing import Any

import pytest

from unimm.data.tables.content import Cells
from unimm.data.tables.markup import to_latex, to_markdown
from unimm.data.tables.settings import MarkupName, TableSettings
from unimm.data.tables.tables import SyntheticTables
from unimm.errors import UserError
from unimm.evaluation.recipe import TablesSection
from unimm.evaluation.tables.reading import evaluate_tables, questions_of, table_figures
from unimm.evaluation.tables.score import TableVerdict, answered_rightly, score_table
from unimm.evaluation.tables.similarity import table_similarity, table_tree

TABLE: Cells = (("item", "price"), ("pear", "3"), ("fig", "12"))
# Nodes below the root: head, body, 3 rows, 6 cells.
NODES = 11


def test_a_table_is_a_tree_of_its_rows() -> None:
    assert table_tree(TABLE).count() == NODES + 1
    assert [part.tag for part in table_tree(TABLE).children] == ["thead", "tbody"]
    assert table_tree(()).count() == 1 and table_tree(TABLE[:1]).count() == 5


@pytest.mark.parametrize(
    ("answer", "similarity"),
    [
        (TABLE, 1.0),
        ((("item", "price"), ("pear", "3"), ("fig", "13")), 1 - 0.5 / NODES),  # one of two letters
        ((("item", "price"), ("pear", "3"), ("fig", "")), 1 - 1 / NODES),
        ((("item", "price"), ("pear", "3")), 1 - 3 / NODES),  # a row and its two cells
        ((("item", "price"),), 1 - 7 / NODES),  # the body with its two rows
        ((), 0.0),
        ((("item", "price"), ("pear", "3"), ("plum", "7"), ("fig", "12")), 1 - 3 / (NODES + 3)),
        ((("item", "price"), ("pear", "3", "kg"), ("fig", "12")), 1 - 1 / (NODES + 1)),
        ((("item",), ("pear",), ("fig",)), 1 - 3 / NODES),
        # two cells are changed, eight are new, and the body goes: more than either has nodes
        (((*"xxxxxxxxxx",),), 1 - (2 + 8 + 7) / 12),
        # head and first row in each other's place: item/pear 3 of 4 letters, price/3 all
        ((("pear", "3"), ("item", "price"), ("fig", "12")), 1 - 2 * (1 + 1) / NODES),
    ],
)
def test_similarity_by_hand(answer: Cells, similarity: float) -> None:
    assert table_similarity(TABLE, answer) == pytest.approx(similarity, abs=1e-9)
    assert table_similarity(answer, TABLE) == pytest.approx(similarity, abs=1e-9)


def test_a_table_of_nothing() -> None:
    assert table_similarity((), ()) == 1.0 and table_similarity((), TABLE) == 0.0


@pytest.mark.parametrize("markup", ["markdown", "latex"])
def test_right_answers_are_right_and_damage_costs(markup: MarkupName) -> None:
    text = to_markdown(TABLE) if markup == "markdown" else to_latex(TABLE, "lr")
    assert score_table(TABLE, text, markup) == TableVerdict(6, 6, 1.0)
    assert score_table(TABLE, f"Here it is:\n\n{text}\n", markup).whole
    wrong = score_table(TABLE, text.replace("12", "13"), markup)
    assert (wrong.right, wrong.cells, wrong.whole) == (5, 6, False)
    assert wrong.similarity == pytest.approx(1 - 0.5 / NODES)
    lines = text.splitlines()
    cut = score_table(TABLE, "\n".join(line for line in lines if "pear" not in line), markup)
    assert (cut.right, cut.similarity) == (2, pytest.approx(1 - 3 / NODES))
    for damaged in ("", "I see no table.", text[:3]):
        assert score_table(TABLE, damaged, markup).right == 0
    previous = 2.0
    for end in range(len(text), 0, -4):  # an answer that breaks off is never better than one that goes on
        verdict = score_table(TABLE, text[:end], markup)
        assert 0.0 <= verdict.similarity <= 1.0 and verdict.similarity <= previous + 1 / NODES
        previous = verdict.similarity


def test_every_right_answer_of_every_split_is_whole() -> None:
    for split in ("seen", "larger", "font"):
        tables = SyntheticTables(split, 3)  # type: ignore[arg-type]
        for table in (tables[index] for index in range(10)):
            for markup in ("markdown", "latex"):
                assert score_table(table.content.cells, table.text(markup), markup).whole  # type: ignore[arg-type]


def test_answers_are_exact_but_for_blanks() -> None:
    assert answered_rightly("pear | 3", " pear |  3\n") and answered_rightly("12.5%", "12.5%")
    assert (
        not answered_rightly("12", "12.0")
        and not answered_rightly("pear", "Pear")
        and not answered_rightly("3", "")
    )


def test_figures_by_hand() -> None:
    figures = table_figures([TableVerdict(6, 6, 1.0), TableVerdict(3, 6, 0.5)])
    assert (figures["cells"]["right"], figures["cells"]["count"]) == (9, 12)
    assert (figures["tables"]["right"], figures["tables"]["count"], figures["similarity"]) == (1, 2, 0.75)
    assert table_figures([])["similarity"] == 0.0


def test_questions_are_of_every_kind_as_often_as_wanted() -> None:
    tables = [SyntheticTables("seen")[index] for index in range(30)]
    chosen = questions_of(tables, ("cell", "sum"), 5)
    kinds = [question.kind for _, question in chosen]
    assert kinds.count("cell") == 5 and kinds.count("sum") == 5 and "row" not in kinds
    assert len({id(table) for table, question in chosen if question.kind == "cell"}) == 5
    assert all(question in table.questions() for table, question in chosen)


class Reader:
    """What is asked of a model here, answered rightly but for every second table; `asked` holds the questions."""

    def __init__(self, tables: list[Any]) -> None:
        self.known = {table.image().tobytes(): table for table in tables}
        self.asked: list[str] = []
        self.processor = self
        self.room: list[int] = []

    def text_ids(self, text: str) -> list[int]:
        return list(text.encode())

    def ask(self, images: list[Any], questions: list[str], room: int) -> list[str]:
        self.asked += questions
        self.room.append(room)
        answers = []
        for image, question in zip(images, questions, strict=True):
            table = self.known[image.tobytes()]
            right = {one.question: one.answer for one in table.questions()}
            right["write the table as Markdown"] = table.text("markdown")
            right["write the table as LaTeX"] = table.text("latex")
            answers.append(right[question] if table.content.shape[0] % 2 else "nothing")
        return answers


def test_a_reader_of_half_of_the_tables_gets_what_is_due() -> None:
    """Each split is asked for in both formats and questioned; what the reader reads is right, all else is not."""
    recipe = TablesSection(samples=30, questions=12, splits=["seen", "font"], settings=TableSettings())
    found = {split: list(SyntheticTables(split, 9, length=30)) for split in ("seen", "font")}  # type: ignore[arg-type]
    reader = Reader([table for tables in found.values() for table in tables])
    report = evaluate_tables(reader, recipe, 9)  # type: ignore[arg-type]
    assert list(report) == ["seen", "font"]
    for split, tables in found.items():
        odd = [table for table in tables if table.content.shape[0] % 2]
        for markup in ("markdown", "latex"):
            figures = report[split][markup]
            assert figures["tables"]["right"] == len(odd) and figures["tables"]["count"] == 30
            assert figures["cells"]["right"] == sum(
                table.content.shape[0] * table.content.shape[1] for table in odd
            )
            assert figures["similarity"] == pytest.approx(len(odd) / 30, abs=1e-4)
        chosen = questions_of(tables, ("cell", "row", "sum"), 12)
        right = [table.content.shape[0] % 2 for table, _ in chosen]
        assert report[split]["answers"]["all"]["right"] == sum(right)
        assert report[split]["answers"]["row"]["count"] == 12
    assert reader.asked.count("write the table as LaTeX") == 60
    assert min(reader.room) > 8


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "apted", None)
    with pytest.raises(
        UserError, match=r"tables: needs apted and rapidfuzz; install them with: pip install 'unimm\[tab"
    ):
        table_similarity(TABLE, ())

"""Reading of held-out tables: each is asked for in each format, and questions of every kind are asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unimm.data.tables.content import TRANSCRIPTION_REQUESTS, TableQuestion
from unimm.data.tables.settings import MarkupName, TableSplit
from unimm.data.tables.tables import SyntheticTable, SyntheticTables
from unimm.evaluation.emojiscenes.batches import batches
from unimm.evaluation.recipe import TablesSection
from unimm.evaluation.score import Score
from unimm.evaluation.tables.score import TableVerdict, answered_rightly, score_table

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

SPARE_SHARE = 1.25  # of the longest right answer's tokens: a model that does not end is cut there
ANSWER_ROOM = 8  # tokens that any answer has besides


def evaluate_tables(um: UniMM, recipe: TablesSection, seed: int) -> dict[str, Any]:
    """Read held-out tables and answer questions about them.

    Returns:
        For each split and format the scores `cells` and `tables` (all of it right) and the mean `similarity`; for each
        kind of question, and `all` together, the score of the answers.

    Raises:
        UserError: a package of the extra `tables` is missing, or the settings allow no table.
    """
    return {split: _evaluate_split(um, split, recipe, seed) for split in recipe.splits}


def _evaluate_split(um: UniMM, split: TableSplit, recipe: TablesSection, seed: int) -> dict[str, Any]:
    limits = recipe.settings.limits()
    tables = list(SyntheticTables(split, seed, recipe.settings, recipe.samples))
    report: dict[str, Any] = {
        markup: table_figures(_read(um, tables, markup, f"tables, {split}, {markup}"))
        for markup in limits.formats
    }
    if limits.asked and recipe.questions:
        report["answers"] = _answers(um, tables, recipe, f"tables, {split}, questions")
    return report


def _read(um: UniMM, tables: Sequence[SyntheticTable], markup: MarkupName, title: str) -> list[TableVerdict]:
    verdicts = []
    request, room = TRANSCRIPTION_REQUESTS[markup][0], _room(um, [table.text(markup) for table in tables])
    for indices in batches(len(tables), title):
        shown = [tables[index] for index in indices]
        answers = um.ask([table.image() for table in shown], [request] * len(shown), room)
        verdicts += [
            score_table(table.content.cells, answer, markup)
            for table, answer in zip(shown, answers, strict=True)
        ]
    return verdicts


def table_figures(verdicts: Sequence[TableVerdict]) -> dict[str, Any]:
    """Return the figures of tables that were read, as plain numbers."""
    return {
        "cells": Score(sum(one.right for one in verdicts), sum(one.cells for one in verdicts)).document(),
        "tables": Score.of(one.whole for one in verdicts).document(),
        "similarity": round(sum(one.similarity for one in verdicts) / max(len(verdicts), 1), 4),
    }


def questions_of(
    tables: Sequence[SyntheticTable], kinds: Sequence[str], per_kind: int
) -> list[tuple[SyntheticTable, TableQuestion]]:
    """Return questions of each kind, one of a table and kind until there are so many, or no table is left."""
    left = dict.fromkeys(kinds, per_kind)
    chosen = []
    for number, table in enumerate(tables):
        for kind in kinds:
            listed = [one for one in table.questions() if one.kind == kind]
            if listed and left[kind]:
                left[kind] -= 1
                chosen.append((table, listed[number % len(listed)]))
    return chosen


def _answers(
    um: UniMM, tables: Sequence[SyntheticTable], recipe: TablesSection, title: str
) -> dict[str, Any]:
    kinds = recipe.settings.limits().asked
    chosen = questions_of(tables, kinds, recipe.questions)
    verdicts: dict[str, list[bool]] = {kind: [] for kind in kinds}
    room = _room(um, [question.answer for _, question in chosen])
    for indices in batches(len(chosen), title):
        asked = [chosen[index] for index in indices]
        answers = um.ask(
            [table.image() for table, _ in asked], [question.question for _, question in asked], room
        )
        for (_, question), answer in zip(asked, answers, strict=True):
            verdicts[question.kind].append(answered_rightly(question.answer, answer))
    together = Score.of(verdict for listed in verdicts.values() for verdict in listed)
    return {"all": together.document()} | {
        kind: Score.of(listed).document() for kind, listed in verdicts.items()
    }


def _room(um: UniMM, texts: Sequence[str]) -> int:
    """Tokens that an answer may have."""
    longest = max((len(um.processor.text_ids(text)) for text in texts), default=0)
    return round(longest * SPARE_SHARE) + ANSWER_ROOM

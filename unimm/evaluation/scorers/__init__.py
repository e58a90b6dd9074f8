"""The scorers of protocols, by name: what one answer is worth, and what the answers of a data set come to.

A scorer's version is in the protocol and in every result; it rises with any change that may change a score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.bootstrap import ScoreTable, Summary
from unimm.evaluation.emojiscenes.questions import is_right
from unimm.evaluation.items import LETTERS
from unimm.evaluation.protocol import EvaluationProtocol
from unimm.evaluation.scorers import summaries
from unimm.evaluation.scorers.choices import first_letter, mmbench_letter, mmmu_letter, mmmu_open
from unimm.evaluation.scorers.texts import anls, exact_answer, relaxed_accuracy
from unimm.evaluation.scorers.vqa import textvqa_accuracy, vqa_accuracy
from unimm.evaluation.scorers.yesno import exact_word, mme_word, pope_word
from unimm.evaluation.tables.score import answered_rightly, score_table
from unimm.sections import near

Scored = dict[str, Any]
"""What is said of one answer: `score`, usually from 0 to 1, and what it was taken for (`read`, null: nothing)."""


@dataclass(frozen=True)
class BenchmarkScorer:
    """How one data set is scored.

    Attributes:
        score: the fields of an item, its choices' words, an answer and the protocol's rule -> what is said of it;
            None where a judge says it (drawings, MM-Vet) or only all answers together have a score (captions).
        summarise: the figures of scored items by their weights.
        main: the figure that stands for all.
        version: of this code.
        rules: those that a protocol may name.
    """

    score: Callable[[Mapping[str, Any], tuple[str, ...], str, str | None], Scored] | None
    summarise: Callable[[ScoreTable], Summary]
    main: str
    version: int = 1
    rules: tuple[str, ...] = ()


def _people(fields: Mapping[str, Any]) -> list[str]:
    """What people answered: texts, or objects with an `answer`."""
    return [
        str(one["answer"]) if isinstance(one, Mapping) else str(one) for one in _listed(fields, "answers")
    ]


def _listed(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if value is None:
        raise UserError(f"{name}: missing; this split has no right answers")
    return list(value) if isinstance(value, list) else [value]


def _wanted(fields: Mapping[str, Any]) -> str:
    return str(_listed(fields, "answer")[0])


def _letter(read: str | None, fields: Mapping[str, Any]) -> Scored:
    return {"score": float(read == _wanted(fields)), "read": read}


def _word(read: str, fields: Mapping[str, Any]) -> Scored:
    return {"score": float(read == _wanted(fields).lower().strip().replace(".", "")), "read": read}


def _mmmu(fields: Mapping[str, Any], choices: tuple[str, ...], answer: str, rule: str | None) -> Scored:
    if choices:
        return _letter(mmmu_letter(answer, choices), fields)
    return {
        "score": float(mmmu_open(answer, [str(one) for one in _listed(fields, "answer")])),
        "read": answer,
    }


def _table(fields: Mapping[str, Any], choices: tuple[str, ...], answer: str, rule: str | None) -> Scored:
    verdict = score_table(fields["answer"], answer, fields["category"])
    return {"score": verdict.similarity, "right": verdict.right, "cells": verdict.cells}


BENCHMARK_SCORERS: dict[str, BenchmarkScorer] = {
    "vqav2": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": vqa_accuracy(answer, _people(fields))},
        summaries.means("accuracy"), "accuracy",
    ),
    "textvqa": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": textvqa_accuracy(answer, _people(fields))},
        summaries.means("accuracy"), "accuracy",
    ),
    "anls": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": anls(answer, _people(fields))},
        summaries.means("anls"), "anls",
    ),
    "chartqa": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": relaxed_accuracy(answer, _wanted(fields))},
        summaries.means("relaxed_accuracy"), "relaxed_accuracy",
    ),
    "exact": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": exact_answer(answer, _wanted(fields))},
        summaries.means("accuracy"), "accuracy",
    ),
    "emojiscenes": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": float(is_right(answer, _wanted(fields)))},
        summaries.means("accuracy"), "accuracy",
    ),
    "tables": BenchmarkScorer(_table, summaries.tables, "cells"),
    "table-answers": BenchmarkScorer(
        lambda fields, choices, answer, rule: {"score": float(answered_rightly(_wanted(fields), answer))},
        summaries.means("accuracy"), "accuracy",
    ),
    "seedbench": BenchmarkScorer(
        lambda fields, choices, answer, rule: _letter(first_letter(answer), fields),
        summaries.means("accuracy"), "accuracy",
    ),
    "mmbench": BenchmarkScorer(
        lambda fields, choices, answer, rule: _letter(mmbench_letter(answer, choices), fields),
        summaries.mmbench, "circular",
    ),
    "mmmu": BenchmarkScorer(_mmmu, summaries.means("accuracy"), "accuracy"),
    "pope": BenchmarkScorer(
        lambda fields, choices, answer, rule: _word(
            exact_word(answer) if rule == "exact" else pope_word(answer), fields
        ),
        summaries.pope, "f1", rules=("pope", "exact"),
    ),
    "mme": BenchmarkScorer(
        lambda fields, choices, answer, rule: _word(mme_word(answer), fields), summaries.mme, "perception",
    ),
    "cider": BenchmarkScorer(None, summaries.means("cider"), "cider", rules=("words", "ptb")),
    "mmvet": BenchmarkScorer(None, summaries.mmvet, "total"),
    "geneval": BenchmarkScorer(None, summaries.geneval, "overall"),
    "geneval2": BenchmarkScorer(None, summaries.geneval2, "soft_tifa_gm"),
    "dpg": BenchmarkScorer(None, summaries.dpg, "dpg"),
    "wise": BenchmarkScorer(None, summaries.wise, "wiscore"),
    "compbench": BenchmarkScorer(None, summaries.means("score"), "score"),
    "clipscore": BenchmarkScorer(None, summaries.means("clipscore"), "clipscore"),
    "fid": BenchmarkScorer(None, summaries.fid, "fid"),
}  # fmt: skip


def scorer_of(protocol: EvaluationProtocol) -> BenchmarkScorer:
    """The scorer that a protocol names.

    Raises:
        UserError: there is none of that name or rule, or the protocol wants another version than this code is.
    """
    name, source = protocol.scorer.name, protocol.name
    scorer = BENCHMARK_SCORERS.get(name)
    if scorer is None:
        known = ", ".join(BENCHMARK_SCORERS)
        raise UserError(
            f"{source}: scorer.name: {name!r}; give one of {known}{near(name, BENCHMARK_SCORERS)}"
        )
    if protocol.scorer.version != scorer.version:
        raise UserError(
            f"{source}: scorer.version: {protocol.scorer.version}, but this unimm has version {scorer.version} of "
            f"{name}; its scores may differ"
        )
    if protocol.scorer.rule is not None and protocol.scorer.rule not in scorer.rules:
        known = ", ".join(scorer.rules) or "none"
        raise UserError(f"{source}: scorer.rule: {protocol.scorer.rule!r}; {name} has {known}")
    return scorer


def score_answer(
    protocol: EvaluationProtocol, fields: Mapping[str, Any], choices: tuple[str, ...], answer: str
) -> Scored:
    """What an answer is worth; nothing where a judge or all answers together say it.

    Raises:
        UserError: the item has no right answer.
    """
    scorer = scorer_of(protocol)
    if scorer.score is None:
        return {}
    given = protocol.answer
    if given is not None and given.by == "likelihood":
        wanted = _wanted(fields)
        if wanted not in LETTERS[: len(choices)]:
            wanted = LETTERS[choices.index(wanted)] if wanted in choices else wanted
        if protocol.scorer.name in ("pope", "mme"):
            return _word(choices[LETTERS.index(answer)], fields)
        return {"score": float(answer == wanted), "read": answer}
    return scorer.score(fields, choices, answer, protocol.scorer.rule)

"""What judges say of drawings, as their benchmarks count it: DPG-Bench's questions, GenEval 2's atoms, WISE's marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.rows import Columns

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WISE_RANGES = {
    "cultural": range(1, 401), "time": range(401, 568), "space": range(568, 701), "biology": range(701, 801),
    "physics": range(801, 901), "chemistry": range(901, 1001),
}  # fmt: skip
_MARK = re.compile(r"\*{0,2}(consistency|realism|aesthetic quality)\*{0,2}\s*[::]?\s*(\d)", re.IGNORECASE)
PromptQuestions = list[dict[str, Any]]


def dpg_questions(rows: Sequence[Columns]) -> dict[str, PromptQuestions]:
    """Prompt's name -> its questions, of the rows of dpg_bench.csv.

    Raises:
        UserError: a row has no number or dependency that can be read.
    """
    found: dict[str, PromptQuestions] = {}
    for number, row in enumerate(rows, 1):
        try:
            question = {
                "id": int(row["proposition_id"]),
                "question": row["question_natural_language"],
                "category": str(row["tuple"]).partition("(")[0].strip(),
                "parents": [int(part) for part in str(row["dependency"]).split(",")],
            }
        except (KeyError, ValueError) as error:
            raise UserError(f"question {number} of a prompt: {error}") from None
        found.setdefault(str(row["item_id"]), []).append(question)
    return found


def dpg_score(questions: PromptQuestions, crops: Sequence[Mapping[int, bool]]) -> dict[str, Any]:
    """What the answers about an image's crops are worth.

    Args:
        questions: of the prompt.
        crops: for each crop, number of a question -> whether the answer is yes.

    Returns:
        `score`, the mean over crops of the share of yes, no where a parent is no; `questions`, category and answer of
        each by the last crop.
    """
    shares = []
    for answers in crops:
        counted = {one["id"]: bool(answers[one["id"]]) for one in questions}
        for one in questions:  # in their order: a no reaches what hangs on what hangs on it
            if any(parent and not counted[parent] for parent in one["parents"]):
                counted[one["id"]] = False
        shares.append(sum(counted.values()) / len(counted))
    last = [[one["category"], int(bool(crops[-1][one["id"]]))] for one in questions]
    return {"score": sum(shares) / len(shares), "questions": last}


def atom_answers(question: str, answer: str) -> list[str]:
    """The words that GenEval 2 counts as a right answer: a number as word or digit, else yes."""
    if not question.startswith("How many"):
        return ["yes", "Yes"]
    digits = [str(NUMBER_WORDS.index(answer))] if answer in NUMBER_WORDS else []
    return [answer, answer.capitalize(), *digits]


def wise_category(prompt_id: int) -> str:
    """The category of a prompt of WISE.

    Raises:
        UserError: there is no such prompt.
    """
    for name, numbers in WISE_RANGES.items():
        if prompt_id in numbers:
            return name
    raise UserError(f"prompt_id: {prompt_id}; WISE has 1 to 1000")


def wise_marks(text: str) -> dict[str, float] | None:
    """The three marks from 0 to 2 in a judge's words; None where one is missing."""
    found = {name.lower().split()[0]: float(mark) for name, mark in _MARK.findall(text)}
    if set(found) != {"consistency", "realism", "aesthetic"} or any(mark > 2 for mark in found.values()):
        return None
    return found

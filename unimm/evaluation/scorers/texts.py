"""Scores of short answers in words: ANLS (DocVQA), relaxed accuracy (ChartQA), and equality (GQA)."""

from __future__ import annotations

import string
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED = 0.05  # of the right number
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
    costs = list(range(len(second) + 1))
    for row, one in enumerate(first, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(second, 1):
            best = min(costs[column] + 1, costs[column - 1] + 1, before + (one != other))
            before, costs[column] = costs[column], best
    return costs[-1]


def anls(answer: str, right: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity with the nearest right answer, 0 below the threshold.

    Biten et al. 2019, arXiv:1907.00490. Blanks and case are made alike for the distance; it is divided by the length of
    the longer text as it was given, as the field's code does.
    """

    def distance(one: str) -> float:
        longest = max(len(one), len(answer))
        made = edit_distance(" ".join(one.lower().split()), " ".join(answer.lower().split()))
        return made / longest if longest else 0.0

    similarity = 1 - min(map(distance, right), default=1.0)
    return similarity if similarity >= threshold else 0.0


def relaxed_accuracy(answer: str, right: str) -> float:
    """ChartQA's accuracy (Masry et al. 2022, arXiv:2203.10244): numbers within 5 %, else equal up to case."""
    given, wanted = _number(answer), _number(right)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= RELAXED)
    return float(answer.lower() == right.lower())


def _number(text: str) -> float | None:
    """The number that a text is; a percentage as a share."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_answer(answer: str, right: str) -> float:
    """GQA's accuracy: equal up to case and punctuation."""
    given, wanted = (text.lower().translate(_NO_PUNCTUATION) for text in (answer, right))
    return float(given == wanted)

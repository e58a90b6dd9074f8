"""Which choice an answer in words means: MMBench's, SEED-Bench's and MMMU's ways of reading one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from unimm.evaluation.items import LETTERS

MMBENCH_LETTERS = "ABCDE"
# What may stand around a letter, one after the other; the first that just one letter fits decides.
_AROUND = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_QUANTIFIER_FROM = 4  # words; in an answer as long, A may be an article
_STRIPPED = ",.!?;:'"
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmbench_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names by MMBench's rules (Liu et al. 2023, arXiv:2307.06281), or None.

    A letter among its words, alone or with marks; else the one choice whose words are in it.
    """
    words = answer.split()
    for place, (before, behind) in enumerate(_AROUND):
        named = [letter for letter in MMBENCH_LETTERS if before + letter + behind in words]
        if len(named) != 1:
            continue
        if place == 0 and "A" in words and len(words) >= _QUANTIFIER_FROM:
            continue
        return named[0]
    said = [letter for letter, text in zip("ABCD", choices, strict=False) if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 else None


def first_letter(answer: str) -> str | None:
    """The first character of an answer, whatever its case, as SEED-Bench is usually read."""
    return answer.strip()[:1].upper() or None


def mmmu_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names by MMMU's rules (Yue et al. 2023, arXiv:2311.16502).

    Of several the last; None where there is none, for which the published code draws a letter by chance.
    """
    for mark in _STRIPPED:
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = LETTERS[: len(choices)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: (text.rfind(place.format(letter)), -letters.index(letter)))
    if len(text.split()) > 5:
        lowered = text.lower()
        found = [letter for letter, words in zip(letters, choices, strict=True) if words.lower() in lowered]
        if found:
            last = {letter: lowered.rfind(choices[letters.index(letter)].lower()) for letter in found}
            return max(found, key=lambda letter: (last[letter], -letters.index(letter)))
    return None


def mmmu_open(answer: str, right: str | Sequence[str]) -> bool:
    """Whether an answer to MMMU's open questions holds a right number, or right words in one of its key parts."""
    wanted = [form for one in ([right] if isinstance(right, str) else right) for form in _forms(one)]
    for said in _said(answer):
        if isinstance(said, str):
            if any(isinstance(form, str) and form in said for form in wanted):
                return True
        elif said in wanted:
            return True
    return False


def _said(answer: str) -> list[Any]:
    """The words and numbers of the parts of an answer that may hold what is asked for."""
    parts = _key_parts(answer)
    numbers = [
        found
        for part in parts
        for pattern in (_THOUSANDS, _SCIENTIFIC, _SIMPLE)
        for found in pattern.findall(part)
    ]
    return [form for text in [*parts, *numbers] for form in _forms(text)]


def _key_parts(answer: str) -> list[str]:
    """What stands behind words such as "is" in each sentence, the shortest; the whole answer where none has any."""
    text = answer.strip().strip(".").lower()
    sentences = _SENTENCES.split(text)
    found = []
    for number, sentence in enumerate(sentences):
        before = _BEFORE_ANSWERS + (("=",) if number == len(sentences) - 1 else ())
        ends = [sentence.split(words)[-1].strip() for words in before if words in sentence]
        shortest = ""
        for end in ends:  # an empty one gives way to whatever comes next
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[Any]:
    """A text as it is compared: a number of two decimals, else in lower case; of one letter, with a blank beside."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]

"""The accuracy of VQAv2 and TextVQA: an answer is right as far as it agrees with those of ten people.

An answer that three of the other nine gave is wholly right (Antol et al. 2015, arXiv:1505.00468). Words are first made
alike by the rules of the evaluation server: case, punctuation, number words, articles and apostrophes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words with an apostrophe; an answer that lacks one of theirs is given it.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the server's list has this one the other way round
_NUMBERS = {word: str(number) for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
)} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the server's code passes a flag, of this value, where the number of replacements belongs


def plain_marks(text: str) -> str:
    """A text without its marks: gone where they stand at a blank or a number has commas, else a blank."""
    gone = _COMMA.search(text) is not None
    plain = text
    for mark in _MARKS:
        alone = gone or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if alone else " ")
    return _PERIOD.sub("", plain, count=_PERIODS)


def plain_words(text: str) -> str:
    """A text in lower case with numbers as digits, without articles and with the apostrophes that words have."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def plain_answer(text: str) -> str:
    """An answer as it is compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(plain_marks(text.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQAv2's accuracy of an answer; marks and words of all are made alike, line ends and outer blanks first."""

    def plain(text: str) -> str:
        return plain_words(plain_marks(text.replace("\n", " ").replace("\t", " ").strip()))

    return agreement(plain(answer), [plain(one) for one in people])


def textvqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """TextVQA's accuracy of an answer; commas, question marks and possessives of all are made alike too."""
    return agreement(plain_answer(answer), [plain_answer(one) for one in people])


def agreement(answer: str, people: Sequence[str]) -> float:
    """The mean, over leaving each person out, of a third for each of the others who gave the answer, 1 at most."""
    count = sum(one == answer for one in people)
    shares = [min(1.0, (count - (one == answer)) / 3) for one in people]
    return sum(shares) / len(shares) if shares else 0.0

"""CIDEr-D: how much a caption has in common with those of people, words that few images have counting more.

Vedantam et al. 2015, arXiv:1411.5726. The published figures take the words of the Penn Treebank's tokenizer, which is a
program of Java; `ptb_tokens` runs it from the package `pycocoevalcap` where that and Java are there, `word_tokens` is
near it, and a result says which was taken.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unimm.errors import UserError

NGRAM_WORDS = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length, in words
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
Gram = tuple[str, ...]


def word_tokens(text: str) -> str:
    """A caption's words in lower case, without punctuation, one blank between."""
    return " ".join(_WORD.findall(text.lower()))


def ptb_tokens(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Captions as the tokenizer of the published figures has them.

    Args:
        captions: key -> captions.

    Raises:
        UserError: Java or the package is missing.
    """
    if shutil.which("java") is None:
        raise UserError("scorer.rule: ptb needs Java on the PATH; the rule words needs none")
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise UserError(
            "scorer.rule: ptb needs the package pycocoevalcap: pip install pycocoevalcap"
        ) from None
    given = {key: [{"caption": text} for text in texts] for key, texts in captions.items()}
    found: dict[str, list[str]] = PTBTokenizer().tokenize(given)
    return found


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of captions, from 0 to 10; how much a word counts depends on all references.

    Args:
        candidates: tokenised captions, one of each image.
        references: tokenised captions of people, some of each image.
    """
    counted = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[Gram] = Counter()
    for texts in counted:
        frequency.update({gram for grams in texts for gram in grams})
    logs = math.log(len(references)) if references else 0.0
    return [
        _similarity(_grams(candidate), texts, frequency, logs)
        for candidate, texts in zip(candidates, counted, strict=True)
    ]


def _grams(text: str) -> Counter[Gram]:
    words = text.split()
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, NGRAM_WORDS + 1)
        for start in range(len(words) - size + 1)
    )


def _weighted(
    grams: Counter[Gram], frequency: Counter[Gram], logs: float
) -> tuple[list[dict[Gram, float]], list[float], int]:
    """TF-IDF of the n-grams of each size, the norms, and the number of pairs of words, which stands for the length."""
    vectors: list[dict[Gram, float]] = [{} for _ in range(NGRAM_WORDS)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (logs - math.log(max(1.0, frequency[gram])))
    norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
    return vectors, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(
    candidate: Counter[Gram], references: Sequence[Counter[Gram]], frequency: Counter[Gram], logs: float
) -> float:
    ours, our_norms, our_length = _weighted(candidate, frequency, logs)
    total = np.zeros(NGRAM_WORDS)
    for reference in references:
        theirs, their_norms, their_length = _weighted(reference, frequency, logs)
        penalty = math.exp(-((our_length - their_length) ** 2) / (2 * SIGMA**2))
        for size in range(NGRAM_WORDS):
            shared = sum(
                min(value, theirs[size].get(gram, 0.0)) * theirs[size].get(gram, 0.0)
                for gram, value in ours[size].items()
            )
            norm = our_norms[size] * their_norms[size]
            total[size] += (shared / norm if norm else shared) * penalty
    return float(total.mean() / max(len(references), 1) * 10)

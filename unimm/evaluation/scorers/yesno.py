"""Yes or no: POPE's and MME's ways of reading an answer."""

from __future__ import annotations

NO_WORDS = ("No", "not", "no")


def pope_word(answer: str) -> str:
    """`no` where the first sentence holds no or not, else `yes`: the rule of POPE's own code (arXiv:2305.10355)."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in NO_WORDS) else "yes"


def exact_word(answer: str) -> str:
    """The answer itself, up to case and outer blanks: the rule by which lmms-eval reads POPE."""
    return answer.lower().strip()


def mme_word(answer: str) -> str:
    """`yes`, `no` or `other`, by the first four characters: the rule of MME's own code (arXiv:2306.13394)."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    start = text if text in ("yes", "no") else text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"

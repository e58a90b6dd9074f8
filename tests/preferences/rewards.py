"""Scorers for tests, found by their dotted paths."""

from __future__ import annotations

from collections.abc import Sequence

from unimm.preferences.scorers import Candidate


def zeros(candidates: Sequence[Candidate]) -> list[float]:
    """The share of code 0."""
    return [float((one.codes == 0).double().mean()) for one in candidates]


def low(candidates: Sequence[Candidate]) -> list[float]:
    """The mean code, the lower the better; drawings differ in it from the start."""
    return [-float(one.codes.double().mean()) for one in candidates]


def same(candidates: Sequence[Candidate]) -> list[float]:
    """All alike."""
    return [0.5] * len(candidates)


def too_few(candidates: Sequence[Candidate]) -> list[float]:
    """One number for all."""
    return [1.0]


def raises(candidates: Sequence[Candidate]) -> list[float]:
    """Knows nothing."""
    raise RuntimeError("no idea")

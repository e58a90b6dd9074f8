"""Intervals of figures by the bootstrap: units (questions, prompts, pairs of questions) are drawn anew.

A figure is a function of the items' weights, so that one resample is one vector of weights and no list is copied. Two
results of the same items are compared under the same resamples (paired): what is hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_RESAMPLES = 1000
Weights = NDArray[np.float64]
Figures = dict[str, float]


@dataclass(frozen=True)
class ScoreTable:
    """The scored items of a result, as columns.

    Attributes:
        rows: what is known of each item: its fields, and what its scorer said.
        units: number of each item's unit, int64 [N].
        names: of the units, in the order of their numbers.
    """

    rows: Sequence[Mapping[str, Any]]
    units: NDArray[np.int64]
    names: Sequence[str]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> ScoreTable:
        """A table of rows with a `unit` each."""
        numbers: dict[str, int] = {}
        units = [numbers.setdefault(str(row["unit"]), len(numbers)) for row in rows]
        return cls(rows, np.array(units, np.int64), list(numbers))

    def column(self, name: str) -> Weights:
        """A number of each item, float64 [N]."""
        return np.array([float(row[name]) for row in self.rows])

    def groups(self, name: str) -> dict[str, NDArray[np.int64]]:
        """Value of a column -> the places of the items that have it, in the order in which values come."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            if row.get(name) is not None:
                places.setdefault(str(row[name]), []).append(place)
        return {value: np.array(listed, np.int64) for value, listed in places.items()}


Summary = Callable[[Weights], Figures]


def mean(values: Weights, weights: Weights) -> float:
    """The weighted mean; NaN of nothing."""
    total = weights.sum()
    return float((values * weights).sum() / total) if total else float("nan")


def resample(units: int, seed: int = 0, count: int = BOOTSTRAP_RESAMPLES) -> NDArray[np.int64]:
    """How often each unit is drawn in each resample: int64 [count, units]."""
    rng = np.random.default_rng([seed, units])
    drawn = rng.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 %, of those that are numbers."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def with_intervals(table: ScoreTable, summarise: Summary) -> dict[str, dict[str, float]]:
    """Every figure with its 95 % interval: `value`, `low` and `high`."""
    exact = summarise(np.ones(len(table.rows)))
    drawn = [summarise(counts[table.units].astype(float)) for counts in resample(len(table.names))]
    found = {}
    for name, value in exact.items():
        low, high = interval([figures.get(name, float("nan")) for figures in drawn])
        found[name] = {"value": value, "low": low, "high": high}
    return found


def paired(
    tables: tuple[ScoreTable, ScoreTable], summaries: tuple[Summary, Summary]
) -> dict[str, dict[str, float]]:
    """How much further the second is in every figure, with the interval of the difference.

    Args:
        tables: of the same units.
        summaries: the figures of each table by the weights of its items.
    """
    first, second = tables
    place = {name: number for number, name in enumerate(first.names)}
    order = np.array([place[name] for name in second.names], np.int64)
    exact = [summary(np.ones(len(table.rows))) for table, summary in zip(tables, summaries, strict=True)]
    drawn: dict[str, list[float]] = {name: [] for name in exact[0] if name in exact[1]}
    for counts in resample(len(first.names)):
        ours = summaries[0](counts[first.units].astype(float))
        theirs = summaries[1](counts[order[second.units]].astype(float))
        for name, differences in drawn.items():
            differences.append(theirs.get(name, float("nan")) - ours.get(name, float("nan")))
    found = {}
    for name, differences in drawn.items():
        low, high = interval(differences)
        found[name] = {"difference": exact[1][name] - exact[0][name], "low": low, "high": high}
    return found

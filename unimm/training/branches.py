"""Rows of the stream as a shared prefix with branches, each of which sees the prefix and itself but no other branch.

Positions restart after the prefix and attention does not cross, so a branch gets what it would get alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.attention import dense_mask
from unimm.modeling import IGNORED


class Branches:
    """Builds one row: a shared prefix, then branches that each see the prefix and themselves only."""

    def __init__(self, prefix: Sequence[int]) -> None:
        self.prefix = len(prefix)
        self.ids = list(prefix)
        self.labels = [IGNORED] * len(prefix)
        self.positions = list(range(len(prefix)))
        self.branches = [0] * len(prefix)

    def add(self, given: Sequence[int], learnt: Sequence[int], labels: Sequence[int] | None = None) -> None:
        """Add a branch: tokens that are given, then tokens to learn (`labels` where they differ from the tokens)."""
        length, number = len(given) + len(learnt), self.branches[-1] + 1
        self.ids += [*given, *learnt]
        self.labels += [IGNORED] * len(given) + list(learnt if labels is None else labels)
        self.positions += range(self.prefix, self.prefix + length)
        self.branches += [number] * length

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """The row as arrays [T]."""
        rows = {
            "ids": self.ids,
            "labels": [IGNORED, *self.labels[1:]],  # nothing comes before it, packed or not
            "positions": self.positions,
            "branches": self.branches,
        }
        return {name: np.array(values, np.int64) for name, values in rows.items()}


def stack_rows(rows: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
    """Rows [T_i] as one tensor [B, T] of the longest, filled up on the right."""
    stacked = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
    return torch.from_numpy(stacked)


def stack_answers(rows: Sequence[Mapping[str, NDArray[np.int64]]], pad: int) -> dict[str, Tensor]:
    """Rows that say which answer each position belongs to, as the tensors [B, T] of `UniMMModel.score`."""
    fills = {"ids": pad, "labels": IGNORED, "positions": 0, "branches": 0, "answers": 0}
    stacked = {name: stack_rows([row[name] for row in rows], fill) for name, fill in fills.items()}
    return {
        "input_ids": stacked["ids"],
        "labels": stacked["labels"],
        "position_ids": stacked["positions"],
        "answers": stacked["answers"],
        "attention_mask": dense_mask(torch.zeros_like(stacked["branches"]), stacked["branches"]),
    }

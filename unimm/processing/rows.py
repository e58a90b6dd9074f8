"""Rows of the stream: tokens with labels, alone or as branches behind what they have in common.

A branch sees the shared prefix and itself, but no other branch: positions restart after the prefix and attention does
not cross (`unimm.models.attention`), so a branch gives what its row would give alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.models.attention import dense_mask
from unimm.models.layout import IGNORED


@dataclass
class Row:
    """One row of tokens.

    Attributes:
        ids: tokens [T], with the layout's placeholders where images stand.
        labels: [T], `IGNORED` where no loss counts.
        seen: images to understand that stand in the row.
        drawn: images to generate that stand in it.
        whole: tokens before it was cut to the context.
        prefix: how many tokens at the start all branches share; 0 where the row has one branch.
        lengths: tokens of each branch after it; empty where the row has one branch.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    seen: int = 0
    drawn: int = 0
    whole: int = field(default=0, compare=False)
    prefix: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], labels: Sequence[int] | None = None) -> None:
        """Append tokens, unlabelled unless labels [t] come with them."""
        self.ids += tokens
        self.labels += [IGNORED] * len(tokens) if labels is None else labels

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """`ids`, `labels`, `positions` and `branches`, int64 [T]; branch 0 is what all others see."""
        parts = [self.prefix, *self.lengths] if self.lengths else [len(self.ids)]
        starts = [0, *[self.prefix] * len(self.lengths)]
        positions = [np.arange(start, start + count) for start, count in zip(starts, parts, strict=True)]
        rows = {
            "ids": np.array(self.ids, np.int64),
            "labels": np.array([IGNORED, *self.labels[1:]], np.int64),  # nothing predicts the first
            "positions": np.concatenate(positions).astype(np.int64),
            "branches": np.repeat(np.arange(len(parts)), parts).astype(np.int64),
        }
        return rows

    def numbered(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """Which of some numbers, one for each branch, a position bears: int64 [T], 0 in the shared prefix."""
        if not self.lengths:
            return np.full(len(self.ids), numbers[0], np.int64)
        return np.repeat([0, *numbers], [self.prefix, *self.lengths]).astype(np.int64)


def branch(rows: Sequence[Row]) -> Row:
    """Join rows that begin alike into one, each a branch behind what all have in common.

    Images stand in the common part or in branches; those of the common part count once.

    A branch begins no later than with the token that predicts its first label.
    """
    first = rows[0]
    if len(rows) == 1:
        return first
    most = min(_first_label(row) for row in rows) - 1
    alike = takewhile(
        lambda tokens: len(set(tokens)) == 1, zip(*(row.ids[:most] for row in rows), strict=True)
    )
    prefix = sum(1 for _ in alike)
    joined = Row(first.ids[:prefix], first.labels[:prefix], first.seen, prefix=prefix)
    for row in rows:
        joined.add(row.ids[prefix:], row.labels[prefix:])
        joined.lengths.append(len(row.ids) - prefix)
        joined.drawn += row.drawn
    return joined


def _first_label(row: Row) -> int:
    return next((i for i, label in enumerate(row.labels) if label != IGNORED), len(row.labels))


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

"""Positions, and who may look at whom in a row that holds several samples, each with branches of its own.

A row is cut into samples, which do not see each other. Within a sample, branch 0 is a shared prefix, and every
other branch sees that prefix and itself. Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLEX = "flex_attention"  # what transformers calls it


def dense_mask(samples: Tensor, branches: Tensor) -> Tensor:
    """Return who may look where: bool [B, 1, T, T], True at [b, 0, query, key].

    Args:
        samples: number of the sample that a position belongs to, int [B, T]; padding has one of its own.
        branches: number of its branch, int [B, T].
    """
    # causal, within a sample, and within the branch or what all branches share
    order = torch.ones(samples.shape[1], samples.shape[1], dtype=torch.bool, device=samples.device).tril()
    same = samples[:, :, None] == samples[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (order & same & seen)[:, None]


def block_mask(samples: Tensor, branches: Tensor) -> Any:
    """Return the same as a `BlockMask` for FlexAttention, which skips the blocks that no position looks at."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (branches[row, key] == 0) | (branches[row, key] == branches[row, query])
        return (query >= key) & (samples[row, query] == samples[row, key]) & seen

    rows, length = samples.shape
    return create_block_mask(may_look, rows, None, length, length, device=samples.device)


def positions(attention_mask: Tensor) -> Tensor:
    """Return position ids [B, T] that count attended positions only, so that left padding shifts nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

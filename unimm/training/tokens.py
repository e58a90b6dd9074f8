"""Rows of the token tables that were never trained, given values of their own.

Words that a model never saw are spelt in such tokens. Training that only ever pushes them down leaves them all at
practically one vector, in the table and, where the two are tied, in the text head: a fine-tuning run can then neither
read the new words nor write them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from unimm.models.modeling import UniMMModel

APART = 0.1  # of a row's length: rows nearer than this to each other are practically equal
CROWD = 8  # rows practically equal to this many others were never trained
COMPARED_ROWS = 4096  # rows, evenly spread, that each is compared with
COMPARISON_BATCH = 1024  # rows compared at once


def renew_tokens(model: UniMMModel, keep: Collection[int], seed: int) -> list[int]:
    """Give the rows that were never trained fresh values, in the token table and in a text head of its own.

    Args:
        model: changed in place.
        keep: ids of tokens whose rows stay, whatever they hold.
        seed: of the values; the same seed gives the same.

    Returns:
        The ids of the tokens whose rows were renewed, in order.
    """
    table = model.decoder.get_input_embeddings().weight
    head = model.decoder.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    renewed: set[int] = set()
    for weight in (table,) if head is table else (table, head):
        rows = [row for row in untrained_rows(weight) if row not in keep]
        _renew(weight, rows, generator)
        renewed.update(rows)
    return sorted(renewed)


@torch.no_grad()
def untrained_rows(weight: Tensor) -> list[int]:
    """Return the rows of a table [V, D] that are practically equal to many others, in order.

    Rows beyond `COMPARED_ROWS` are seen as equal to others by an even sample of the table, so that a vocabulary of any
    size takes seconds.
    """
    rows = weight.detach().float()
    lengths = rows.norm(dim=1)
    step = -(-len(rows) // COMPARED_ROWS)
    others, other_lengths = rows[::step], lengths[::step]
    found: list[int] = []
    for start in range(0, len(rows), COMPARISON_BATCH):
        part, length = rows[start : start + COMPARISON_BATCH], lengths[start : start + COMPARISON_BATCH]
        near = torch.cdist(part, others) <= APART * torch.maximum(length[:, None], other_lengths)
        itself = (torch.arange(start, start + len(part)) % step == 0).to(near.device)
        crowded = near.sum(1) - itself.long() >= CROWD
        found += (crowded.nonzero().flatten() + start).tolist()
    return found


@torch.no_grad()
def _renew(weight: Tensor, rows: list[int], generator: torch.Generator) -> None:
    """Put random directions of the other rows' usual length into rows."""
    if not rows:
        return
    trained = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    trained[rows] = False
    others = weight[trained] if trained.any() else weight
    length = others.float().norm(dim=1).median()
    fresh = torch.randn(len(rows), weight.shape[1], generator=generator).to(weight.device)
    weight[rows] = (fresh / fresh.norm(dim=1, keepdim=True) * length).to(weight.dtype)

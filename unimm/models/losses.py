"""Losses and scores over many positions, a chunk at a time: the logits of all of them are never held at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOSS_CHUNK = 4096  # positions whose logits exist at once


def _chunk_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def most_chunks(*counts: int) -> list[int]:
    """Return the chunks that the process with the most of so many positions computes a loss in; a collective."""
    return _most([-(-count // LOSS_CHUNK) for count in counts])


def most_calls(count: int) -> int:
    """Return how often the process that calls a part most often calls it; a collective."""
    return _most([count])[0]


def _most(counts: list[int]) -> list[int]:
    everywhere = torch.tensor(counts)
    if torch.distributed.get_backend() == "nccl":
        everywhere = everywhere.cuda()
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
    most: list[int] = everywhere.tolist()
    return most


def summed_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
    """Return the cross-entropy summed over positions, without ever holding the logits of more than a chunk.

    Args:
        head: maps [P, C] to logits.
        hidden: [P, C].
        targets: int64 [P].
        chunks: compute at least so many, the last of them empty where need be.
    """
    chunks = max(chunks, -(-len(targets) // LOSS_CHUNK))
    if chunks <= 1:
        return _chunk_loss(head, hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, chunks * LOSS_CHUNK, LOSS_CHUNK):
        part, target = hidden[start : start + LOSS_CHUNK], targets[start : start + LOSS_CHUNK]
        total = total + checkpoint(_chunk_loss, head, part, target, use_reentrant=False)
    return total


def _chunk_scores(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    logits = head(hidden)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = (precise if temperature == 1 else precise / temperature).log_softmax(-1)
    flat = log_probs.detach()
    entropy = -(flat.exp() * flat.clamp(min=torch.finfo(flat.dtype).min)).sum(-1)  # 0 log 0 is 0
    chosen = log_probs.gather(-1, targets[:, None])[:, 0].double()
    return torch.stack([chosen, entropy.double(), torch.ones_like(chosen)], dim=1)


def position_scores(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunks: int = 1,
) -> Tensor:
    """Return float64 [P, 3]: log-probability of each target, entropy of its prediction, and 1.

    The logits of more than a chunk are never held, as in `summed_loss`, whose arguments these are; `temperature` is
    what logits are divided by.
    """
    chunks = max(chunks, -(-len(targets) // LOSS_CHUNK))
    if chunks <= 1:
        return _chunk_scores(head, hidden, targets, temperature)
    parts = []
    for start in range(0, chunks * LOSS_CHUNK, LOSS_CHUNK):
        part, target = hidden[start : start + LOSS_CHUNK], targets[start : start + LOSS_CHUNK]
        parts.append(checkpoint(_chunk_scores, head, part, target, temperature, use_reentrant=False))
    return torch.cat(parts)


def sum_scores(
    scored: Sequence[tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]],
    count: int,
    temperature: float,
    lockstep: bool,
) -> Tensor:
    """Return the scores of `position_scores` summed for each answer, float64 [S, 3].

    Args:
        scored: for each head: itself, hidden states [P, C], targets [P] and the answer of each [P].
        count: number of answers S.
        temperature: what logits are divided by.
        lockstep: whether all processes call each head equally often; needs a process group.
    """
    counts = [len(targets) for _, _, targets, _ in scored]
    if lockstep:  # a head runs even where no process has use for it, so that its gradient is 0
        chunks = [max(1, most) for most in most_chunks(*counts)]
    else:
        chunks = [min(1, own) for own in counts]
    # In float64: what matters are small differences of long sums.
    sums = torch.zeros(count, 3, dtype=torch.float64, device=scored[0][1].device)
    for (head, hidden, targets, answers), parts in zip(scored, chunks, strict=True):
        if parts:
            found = position_scores(head, hidden, targets, temperature, parts)
            sums = sums.index_add(0, answers, found)
    return sums

"""Choosing one code from logits: guidance, temperature, top-k, top-p, and a random stream for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unimm.errors import UserError


def check_options(guidance_scale: float, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse options that no distribution has.

    Raises:
        UserError: one line that names the option and what would be right.
    """
    if not math.isfinite(guidance_scale):
        raise UserError(
            f"guidance_scale: {guidance_scale}; give a finite number (5 is usual, 1 is no guidance)"
        )
    if not math.isfinite(temperature) or temperature < 0:
        raise UserError(f"temperature: {temperature}; give a number of 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: {top_k}; give 1 or more, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p}; give a number above 0, at most 1, or leave it out")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return logits [B, K] pushed away from the unconditional ones (classifier-free guidance, arXiv:2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the filtered distribution [B, K] of logits [B, K], for a temperature above 0."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    weights = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        # A code stays if the mass before it is below top_p, so the first always does.
        dropped = ordered.cumsum(-1) - ordered >= top_p
        weights = weights.masked_fill(dropped.gather(-1, order.argsort(-1)), 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return one index [B] for each row of weights [B, K] by inverting its distribution at `uniform` [B] in [0, 1)."""
    cumulative = weights.cumsum(-1)
    # Scaled to the row's own total, which rounding leaves near but not at 1.
    places = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    last = (weights > 0).long().mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1)
    return torch.minimum(places, last)


def streams(seed: int | Sequence[int] | None, images: int, steps: int) -> Tensor:
    """Return the random numbers [images, steps] in [0, 1) of a call, each image from a stream of its own.

    Image i has the stream of `(seed, i)`, or of `(seed[i], 0)` if seeds are listed, so it does not depend on
    what else is in the batch.

    Raises:
        UserError: a list of seeds that has not one for each image.
    """
    if seed is None:
        keys = [(int(np.random.SeedSequence().generate_state(1, np.uint64)[0]), i) for i in range(images)]
    elif isinstance(seed, int):
        keys = [(seed, i) for i in range(images)]
    else:
        if len(seed) != images:
            raise UserError(f"seed: {len(seed)} seeds for {images} images; give one for each image")
        keys = [(one, 0) for one in seed]
    if any(key < 0 for key, _ in keys):
        raise UserError("seed: negative; give a whole number of 0 or more")
    rows = [np.random.default_rng(key).random(steps, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))

"""Choosing one code from logits: guidance, temperature, top-k, top-p, and a random stream for each image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from unimm.errors import UserError


class SamplingOptions(TypedDict, total=False):
    """How codes are sampled, as keywords of `UniMM.draw`; what is left out or None is as the model has it.

    Keys:
        guidance_scale: how hard to follow the prompt; 1 is no guidance.
        temperature: 0 takes the likeliest code at every step.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the likeliest codes of this mass; 1 keeps all.
    """

    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None


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


def as_seed(seed: Any) -> int | list[int] | None:
    """Return a seed as a whole number, or a list of them: numbers of NumPy and torch and their arrays become ours.

    Raises:
        UserError: it holds what is no whole number from 0 to 2^64 - 1.
    """
    if seed is None or isinstance(seed, int | np.integer):
        return None if seed is None else _one_seed(seed)
    listed = seed.tolist() if hasattr(seed, "tolist") else seed
    if isinstance(listed, Iterable) and not isinstance(listed, str | bytes | Mapping):
        return [_one_seed(one) for one in listed]
    return _one_seed(listed)


def _one_seed(seed: Any) -> int:
    """Return one seed as a whole number."""
    value = seed.item() if hasattr(seed, "item") and getattr(seed, "ndim", 0) == 0 else seed
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"seed: {' '.join(repr(value).split())[:80]}; give a whole number of 0 or more")
    if value < 0:
        raise UserError("seed: negative; give a whole number of 0 or more")
    if value >= 2**64:
        raise UserError("seed: of more than 64 bits; give a whole number below 2^64")
    return value


def streams(seed: int | Sequence[int] | None, images: int, steps: int) -> Tensor:
    """Return the random numbers [images, steps] in [0, 1) of a call, each image from a stream of its own.

    Image i has the stream of `(seed, i)`, or of `(seed[i], 0)` if seeds are listed, so it does not depend on
    what else is in the batch.

    Raises:
        UserError: a list of seeds that has not one for each image, or what is no seed.
    """
    given = as_seed(seed)
    if given is None:
        keys = [(int(np.random.SeedSequence().generate_state(1, np.uint64)[0]), i) for i in range(images)]
    elif isinstance(given, int):
        keys = [(given, i) for i in range(images)]
    else:
        if len(given) != images:
            raise UserError(f"seed: {len(given)} seeds for {images} images; give one for each image")
        keys = [(one, 0) for one in given]
    rows = [np.random.default_rng(key).random(steps, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, steps)

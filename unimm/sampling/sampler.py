"""Choosing one code or token from logits: guidance, filters, and noise that belongs to a place of an image.

A choice is the largest of logits / temperature + Gumbel noise, which draws from the softmax (the Gumbel-max trick). The
noise of a place is made from (seed, image, place) by a counter-based generator (Philox, Salmon et al. 2011), so what
one-by-one sampling would choose at a place does not depend on what else is sampled, nor on how many places are looked
at in one pass. Shape suffixes: P places, K vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from unimm.errors import UserError

COLDEST, HOTTEST = 1e-4, 1e4  # temperatures that leave differences of logits to float32
STRONGEST_GUIDANCE = 1e3
ERROR = 2.0**-18  # of float32 logits, relative to the largest: six times what was measured at most


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


NoiseKind = Literal["code", "token"]


class NoiseKey(NamedTuple):
    """Whose noise it is: the seed of a call and the number of an image or answer in it."""

    seed: int
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Filters:
    """What is done to logits before the largest is taken.

    Attributes:
        temperature: what logits are divided by; 0 takes the largest without noise.
        top_k: among how many of the likeliest; None: all.
        top_p: among the likeliest of which mass; None: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Sampled(NamedTuple):
    """What was chosen at P places.

    Attributes:
        chosen: int64 [P].
        near: bool [P], whether rounding of the logits could have changed it.
    """

    chosen: Tensor
    near: Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return logits [P, K] pushed away from the unconditional ones (classifier-free guidance, arXiv:2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the filtered distribution [P, K] of logits [P, K], for a temperature above 0."""
    logits = logits.float() / temperature
    threshold = _thresholds(logits, Filters(temperature, top_k, top_p))[0]
    return logits.masked_fill(logits < threshold, -math.inf).softmax(-1)


def sample(logits: Tensor, noise: Tensor | None, filters: Filters, error: Tensor | float = 0.0) -> Sampled:
    """Choose at each place by the Gumbel-max trick.

    Args:
        logits: [P, K].
        noise: Gumbel noise [P, K]; None where the temperature is 0.
        filters: temperature and filters.
        error: how far logits may be from the exact ones, [P, 1] or one for all; 0 asks for no check.

    Returns:
        The choices, and which of them another rounding could turn: another index is within the error of the chosen
        one, or a filter's threshold is within the error of an index that decides.
    """
    if filters.temperature == 0 or noise is None:
        return _largest(logits, 2 * error)
    scaled = logits.to(noise.dtype) / filters.temperature
    error = error / filters.temperature
    if filters.top_k is None and filters.top_p is None:
        return _largest(scaled + noise, 2 * error)
    threshold, low, high = _thresholds(scaled, filters, error)
    perturbed = scaled + noise
    kept = _largest(perturbed.masked_fill(scaled < threshold, -math.inf), 2 * error)
    if isinstance(error, float) and error == 0:
        return kept
    # What would be chosen if the filter kept all that it nearly keeps, and only what it surely keeps.
    generous, strict = scaled >= low, scaled >= high
    widest = _largest(perturbed.masked_fill(~generous, -math.inf), 2 * error)
    narrowest = perturbed.masked_fill(~strict, -math.inf).argmax(-1)
    alone = generous.sum(-1) == 1
    sure = alone | (strict.any(-1) & (narrowest == widest.chosen) & ~widest.near)
    return Sampled(kept.chosen, ~sure)


def _largest(scores: Tensor, margin: Tensor | float) -> Sampled:
    """Return the largest of each row, and whether the next is within the margin."""
    if (isinstance(margin, float) and margin == 0) or scores.shape[-1] < 2:
        index = scores.argmax(-1)
        return Sampled(index, torch.zeros_like(index, dtype=torch.bool))
    values, indices = scores.topk(2, dim=-1)
    gap = (values[:, :1] - values[:, 1:]) <= margin
    return Sampled(indices[:, 0], gap[:, 0])


def _thresholds(
    scaled: Tensor, filters: Filters, error: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest logit [P, 1] that filters keep: of the k likeliest, those of the mass p.

    Args:
        scaled: logits [P, K], divided by the temperature.
        filters: what is kept.
        error: how far these may be from exact ones.

    Returns:
        The smallest that is kept, the smallest that might be, and the smallest that surely is.
    """
    size = scaled.shape[-1]
    count = size if filters.top_k is None else min(filters.top_k, size)
    ordered = scaled.topk(min(count + 1, size), dim=-1).values
    every = torch.full_like(ordered[..., :1], count, dtype=torch.long)
    kept = most = least = every
    if filters.top_p is not None and filters.top_p < 1:
        weights = ordered[..., :count].softmax(-1)
        before = weights.cumsum(-1) - weights
        # One stays if the mass before it is below p, so the first always does.
        masses = (filters.top_p, filters.top_p + 2 * error, filters.top_p - 2 * error)
        kept, most, least = ((before < mass).sum(-1, keepdim=True).clamp(min=1) for mass in masses)
    # One is surely kept if it is surely above the first that might not be.
    below = ordered.gather(-1, least.clamp(max=ordered.shape[-1] - 1)) + 2 * error
    below = below.masked_fill(least >= ordered.shape[-1], -math.inf)
    return ordered.gather(-1, kept - 1), ordered.gather(-1, most - 1) - 2 * error, below


def logits_error(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Return how far guided float32 logits [P, 1] may be from exact ones, by the size of their rows [P, K]."""
    size: Tensor = torch.linalg.vector_norm(conditional, math.inf, -1, keepdim=True)
    if unconditional is not None:
        other = torch.linalg.vector_norm(unconditional, math.inf, -1, keepdim=True)
        size = abs(scale) * size + abs(1 - scale) * other
    return size * ERROR


# --- noise ----------------------------------------------------------------------------------------------------


def gumbel(key: NoiseKey, place: int, size: int, kind: NoiseKind = "code") -> np.ndarray[Any, Any]:
    """Return the Gumbel noise float64 [size] of one place.

    Args:
        key: whose noise.
        place: number of the code in its image, or of the token in its answer.
        size: of the vocabulary.
        kind: codes and tokens have noise of their own.
    """
    counter = np.array([0, 0, place, kind == "token"], np.uint64)
    bits = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(size)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0 or 1
    noise: np.ndarray[Any, Any] = -np.log(-np.log(uniform))
    return noise


def noise_keys(seed: Any, count: int) -> list[NoiseKey]:
    """Return whose noise each image of a call has.

    Image i has that of `(seed, i)`, or of `(seed[i], 0)` if seeds are listed, so it does not depend on what else is
    in the batch. Without a seed, one is drawn.

    Raises:
        UserError: a list of seeds that has not one for each image, or what is no seed.
    """
    given = as_seed(seed)
    if given is None:
        given = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    if isinstance(given, int):
        return [NoiseKey(given, i) for i in range(count)]
    if len(given) != count:
        raise UserError(f"seed: {len(given)} seeds for {count} images; give one for each image")
    return [NoiseKey(one) for one in given]


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

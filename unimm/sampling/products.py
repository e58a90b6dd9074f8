"""Products of a few rows with a weight: the faster of two ways, by measure.

On some CPUs torch multiplies a few rows in half the time if the weight comes first; on others it takes four times as
long. Which way is best depends on the shape and on the machine, so the first products of each shape try both in turn.
They are timed where they stand, with the weights of one layer after the other: a weight that is still in the cache from
a product before, as none is in a pass, would be multiplied faster the other way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.console import debugging, say

FEW = range(2, 33)  # rows for which the ways differ
TRIALS = 15  # of each way; the median counts, so that what else the machine does does not

Way = Callable[[Tensor, Tensor], Tensor]
_fastest: dict[tuple[int, int, int], Way] = {}
_trials: dict[tuple[int, int, int], dict[Way, list[float]]] = {}


def product(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return a layer as a function; a plain linear layer in the fastest way."""
    return partial(multiply, layer.weight, layer.bias) if type(layer) is nn.Linear else layer


def multiply(weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    """Apply a linear layer [O, I] to [..., I]."""
    rows = stream.numel() // stream.shape[-1]
    if not (rows in FEW and stream.dtype == torch.float32 and stream.device.type == "cpu"):
        return F.linear(stream, weight, bias)
    flat = stream.reshape(rows, -1)
    key = (*weight.shape, rows)
    way = _fastest.get(key)
    if way is _plain:
        return F.linear(stream, weight, bias)
    result = (_try(key, flat, weight) if way is None else way(flat, weight)).view(*stream.shape[:-1], -1)
    return result if bias is None else result + bias


def _plain(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight)


def _swapped(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()).t().contiguous()


WAYS: dict[Way, str] = {_plain: "x W", _swapped: "W x"}


def _try(key: tuple[int, int, int], rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply in the way that was tried less often; decide when both have been tried often enough."""
    trials = _trials.setdefault(key, {way: [] for way in WAYS})
    way = min(trials, key=lambda way: len(trials[way]))
    start = time.perf_counter()
    result = way(rows, weight)
    trials[way].append(time.perf_counter() - start)
    if all(len(times) == TRIALS for times in trials.values()):
        medians = {way: statistics.median(times) for way, times in _trials.pop(key).items()}
        _fastest[key] = min(medians, key=medians.__getitem__)
        if debugging():
            times = ", ".join(f"{WAYS[way]} {seconds * 1e6:.0f} us" for way, seconds in medians.items())
            say(f"{key[2]} x {key[1]} x {key[0]}: {times}")
    return result

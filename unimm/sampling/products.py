"""Products of a few rows with a weight: the faster of two ways, by measure.

On some CPUs torch multiplies a few rows in a quarter of the time if the weight comes first; on others it takes
four times as long. Which way is best depends on the shape and on the machine, so it is measured once, at the first
product of each shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.console import debugging, say

FEW = range(2, 17)  # rows for which the ways differ
RUNS = 4  # of each way: what else the machine does must not decide

Way = Callable[[Tensor, Tensor], Tensor]
_fastest: dict[tuple[int, int, int], Way] = {}


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
    if key not in _fastest:
        _fastest[key] = _measure(weight, flat)
    way = _fastest[key]
    if way is _plain:
        return F.linear(stream, weight, bias)
    result = way(flat, weight).view(*stream.shape[:-1], -1)
    return result if bias is None else result + bias


def choices() -> dict[str, str]:
    """Return what was measured in this process: in which way each shape is multiplied."""
    return {
        f"{rows} x {inputs} x {outputs}": WAYS[way]
        for (outputs, inputs, rows), way in sorted(_fastest.items())
    }


def _plain(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight)


def _swapped(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()).t().contiguous()


WAYS: dict[Way, str] = {_plain: "x W", _swapped: "W x"}


def _measure(weight: Tensor, rows: Tensor) -> Way:
    """Return the fastest way."""
    ways: list[Way] = [_plain, _swapped]
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(RUNS):
        for way in ways:
            start = time.perf_counter()
            way(rows, weight)
            best[way] = min(best[way], time.perf_counter() - start)
    if debugging():
        times = ", ".join(f"{WAYS[way]} {seconds * 1e6:.0f} us" for way, seconds in best.items())
        say(f"{len(rows)} x {weight.shape[1]} x {weight.shape[0]}: {times}")
    return min(best, key=best.__getitem__)

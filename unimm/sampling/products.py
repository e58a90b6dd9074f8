"""Products of a few rows with a weight: the faster of two ways, by measure.

On some CPUs torch multiplies two to eight rows in a quarter of the time if the weight comes first; on others it takes
four times as long. Which it is depends on the shape and on the machine, so it is measured once, at the first product of
each shape.
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

FEW = range(2, 9)  # rows for which the ways differ
RUNS = 4  # of each way: what else the machine does must not decide

_weight_first: dict[tuple[int, int, int], bool] = {}


def product(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return a layer as a function; a plain linear layer in the faster way."""
    return partial(multiply, layer.weight, layer.bias) if type(layer) is nn.Linear else layer


def multiply(weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    """Apply a linear layer [O, I] to [..., I]."""
    rows = stream.numel() // stream.shape[-1]
    if not (rows in FEW and stream.dtype == torch.float32 and stream.device.type == "cpu"):
        return F.linear(stream, weight, bias)
    key = (*weight.shape, rows)
    if key not in _weight_first:
        _weight_first[key] = _measure(weight, stream.reshape(rows, -1))
    if not _weight_first[key]:
        return F.linear(stream, weight, bias)
    result = _swapped(stream.reshape(rows, -1), weight).view(*stream.shape[:-1], -1)
    return result if bias is None else result + bias


def choices() -> dict[str, str]:
    """Return what was measured in this process: which way each shape is multiplied."""
    return {
        f"{rows} x {inputs} x {outputs}": "weight first" if first else "weight second"
        for (outputs, inputs, rows), first in sorted(_weight_first.items())
    }


def _swapped(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()).t().contiguous()


def _measure(weight: Tensor, rows: Tensor) -> bool:
    """Return whether the weight is to come first."""
    best = [float("inf"), float("inf")]
    for _ in range(RUNS):
        for i in range(2):
            start = time.perf_counter()
            _swapped(rows, weight) if i else F.linear(rows, weight)
            best[i] = min(best[i], time.perf_counter() - start)
    if debugging():
        shape = f"{len(rows)} x {weight.shape[1]} x {weight.shape[0]}"
        second, first = (f"{seconds * 1e6:.0f} us" for seconds in best)
        say(f"{shape}: weight second {second}, weight first {first}")
    return best[1] < best[0]

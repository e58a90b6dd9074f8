"""What this machine multiplies in what time, for the shapes of a model: `unimm info --speed`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.sampling.products import WAYS

ROWS = (1, 2, 4, 8, 32, 256)
BUDGET = 0.03  # seconds of a measurement


def measure_products(config: Any, device: torch.device) -> list[dict[str, Any]]:
    """Time the products of a decoder's layers with weights of its shapes.

    Args:
        config: of the decoder.
        device: where.

    Returns:
        For each shape and number of rows: microseconds in float32 (of the faster way: which stands first, the rows or
        the weight) and in bfloat16.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    shapes = {
        "attention": ((heads + 2 * groups) * head, width),
        "gate, up": (2 * inner, width),
        "down": (width, inner),
    }
    found = []
    for name, (outputs, inputs) in shapes.items():
        weight = torch.randn(outputs, inputs, device=device)
        half = weight.bfloat16()
        for rows in ROWS:
            stream = torch.randn(rows, inputs, device=device)
            times = {label: _seconds(way, stream, weight) for way, label in WAYS.items()}
            best = min(times, key=times.__getitem__)
            bfloat16 = _seconds(lambda rows, weight: F.linear(rows, weight), stream.bfloat16(), half)
            found.append(
                {
                    "product": name,
                    "rows": rows,
                    "shape": f"{inputs} x {outputs}",
                    "float32_us": round(times[best] * 1e6, 1),
                    "way": best,
                    "gflops": round(2 * rows * inputs * outputs / times[best] / 1e9, 1),
                    "bfloat16_us": round(bfloat16 * 1e6, 1),
                }
            )
    return found


def _seconds(way: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor) -> float:
    """Return the shortest time of a product."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < BUDGET:
        before = time.perf_counter()
        way(rows, weight)
        if rows.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return best

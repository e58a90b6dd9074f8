"""From an encoder's features to the decoder's width: reducers, which make fewer of many, and the connector."""

from __future__ import annotations

import math

from torch import Tensor, nn


def mlp(width_in: int, width_out: int, depth: int) -> nn.Sequential:
    """Return Janus's connector: `depth` linear layers with a GELU between (Janus `mlp_gelu`)."""
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


class Connector(nn.Module):
    """A reducer that joins neighbouring features, then an MLP to the decoder's width.

    Args:
        width_in: channels of a feature.
        width_out: the decoder's hidden size.
        depth: linear layers.
        side: features joined a side (the 2x2 merge of Qwen2-VL has 2).
    """

    def __init__(self, width_in: int, width_out: int, depth: int, side: int = 1) -> None:
        super().__init__()
        self.side = side
        self.layers = mlp(width_in * side**2, width_out, depth)

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, N / side², width_out] for features [B, N, width_in] of a square grid."""
        if self.side > 1:
            features = join_neighbours(features, self.side)
        projected: Tensor = self.layers(features)
        return projected


def join_neighbours(features: Tensor, side: int) -> Tensor:
    """Join each side x side square of a raster of features: [B, N, C] to [B, N / side², side² C]."""
    batch, tokens, width = features.shape
    rows = math.isqrt(tokens)
    assert rows * rows == tokens and rows % side == 0, f"{tokens} features are no square that {side} divides"
    cells = features.view(batch, rows // side, side, rows // side, side, width)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(batch, tokens // side**2, side**2 * width)

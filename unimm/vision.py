"""Understanding encoders and the connectors that bring their features into the decoder's width."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

from unimm.configuration import VisionConfig


class VisionTower(nn.Module):
    """A timm vision transformer that gives its patch features; keys are timm's own, under `model.`."""

    model: Any

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # The pooling head serves the contrastive loss only; the stream reads patch features.
        self.model = timm.create_model(config.name, pretrained=False, num_classes=0, **config.kwargs)
        self.model.attn_pool = None
        self.model.fc_norm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, tokens, width] of pixels [B, 3, H, W] in [-1, 1]."""
        features: Tensor = self.model.forward_features(pixels)
        return features


def mlp(width_in: int, width_out: int, depth: int) -> nn.Sequential:
    """Return Janus's connector: `depth` linear layers with a GELU between (Janus `mlp_gelu`)."""
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


class Connector(nn.Module):
    """Joins neighbouring features where asked, then an MLP to the decoder's width.

    Args:
        width_in: channels of a feature.
        width_out: the decoder's hidden size.
        depth: linear layers.
        merge: features joined a side (the 2x2 merge of Qwen2-VL has 2).
    """

    def __init__(self, width_in: int, width_out: int, depth: int, merge: int = 1) -> None:
        super().__init__()
        self.merge = merge
        self.layers = mlp(width_in * merge**2, width_out, depth)

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, N / merge², width_out] for features [B, N, width_in] of a square grid."""
        if self.merge > 1:
            features = merge_neighbours(features, self.merge)
        projected: Tensor = self.layers(features)
        return projected


def merge_neighbours(features: Tensor, merge: int) -> Tensor:
    """Join each merge x merge square of a raster of features: [B, N, C] to [B, N / merge², merge² C]."""
    batch, tokens, width = features.shape
    side = int(tokens**0.5)
    assert side * side == tokens and side % merge == 0, (
        f"{tokens} features are no square that {merge} divides"
    )
    cells = features.view(batch, side // merge, merge, side // merge, merge, width)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(batch, tokens // merge**2, merge**2 * width)


def scatter_rows(target: Tensor, mask: Tensor, rows: Tensor, what: str) -> Tensor:
    """Return `target` [B, T, C] with its masked positions filled, in order, by `rows` [N, C].

    Raises:
        ValueError: the number of rows is not that of the masked positions.
    """
    places = int(mask.sum())
    if places != rows.shape[0]:
        raise ValueError(f"{what}: {rows.shape[0]} given, but the tokens have room for {places}")
    return target.masked_scatter(mask.unsqueeze(-1), rows.to(target.dtype)) if places else target

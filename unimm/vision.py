"""Understanding encoders and the connectors that bring their features into the decoder's width."""

from __future__ import annotations

import itertools
from typing import Any

import timm
from timm.layers.norm import LayerNorm2d
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from unimm.configuration import VisionConfig


class ConvStem(PatchEmbed):
    """Patch embedding by 3x3 convolutions that each halve the picture (Xiao et al. 2021, arXiv 2106.14881).

    A small ViT trained from nothing learns from several times fewer pictures with it than with one wide
    convolution. Normalised at each pixel over its channels, so that colours stay.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int = 3, embed_dim: int = 768, **options: Any
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        levels = patch_size.bit_length() - 1
        if patch_size != 2**levels or embed_dim % 2 ** (levels - 1):
            raise ValueError(
                f"patch_size: {patch_size}; a convolutional stem needs a power of 2 that fits the width"
            )
        widths = [in_chans, *(embed_dim // 2 ** (levels - 1 - level) for level in range(levels))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))  # type: ignore[assignment]


def create_encoder(name: str, stem: str = "patch", **kwargs: Any) -> Any:
    """Create a timm vision transformer without a classifier and without weights.

    Args:
        name: as timm has it.
        stem: "patch" for timm's own patch embedding, "conv" for a `ConvStem`.
        **kwargs: what else `timm.create_model` takes.
    """
    if stem == "conv":
        kwargs["embed_layer"] = ConvStem
    return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)


class VisionTower(nn.Module):
    """A timm vision transformer that gives its patch features; keys are timm's own, under `model.`."""

    model: Any

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # The pooling head serves the contrastive loss only; the stream reads patch features.
        self.model = create_encoder(config.name, **config.kwargs)
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

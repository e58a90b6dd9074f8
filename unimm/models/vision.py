"""Understanding encoders: pixels to features."""

from __future__ import annotations

import itertools
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from torch import Tensor, nn

from unimm.models.parts import EncoderConfig, TimmEncoderConfig


class ConvStem(PatchEmbed):
    """Patch embedding by 3x3 convolutions that each halve the image (Xiao et al. 2021, arXiv 2106.14881).

    A small ViT trained from nothing learns from several times fewer images with it than with one wide
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
    if torch.get_default_device().type == "meta" and is_model_in_modules(name, {"vision_transformer"}):
        kwargs.setdefault("weight_init", "skip")  # of weights without numbers; it takes most of the time
    return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)


class VisionTower(nn.Module):
    """A timm vision transformer that gives its patch features; keys are timm's own, under `model.`."""

    model: Any

    def __init__(self, config: TimmEncoderConfig) -> None:
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


def build_encoder(config: EncoderConfig | None) -> VisionTower | None:
    """Return the encoder of a kind; None where there is none, or where the image tokenizer serves as one."""
    return VisionTower(config) if isinstance(config, TimmEncoderConfig) else None

"""Understanding encoders: views of images, as pixels, to features.

An encoder of square views gives as many features for each; one of views of any size gives all of them in a row, view by
view, each from the top left. Shape suffixes: V views, P features of all views, C width.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from unimm.models.encoders import foreign_config
from unimm.models.losses import most_calls
from unimm.models.parts import (
    EncoderConfig,
    LinearEncoderConfig,
    NaflexEncoderConfig,
    TiledEncoderConfig,
    TimmEncoderConfig,
    TransformersEncoderConfig,
)
from unimm.models.stems import STEMS, conv_stem
from unimm.models.tiled import TiledTower


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
        layers = [*conv_stem(patch_size, in_chans, embed_dim), nn.Conv2d(embed_dim, embed_dim, 1)]
        self.proj = nn.Sequential(*layers)  # type: ignore[assignment]


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
        if config.layers:
            self.model.norm = nn.Identity()  # states of inner blocks are taken without it

    def forward(
        self,
        pixels: Tensor,
        sizes: Tensor | None = None,
        lockstep: bool = False,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """Return features [V, tokens, C] of pixels [V, 3, H, W], normalised; nothing else is asked for."""
        if not self.config.layers:
            features: Tensor = self.model.forward_features(pixels)
            return features[:, self.model.num_prefix_tokens :]
        states = self.model.forward_intermediates(
            pixels,
            indices=list(self.config.layers),
            stop_early=not self.training,  # in training every block has a gradient, if one of 0
            output_fmt="NLC",
            intermediates_only=True,
        )
        found = dict(zip(sorted(set(self.config.layers)), states, strict=True))
        return torch.cat([found[layer] for layer in self.config.layers], dim=-1)

    def checkpoint(self, wanted: bool) -> None:
        """Whether activations are computed again in the backward pass."""
        self.model.set_grad_checkpointing(wanted)


class NativeTower(nn.Module):
    """Base of encoders that take views of any size; views of one size go through together, without padding.

    Attributes:
        patch: pixels a side of a feature.
        side: features a side of every view; 0: views keep their own sizes.
    """

    patch: int
    side: int = 0

    def encode(self, pixels: Tensor) -> Tensor:
        """Return features [V, t, C] of views of one size [V, 3, H, W], which is a multiple of `patch`."""
        raise NotImplementedError

    def checkpoint(self, wanted: bool) -> None:
        """Whether activations are computed again in the backward pass; by default they are not."""

    def forward(
        self,
        pixels: Tensor,
        sizes: Tensor | None = None,
        lockstep: bool = False,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """Return features [V, tokens, C] where `side` says how many, else [P, C].

        Args:
            pixels: [V, 3, H, W], normalised, filled up on the right and below.
            sizes: int64 [V, 2], height and width of each without that filling; None: all of it.
            lockstep: whether all processes run the encoder equally often; needs a process group.
            tiles: of no meaning here, views being looked at one by one.
        """
        if self.side:
            return self.encode(pixels)
        whole = [list(pixels.shape[-2:])] * len(pixels) if sizes is None else sizes.tolist()
        shapes = [self.shape(height, width) for height, width in whole]
        groups = {
            shape: [i for i, own in enumerate(shapes) if own == shape] for shape in dict.fromkeys(shapes)
        }
        found: list[Tensor | None] = [None] * len(pixels)
        for (rows, columns), members in groups.items():
            views = pixels[members, :, : rows * self.patch, : columns * self.patch]
            for member, features in zip(members, self.encode(views), strict=True):
                found[member] = features
        features = torch.cat([one for one in found if one is not None])
        for _ in range(most_calls(len(groups)) - len(groups) if lockstep else 0):
            features = features + 0 * self.encode(pixels[:1, :, : self.blank, : self.blank]).mean()
        return features

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features of a view; a patch that lies in it in part counts."""
        return -(-height // self.patch), -(-width // self.patch)

    @property
    def blank(self) -> int:
        """Pixels a side of the smallest view."""
        return self.patch


class NaflexTower(NativeTower):
    """timm's NaFlexViT with rotary positions of rows and columns; keys are timm's own, under `model.`.

    Those of a convolutional stem are under `stem.`.
    """

    def __init__(self, config: NaflexEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch, self.frames, self.side = config.patch, config.frames, config.side
        channels, stem = 3 * config.frames, STEMS.get(config.stem)
        self.stem = stem(config.patch, channels, config.width) if stem else None
        options = NaFlexVitCfg(
            patch_size=1 if stem else config.patch, embed_dim=config.width, depth=config.depth, num_heads=config.heads,
            mlp_ratio=config.mlp_ratio, act_layer=config.act, qkv_bias=True, pos_embed="none", rope_type="axial",
            rope_rotate_half=True, final_norm=False, fc_norm=False, global_pool="", class_token=False, reg_tokens=0,
            patchify_channels_last=False,
        )  # fmt: skip
        self.model: Any = NaFlexVit(options, in_chans=config.width if stem else channels, num_classes=0)
        self.model.embeds.proj.register_parameter("bias", None)  # Qwen2-VL's convolution has none

    def checkpoint(self, wanted: bool) -> None:
        """See `NativeTower`."""
        self.model.set_grad_checkpointing(wanted)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `NativeTower`."""
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        # of a channel: one frame after the other, alike where it is an image
        frames = pixels.repeat_interleave(3 * self.frames // pixels.shape[1], dim=1)
        if self.stem is None:
            patches = F.unfold(frames, self.patch, stride=self.patch).transpose(1, 2)
        else:
            patches = self.stem(frames).flatten(2).transpose(1, 2)
        coordinates = torch.cartesian_prod(
            torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
        )
        coordinates = coordinates.view(1, -1, 2).expand(len(pixels), -1, -1)
        features: Tensor = self.model.forward_features(patches, patch_coord=coordinates)["patches"]
        return features


class TransformersTower(NativeTower):
    """An encoder of transformers without its final norm; keys are its own, under `model.`."""

    def __init__(self, config: TransformersEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch, self.side, self.name = config.patch, config.side, config.name
        self.model: Any = AutoModel.from_config(
            foreign_config(config.name, config.kwargs),
            dtype=torch.get_default_dtype(),
            trust_remote_code=False,
        )
        for norm in ("post_layernorm", "layernorm"):
            if hasattr(self.model, norm):
                setattr(self.model, norm, nn.Identity())

    def checkpoint(self, wanted: bool) -> None:
        """See `NativeTower`."""
        (self.model.gradient_checkpointing_enable if wanted else self.model.gradient_checkpointing_disable)()

    def encode(self, pixels: Tensor) -> Tensor:
        """See `NativeTower`."""
        features: Tensor
        if self.name == "pixtral":
            return self._pixtral(pixels)
        if self.name == "idefics3_vision":
            shape = (len(pixels), *(side // self.patch for side in pixels.shape[-2:]))
            everywhere = torch.ones(shape, dtype=torch.bool, device=pixels.device)
            embedded = self.model.embeddings(pixel_values=pixels, patch_attention_mask=everywhere)
            features = self.model.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
            return features
        features = self.model.encoder(self.model.embeddings(pixels)).last_hidden_state
        return features[:, 1:]  # the first is of no patch

    def _pixtral(self, pixels: Tensor) -> Tensor:
        """Pixtral's own forward makes one row of all views, and so a mask of the square of all their features."""
        patches = self.model.patch_conv(pixels)
        rows, columns = patches.shape[-2:]
        stream = self.model.ln_pre(patches.flatten(2).transpose(1, 2))
        where = torch.cartesian_prod(*(torch.arange(n, device=pixels.device) for n in (rows, columns)))
        turns = self.model.patch_positional_embedding(stream, where)
        features: Tensor = self.model.transformer(
            stream, attention_mask=None, position_embeddings=turns
        ).last_hidden_state
        return features


class LinearTower(NativeTower):
    """A projection of the pixels of each patch, by row, column and channel (Fuyu)."""

    def __init__(self, config: LinearEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        self.model = nn.Linear(3 * config.patch**2, config.width)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `NativeTower`."""
        patches = F.unfold(pixels, self.patch, stride=self.patch)  # [V, channel row column, t]
        by_pixel = patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)
        features: Tensor = self.model(by_pixel.transpose(1, 2))
        return features


Encoder = VisionTower | NativeTower | TiledTower


def build_encoder(config: EncoderConfig | None) -> Encoder | None:
    """Return the encoder of a kind; None where there is none, or where the image tokenizer serves as one."""
    if isinstance(config, TimmEncoderConfig):
        return VisionTower(config)
    if isinstance(config, NaflexEncoderConfig):
        return NaflexTower(config)
    if isinstance(config, TransformersEncoderConfig):
        return TransformersTower(config)
    if isinstance(config, TiledEncoderConfig):
        return TiledTower(config)
    return LinearTower(config) if isinstance(config, LinearEncoderConfig) else None

"""The image tokenizer: images to a grid of discrete codes and back.

A convolutional encoder and decoder built from diffusers' `VQModel` blocks around a quantiser of any kind
(`unimm.models.image_tokenizers.quantizers`); by default an l2-normalised codebook of few dimensions, as in ViT-VQGAN
and LlamaGen. Every size is read from the configuration, so LlamaGen's VQ-16 and a tokenizer that trains on one CPU
core are the same class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from unimm.models.configs import common_options
from unimm.models.image_tokenizers.quantizers import (
    Quantizer,
    QuantizerSettings,
    VectorSettings,
    make_quantizer,
    read_settings,
)
from unimm.models.image_tokenizers.sizes import VQSizes
from unimm.models.weights import StrictModel
from unimm.sections import validate

# What configurations mean that were written when there was one kind of quantiser, and leave these keys out.
_EARLIER = {"dead_code_threshold": 0.0, "kmeans_init": False}
CHANNELS = (32, 64, 96, 128)  # of the levels, where a configuration does not say


class Reconstruction(NamedTuple):
    """What a forward pass returns: everything a loss may need.

    pixels: float [B, 3, H, W], not clamped, so that gradients reach values outside [-1, 1].
    codes: int64 [B, h, w].
    commitment: scalar; the quantiser's own losses, such as the pull of latents towards code vectors, weighted.
    """

    pixels: Tensor
    codes: Tensor
    commitment: Tensor


class ImageTokenizerConfig(PreTrainedConfig):
    """Sizes of an `ImageTokenizer`.

    Args:
        **fields: those of `VQSizes`, the settings of a `VectorSettings` among them or under `quantizer`, and what
            transformers writes into any config.

    Attributes:
        image_size: side of the square images that it is trained on; other sizes work too.
        patch_size: pixels a side folded into channels before the first convolution (1: none). Convolutions
            at full resolution dominate the cost on a CPU, and 2 spares them.
        block_out_channels: channels of each level, finest first; each level but the last halves the grid.
        layers_per_block: residual blocks a level (the decoder has one more).
        attention_levels: levels (0 is the finest) with self-attention in their blocks.
        mid_attention: whether the block at the coarsest grid has self-attention.
        norm_num_groups: groups of the group normalisation; must divide every channel count.
        latent_channels: channels between the convolutional networks and the quantiser's 1x1 projections.
        linear_shortcut: add a linear map beside encoder and decoder, from each code's square of pixels to its
            latent and back (residual autoencoding, arXiv 2410.10733). It finds the colours within some dozen
            steps and spreads the latents over all dimensions, so a short training gets much further.
        latent_norm: standardise each latent dimension (batch normalisation without scale and shift). Else the
            latents' common mean puts all directions close together, and few codes are distinguished.
        quantizer: kind and settings of the quantiser, one of the module `quantizers`' `QuantizerSettings` as plain
            values.

    Raises:
        UserError: a value is of the wrong type or out of range, they do not go together, or a key is unknown.
    """

    model_type = "unimm_vq"

    def __init__(self, **fields: Any) -> None:
        vector = {name: fields.pop(name) for name in VectorSettings.model_fields if name in fields}
        own = {name: fields.pop(name) for name in VQSizes.model_fields if name in fields}
        own.setdefault("block_out_channels", CHANNELS)
        if own.get("quantizer") is None:
            own["quantizer"] = {"kind": "vq", **_EARLIER, **vector}
        sizes = validate(VQSizes, own, "")
        self.image_size = sizes.image_size
        self.patch_size = sizes.patch_size
        self.block_out_channels = sizes.block_out_channels
        self.layers_per_block = sizes.layers_per_block
        self.attention_levels = sizes.attention_levels
        self.mid_attention = sizes.mid_attention
        self.norm_num_groups = sizes.norm_num_groups
        self.latent_channels = sizes.latent_channels
        self.linear_shortcut = sizes.linear_shortcut
        self.latent_norm = sizes.latent_norm
        self.quantizer = sizes.quantizer.model_dump()
        super().__init__(**common_options(fields))

    @property
    def quantizer_settings(self) -> QuantizerSettings:
        """The quantiser's settings, typed."""
        return read_settings(self.quantizer)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer_settings.codebook_size

    @property
    def codebook_dim(self) -> int:
        """Dimensions of what the quantiser sees."""
        return self.quantizer_settings.codebook_dim

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return int(self.patch_size * 2 ** (len(self.block_out_channels) - 1))

    @property
    def grid_size(self) -> int:
        """Codes a side of an image of `image_size`."""
        return self.image_size // self.stride


class LatentNorm(nn.BatchNorm2d):
    """Batch normalisation without scale and shift, over the latents of all processes (torch's own needs a GPU)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Standardise latents [B, D, h, w]; in training by the step's own mean and variance."""
        distributed = torch.distributed
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(latents)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        numbers = latents.float()
        count = numbers.new_tensor([numbers.numel() / numbers.shape[1]])
        total: Tensor = all_reduce(torch.cat([numbers.sum((0, 2, 3)), count]))
        mean = total[:-1] / total[-1]
        centred = numbers - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / total[-1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total[-1] / (total[-1] - 1), self.momentum)
        normal: Tensor = centred * (variance + self.eps).rsqrt().view(1, -1, 1, 1)
        return normal.to(latents.dtype)


def _block_types(config: ImageTokenizerConfig, plain: str, attention: str) -> tuple[str, ...]:
    """Name diffusers' block for each level, finest first."""
    levels = range(len(config.block_out_channels))
    return tuple(attention if level in config.attention_levels else plain for level in levels)


class ImageTokenizer(StrictModel):
    """VQ autoencoder with the two calls that the rest of the package uses, `encode` and `decode`."""

    config: ImageTokenizerConfig
    config_class = ImageTokenizerConfig
    base_model_prefix = "image_tokenizer"
    main_input_name = "pixels"

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        channels = tuple(config.block_out_channels)
        folded = 3 * config.patch_size**2
        self.encoder = Encoder(
            in_channels=folded,
            out_channels=config.latent_channels,
            down_block_types=_block_types(config, "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            block_out_channels=channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            double_z=False,
            mid_block_add_attention=config.mid_attention,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.quantize: Quantizer = make_quantizer(config.quantizer_settings)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)
        self.decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=folded,
            # the decoder runs from the coarsest level, so its names are given in reverse
            up_block_types=_block_types(config, "UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
            block_out_channels=channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_attention,
        )
        if config.linear_shortcut:
            square = 3 * config.stride**2
            self.shortcut_in = nn.Conv2d(square, config.codebook_dim, 1, bias=False)
            self.shortcut_out = nn.Conv2d(config.codebook_dim, square, 1)
        self.latent_norm = LatentNorm(config.codebook_dim) if config.latent_norm else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep PyTorch's own initialisation; only restore what of the quantiser is never saved."""
        if isinstance(module, Quantizer):
            module.restore()

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return self.config.stride

    @property
    def vectors(self) -> Tensor:
        """The code vectors [codebook_size, codebook_dim], as they are stored."""
        return self.quantize.vectors

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution, at which an adaptive adversarial weight is measured."""
        return self.decoder.conv_out.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """Return what the quantiser sees, float [B, codebook_dim, h, w], for pixels [B, 3, H, W]."""
        folded = F.pixel_unshuffle(pixels, self.config.patch_size)
        # channels innermost: a third faster on a CPU, and all that follows keeps the order
        folded = folded.contiguous(memory_format=torch.channels_last)
        latents = self.quant_conv(self.encoder(folded))
        if self.config.linear_shortcut:
            latents = latents + self.shortcut_in(F.pixel_unshuffle(pixels, self.stride))
        normal: Tensor = self.latent_norm(latents)
        return normal

    def pixels(self, quantized: Tensor) -> Tensor:
        """Return pixels float [B, 3, H, W], not clamped, for code vectors [B, codebook_dim, h, w]."""
        pixels = F.pixel_shuffle(self.decoder(self.post_quant_conv(quantized)), self.config.patch_size)
        if self.config.linear_shortcut:
            pixels = pixels + F.pixel_shuffle(self.shortcut_out(quantized), self.stride)
        return pixels

    def forward(self, pixels: Tensor, blend: float = 1.0) -> Reconstruction:
        """Encode, quantise and decode; in training mode this also moves the codebook.

        Args:
            pixels: float [B, 3, H, W] in [-1, 1].
            blend: how much of the quantisation the decoder sees: 1 code vectors, 0 the latents' own
                directions. Training from 0 on lets the latents spread over all dimensions before codes pin
                them.
        """
        latents = self.latents(pixels)
        quantized, codes, commitment = self.quantize(latents)
        if blend < 1:
            quantized = torch.lerp(self.quantize.plain(latents), quantized, blend)
        return Reconstruction(self.pixels(quantized), codes, commitment * blend)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn images into codes.

        Args:
            pixels: float [B, 3, H, W] in [-1, 1], both sides multiples of `stride`.

        Returns:
            int64 codes [B, H / stride, W / stride], each in [0, codebook_size).

        Raises:
            ValueError: if the pixels have another shape.
        """
        check_pixels(pixels, self.stride)
        moving = self.latent_norm.training
        self.latent_norm.eval()  # codes must not move its statistics, even while a parent trains
        try:
            latents = self.latents(pixels)
        finally:
            self.latent_norm.train(moving)
        return self.quantize.codes(latents)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into images.

        Args:
            codes: integers [B, h, w] in [0, codebook_size).

        Returns:
            float [B, 3, h * stride, w * stride] in [-1, 1].

        Raises:
            ValueError: if the codes have another shape, are no integers or are out of range.
        """
        check_codes(codes, self.config.codebook_size)
        quantized = self.quantize.lookup(codes.long())
        return self.pixels(quantized.to(self.dtype)).clamp(-1.0, 1.0)


def check_pixels(pixels: Tensor, stride: int) -> None:
    """Raise a `ValueError` unless pixels are [B, 3, H, W] with both sides multiples of `stride`."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected [B, 3, H, W], got {list(pixels.shape)}")
    height, width = pixels.shape[-2:]
    if height % stride or width % stride or not (height and width):
        raise ValueError(
            f"pixels: {width}x{height} is not a multiple of {stride}; resize or pad the image first"
        )


def check_codes(codes: Tensor, size: int) -> None:
    """Raise a `ValueError` unless codes are integers [B, h, w] in [0, size)."""
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(f"codes: expected integers [B, h, w], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes: {int(codes.min())}..{int(codes.max())} is outside 0..{size - 1}")


AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig)
AutoModel.register(ImageTokenizerConfig, ImageTokenizer)

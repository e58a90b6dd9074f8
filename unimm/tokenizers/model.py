"""The image tokenizer: pictures to a grid of discrete codes and back.

A convolutional encoder and decoder built from diffusers' `VQModel` blocks around an l2-normalised codebook
from vector-quantize-pytorch (the quantiser of ViT-VQGAN and LlamaGen: few dimensions, cosine distance,
codes that fall out of use restarted from the batch). Every size is read from the configuration, so LlamaGen's
VQ-16 and a tokenizer that trains on one CPU core are the same class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from vector_quantize_pytorch import VectorQuantize


class Reconstruction(NamedTuple):
    """What a forward pass returns: everything a loss may need.

    pixels: float [B, 3, H, W], not clamped, so that gradients reach values outside [-1, 1].
    codes: int64 [B, h, w].
    commitment: scalar; pulls the encoder towards its code vectors (already times its weight).
    """

    pixels: Tensor
    codes: Tensor
    commitment: Tensor


class ImageTokenizerConfig(PreTrainedConfig):
    """Sizes of an `ImageTokenizer`.

    Args:
        image_size: side of the square pictures that it is trained on; other sizes work too.
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
            latents' common mean puts all directions close together, and few codes are told apart.
        codebook_size: number of codes.
        codebook_dim: dimension in which codes are compared, kept small so that all of them get used.
        commitment_weight: weight of the commitment loss.
        codebook_decay: decay of the moving average that trains the codebook.
        dead_code_threshold: a code whose moving count of uses falls below this is restarted from the batch.
        kmeans_init: start the codebook as k-means of the first training batch.
        rotation_trick: pass gradients by rotation (arXiv 2410.06424) instead of straight through.
    """

    model_type = "unimm_vq"

    def __init__(
        self,
        image_size: int = 64,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] | list[int] = (32, 64, 96, 128),
        layers_per_block: int = 1,
        attention_levels: tuple[int, ...] | list[int] = (),
        mid_attention: bool = False,
        norm_num_groups: int = 8,
        latent_channels: int = 64,
        linear_shortcut: bool = False,
        latent_norm: bool = False,
        codebook_size: int = 512,
        codebook_dim: int = 8,
        commitment_weight: float = 0.25,
        codebook_decay: float = 0.99,
        dead_code_threshold: float = 0.0,
        kmeans_init: bool = False,
        rotation_trick: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.block_out_channels = list(block_out_channels)
        self.layers_per_block = layers_per_block
        self.attention_levels = list(attention_levels)
        self.mid_attention = mid_attention
        self.norm_num_groups = norm_num_groups
        self.latent_channels = latent_channels
        self.linear_shortcut = linear_shortcut
        self.latent_norm = latent_norm
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_weight = commitment_weight
        self.codebook_decay = codebook_decay
        self.dead_code_threshold = dead_code_threshold
        self.kmeans_init = kmeans_init
        self.rotation_trick = rotation_trick
        super().__init__(**kwargs)

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return int(self.patch_size * 2 ** (len(self.block_out_channels) - 1))

    @property
    def grid_size(self) -> int:
        """Codes a side of a picture of `image_size`."""
        return self.image_size // self.stride


def _block_types(config: ImageTokenizerConfig, plain: str, attention: str) -> tuple[str, ...]:
    """Name diffusers' block for each level, finest first."""
    levels = range(len(config.block_out_channels))
    return tuple(attention if level in config.attention_levels else plain for level in levels)


class ImageTokenizer(PreTrainedModel):
    """VQ autoencoder with the two calls that the rest of the package uses, `encode` and `decode`.

    Raises:
        ValueError: if a channel count is not a multiple of `norm_num_groups`.
    """

    config: ImageTokenizerConfig
    config_class = ImageTokenizerConfig
    base_model_prefix = "image_tokenizer"
    main_input_name = "pixels"

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__(config)
        for width in config.block_out_channels:
            if width % config.norm_num_groups:
                groups = f"norm_num_groups={config.norm_num_groups}"
                raise ValueError(f"block_out_channels: {width} is not a multiple of {groups}")
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
        self.quantize = VectorQuantize(
            dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=True,
            accept_image_fmap=True,
            decay=config.codebook_decay,
            commitment_weight=config.commitment_weight,
            threshold_ema_dead_code=config.dead_code_threshold,
            kmeans_init=config.kmeans_init,
            rotation_trick=config.rotation_trick,
        )
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
        self.latent_norm = (
            nn.BatchNorm2d(config.codebook_dim, affine=False) if config.latent_norm else nn.Identity()
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep PyTorch's own initialisation; only restore the quantiser's constant, which is never saved."""
        if isinstance(module, VectorQuantize):
            module.zero.zero_()

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return self.config.stride

    @property
    def vectors(self) -> Tensor:
        """The code vectors [codebook_size, codebook_dim], as they are stored."""
        vectors: Tensor = self.quantize.codebook
        return vectors

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
            quantized = torch.lerp(F.normalize(latents, dim=1), quantized, blend)
        return Reconstruction(self.pixels(quantized), codes, commitment * blend)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pictures into codes.

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
            latents = F.normalize(self.latents(pixels).float(), dim=1)
        finally:
            self.latent_norm.train(moving)
        directions = self._directions().float()
        # picture by picture: all similarities of a batch at 384 pixels and 16,384 codes would take gigabytes
        codes = [torch.einsum("dhw,kd->hwk", one, directions).argmax(-1) for one in latents]
        return torch.stack(codes)

    def _directions(self) -> Tensor:
        """Code vectors [codebook_size, codebook_dim] of length 1; a published codebook is not stored so."""
        return F.normalize(self.vectors, dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into pictures.

        Args:
            codes: integers [B, h, w] in [0, codebook_size).

        Returns:
            float [B, 3, h * stride, w * stride] in [-1, 1].

        Raises:
            ValueError: if the codes have another shape, are no integers or are out of range.
        """
        check_codes(codes, self.config.codebook_size)
        quantized = self._directions()[codes.long()].movedim(-1, 1)  # [B, codebook_dim, h, w]
        return self.pixels(quantized.to(self.dtype)).clamp(-1.0, 1.0)


def check_pixels(pixels: Tensor, stride: int) -> None:
    """Raise a `ValueError` unless pixels are [B, 3, H, W] with both sides multiples of `stride`."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected [B, 3, H, W], got {list(pixels.shape)}")
    height, width = pixels.shape[-2:]
    if height % stride or width % stride or not (height and width):
        raise ValueError(
            f"pixels: {width}x{height} is not a multiple of {stride}; resize or pad the picture first"
        )


def check_codes(codes: Tensor, size: int) -> None:
    """Raise a `ValueError` unless codes are integers [B, h, w] in [0, size)."""
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(f"codes: expected integers [B, h, w], got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ValueError(f"codes: {int(codes.min())}..{int(codes.max())} is outside 0..{size - 1}")


AutoConfig.register(ImageTokenizerConfig.model_type, ImageTokenizerConfig)
AutoModel.register(ImageTokenizerConfig, ImageTokenizer)

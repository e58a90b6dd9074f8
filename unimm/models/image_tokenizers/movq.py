"""Emu3's image tokenizer: MoVQ with convolutions over time, from diffusers' blocks and a few of our own.

An image is a film of as many equal frames as one code spans in time. Encoder and decoder work frame by frame, so
here an image goes through them once and is repeated, or cut to its first frame, where time begins. The film side
is whole (`encode_frames`, `decode_frames`).

Source: baaivision/Emu3 `emu3/tokenizer/modeling_emu3visionvq.py`; transformers `Emu3VQVAE`; MoVQ is
arXiv 2209.09002.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from unimm.models.configs import common_options
from unimm.models.image_tokenizers.sizes import MoVQSizes
from unimm.models.image_tokenizers.vq import check_codes, check_pixels
from unimm.models.weights import StrictModel
from unimm.sections import validate

Triple = tuple[int, int, int]


class MoVQConfig(PreTrainedConfig):
    """Sizes of a `MoVQTokenizer`.

    Args:
        image_size: side of the square images that it usually draws; other sizes work too.
        block_out_channels: channels of each level, finest first; each level but the last halves the grid.
        layers_per_block: residual blocks a level (the decoder has one more), and of each stack over time.
        attention_levels: levels (0 is the finest) with self-attention in their blocks.
        norm_num_groups: groups of the encoder's group normalisation.
        latent_channels: channels of the latents; the codebook has as many dimensions.
        codebook_size: number of codes.
        halvings: how many times the number of frames is halved.

    Raises:
        UserError: a value is of the wrong type or out of range, they do not go together, or a key is unknown.
    """

    model_type = "unimm_movq"

    def __init__(
        self,
        image_size: int = 720,
        block_out_channels: Sequence[int] = (256, 512, 512, 1024),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (3,),
        norm_num_groups: int = 32,
        latent_channels: int = 4,
        codebook_size: int = 32768,
        halvings: int = 2,
        **kwargs: Any,
    ) -> None:
        sizes = validate(
            MoVQSizes,
            {
                "image_size": image_size,
                "block_out_channels": block_out_channels,
                "layers_per_block": layers_per_block,
                "attention_levels": attention_levels,
                "norm_num_groups": norm_num_groups,
                "latent_channels": latent_channels,
                "codebook_size": codebook_size,
                "halvings": halvings,
            },
            "",
        )
        self.image_size = sizes.image_size
        self.block_out_channels = sizes.block_out_channels
        self.layers_per_block = sizes.layers_per_block
        self.attention_levels = sizes.attention_levels
        self.norm_num_groups = sizes.norm_num_groups
        self.latent_channels = sizes.latent_channels
        self.codebook_size = sizes.codebook_size
        self.halvings = sizes.halvings
        super().__init__(**common_options(kwargs))

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def frames(self) -> int:
        """Frames that one code stands for."""
        return int(2**self.halvings)


class CausalConv3d(nn.Module):
    """A convolution over films [B, C, T, h, w] that sees its own frame and earlier ones, never later ones."""

    def __init__(self, width_in: int, width_out: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        # Padding in time is 2 whatever the kernel, as the original has it.
        self.padding = [side for size in (kernel[2], kernel[1]) for side in (size // 2, size // 2)] + [2, 0]
        self.conv = nn.Conv3d(width_in, width_out, kernel, stride)

    def forward(self, film: Tensor) -> Tensor:
        """Return [B, C', T', h, w]."""
        result: Tensor = self.conv(F.pad(film, self.padding))
        return result


class TemporalResidual(nn.Module):
    """A residual block over films [B, C, T, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        self.conv1, self.conv2 = (CausalConv3d(width, width, (3, 3, 3)) for _ in range(2))

    def forward(self, film: Tensor) -> Tensor:
        """Return [B, C, T, h, w]."""
        inner = self.conv1(F.silu(self.norm1(film)))
        result: Tensor = film + self.conv2(F.silu(self.norm2(inner)))
        return result


class TemporalResample(nn.Module):
    """Halves the frames of a film [B, C, T, h, w] by a strided convolution, or repeats each before a plain one."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        kernel, stride = ((3, 3, 3), (1, 1, 1)) if up else ((4, 3, 3), (2, 1, 1))
        self.conv = CausalConv3d(width, width, kernel, stride)

    def forward(self, film: Tensor) -> Tensor:
        """Return [B, C, 2T or T/2, h, w]."""
        if self.up:
            film = film.repeat_interleave(2, dim=2)
        result: Tensor = self.conv(film)
        return result


class TemporalStack(nn.Module):
    """Everything over time on one side: resampling and residual blocks, in the order of that side."""

    def __init__(self, config: MoVQConfig, up: bool) -> None:
        super().__init__()
        width = config.latent_channels
        self.up = up
        self.convs = nn.ModuleList(TemporalResample(width, up) for _ in range(config.halvings))
        self.residuals = nn.ModuleList(TemporalResidual(width) for _ in range(config.layers_per_block))

    def forward(self, film: Tensor) -> Tensor:
        """Return the film [B, C, T', h, w] at the other rate."""
        if self.up:
            film = self._through(self.residuals, film)
        for conv in self.convs:
            film = F.silu(conv(film))
        return film if self.up else self._through(self.residuals, film)

    @staticmethod
    def _through(blocks: nn.ModuleList, film: Tensor) -> Tensor:
        for block in blocks:
            film = block(film)
        return film


class MoVQTokenizer(StrictModel):
    """Emu3's tokenizer, with the two calls that the rest of the package uses, `encode` and `decode`."""

    config: MoVQConfig
    config_class = MoVQConfig
    base_model_prefix = "image_tokenizer"
    main_input_name = "pixels"

    def __init__(self, config: MoVQConfig) -> None:
        super().__init__(config)
        levels, latent = range(len(config.block_out_channels)), config.latent_channels

        def kinds(plain: str, attention: str) -> tuple[str, ...]:
            return tuple(attention if level in config.attention_levels else plain for level in levels)

        sizes: dict[str, Any] = {
            "block_out_channels": tuple(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
        }
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent,
            down_block_types=kinds("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            double_z=False,
            **sizes,
        )
        self.encoder_time = TemporalStack(config, up=False)
        self.quant_conv = CausalConv3d(latent, latent, (3, 1, 1))
        self.codebook = nn.Embedding(config.codebook_size, latent)
        self.post_quant_conv = CausalConv3d(latent, latent, (3, 1, 1))
        self.decoder_time = TemporalStack(config, up=True)
        self.decoder = Decoder(
            in_channels=latent,
            out_channels=3,
            # the decoder runs from the coarsest level, so its names are given in reverse
            up_block_types=kinds("UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
            norm_type="spatial",
            **sizes,
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Keep PyTorch's own initialisation."""

    @property
    def stride(self) -> int:
        """Pixels a side of the square that one code stands for."""
        return self.config.stride

    @property
    def vectors(self) -> Tensor:
        """The code vectors [codebook_size, latent_channels]."""
        vectors: Tensor = self.codebook.weight
        return vectors

    def _codes(self, latents: Tensor) -> Tensor:
        """Nearest codes [B, T, h, w] of latents [B, C, frames, h, w]."""
        film = self.quant_conv(self.encoder_time(latents)).permute(0, 2, 3, 4, 1)  # [B, T, h, w, C]
        table = self.codebook.weight
        nearest = [
            # |z|² is the same for all codes, so it decides nothing
            (table.square().sum(1) - 2 * one.float() @ table.T.float()).argmin(-1)
            for one in film.flatten(0, 1)
        ]
        return torch.stack(nearest).view(film.shape[:-1])

    def _latents(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads, for codes [B, T, h, w]: latents and code vectors, each [B, C, frames, h, w]."""
        quantized = self.codebook(codes).permute(0, 4, 1, 2, 3)
        both = self.decoder_time(torch.cat([self.post_quant_conv(quantized), quantized]))
        latents, vectors = both.chunk(2)
        return latents, vectors

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
        latents = self.encoder(pixels).unsqueeze(2)
        return self._codes(latents.repeat(1, 1, self.config.frames, 1, 1))[:, 0]

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
        latents, vectors = self._latents(codes.long().unsqueeze(1))
        pixels: Tensor = self.decoder(latents[:, :, 0], vectors[:, :, 0])
        return pixels.clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Return codes [B, T, h, w] of films [B, frames · T, 3, H, W] in [-1, 1]."""
        check_pixels(pixels.flatten(0, 1), self.stride)
        if pixels.shape[1] % self.config.frames:
            raise ValueError(f"pixels: {pixels.shape[1]} frames, expected a multiple of {self.config.frames}")
        latents = self.encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return self._codes(latents.transpose(1, 2))

    @torch.no_grad()
    def decode_frames(self, codes: Tensor) -> Tensor:
        """Return films [B, frames · T, 3, H, W] in [-1, 1] of codes [B, T, h, w]."""
        check_codes(codes.flatten(0, 1), self.config.codebook_size)
        latents, vectors = (film.transpose(1, 2) for film in self._latents(codes.long()))
        pixels: Tensor = self.decoder(latents.flatten(0, 1), vectors.flatten(0, 1))
        film: Tensor = pixels.clamp(-1.0, 1.0).unflatten(0, latents.shape[:2])
        return film


AutoConfig.register(MoVQConfig.model_type, MoVQConfig)
AutoModel.register(MoVQConfig, MoVQTokenizer)

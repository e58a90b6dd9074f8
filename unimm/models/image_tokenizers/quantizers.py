"""Quantisers of an image tokenizer: what turns latents into codes, one class for each kind, and their settings.

All but one are vector-quantize-pytorch's, with the same few calls laid over them: `forward`, `codes`, `lookup`,
`plain` and `vectors`. Shapes: B images, D dimensions of a latent, h x w its grid, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize, lookup_free_quantization

from unimm.sections import Rate, Section, validate

Codes = Annotated[int, Field(gt=0, le=2**20)]
Dimensions = Annotated[int, Field(gt=0, le=2**12)]


class VectorSettings(Section):
    """A codebook of unit vectors, compared by cosine (ViT-VQGAN, arXiv 2110.04627; LlamaGen, arXiv 2406.06525)."""

    kind: Literal["vq"] = "vq"
    codebook_size: Codes = 512
    codebook_dim: Dimensions = 8
    """Dimension in which codes are compared, kept small so that all of them get used."""
    commitment_weight: Rate = 0.25
    codebook_training: Literal["average", "gradient"] = "average"
    """By moving average of the latents that a code stands for, or by gradient, as LlamaGen does."""
    codebook_decay: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Of the moving average; like the three that follow, of no meaning where gradients train."""
    dead_code_threshold: Rate = 0.5
    """A code whose moving count of uses falls below this is restarted from the batch."""
    kmeans_init: bool = True
    """Start the codebook as k-means of the first training batch."""
    rotation_trick: bool = False
    """Pass gradients by rotation (arXiv 2410.06424) instead of straight through."""


class ScalarSettings(Section):
    """Finite scalar quantisation (FSQ, arXiv 2309.15505): each dimension is rounded to a few levels."""

    kind: Literal["fsq"]
    levels: Annotated[list[Annotated[int, Field(gt=2, le=2**10)]], Field(min_length=1, max_length=16)]
    """Levels of each dimension; their product is the number of codes."""

    @field_validator("levels")
    @classmethod
    def _product(cls, value: list[int]) -> list[int]:
        if math.prod(value) > 2**20:
            raise ValueError(f"expected a product of at most {2**20}, got {math.prod(value)}")
        return value

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    @property
    def codebook_dim(self) -> int:
        """Dimensions of a latent."""
        return len(self.levels)


class LookupFreeSettings(Section):
    """Lookup-free quantisation (LFQ, MAGVIT-v2, arXiv 2310.05737): the signs of the dimensions are the code."""

    kind: Literal["lfq"]
    codebook_size: Codes
    """A power of 2; its exponent is the number of dimensions."""
    entropy_weight: Rate = 0.1
    """Of the loss that makes each choice sure and the choices of a batch diverse."""
    diversity_weight: Rate = 1.0
    """Of the second of the two within it."""
    commitment_weight: Rate = 0.25

    @field_validator("codebook_size")
    @classmethod
    def _power(cls, value: int) -> int:
        if value < 2 or value & (value - 1):
            raise ValueError(f"expected a power of 2, got {value}")
        return value

    @property
    def codebook_dim(self) -> int:
        """Dimensions of a latent."""
        return self.codebook_size.bit_length() - 1


class LinearSettings(Section):
    """SimVQ (arXiv 2411.02038): random vectors that stay, seen through a linear layer that learns."""

    kind: Literal["simvq"]
    codebook_size: Codes
    codebook_dim: Dimensions
    commitment_weight: Rate = 0.25
    """Of the pull on the encoder; that on the codes counts once."""
    rotation_trick: bool = False


QuantizerSettings: TypeAlias = VectorSettings | ScalarSettings | LookupFreeSettings | LinearSettings
AnyQuantizer = Annotated[QuantizerSettings, Field(discriminator="kind")]


class _Held(Section):
    quantizer: AnyQuantizer


def read_settings(fields: Mapping[str, Any]) -> QuantizerSettings:
    """Return the settings that a configuration holds.

    Raises:
        UserError: in one line, with the key.
    """
    return validate(_Held, {"quantizer": dict(fields)}, "").quantizer


class Quantizer(nn.Module):
    """What all kinds are asked, and what most of them answer."""

    @property
    def vectors(self) -> Tensor:
        """What the codes stand for [K, D]."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """Numbers of the codebook that are no parameters."""
        return 0

    def restore(self) -> None:
        """Put back what is never saved."""

    def plain(self, latents: Tensor) -> Tensor:
        """What the decoder would see without quantisation, [B, D, h, w]."""
        return latents

    def codes(self, latents: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of latents [B, D, h, w]; nothing learns from them."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """What the decoder sees for codes [B, h, w]: [B, D, h, w]."""
        return self.vectors[codes].movedim(-1, 1)


class UnitCodebook(Quantizer):
    """Codes by direction: latents and vectors are compared, and seen by the decoder, at length 1.

    The vectors are as they are stored; a published codebook is not of length 1.
    """

    def plain(self, latents: Tensor) -> Tensor:
        """The latents at length 1."""
        return F.normalize(latents, dim=1)

    def codes(self, latents: Tensor) -> Tensor:
        """Codes of the vectors that point most as the latents do."""
        latents = F.normalize(latents.float(), dim=1)
        directions = F.normalize(self.vectors, dim=-1).float()
        # image by image: all similarities of a batch at 384 pixels and 16,384 codes would take gigabytes
        codes = [torch.einsum("dhw,kd->hwk", one, directions).argmax(-1) for one in latents]
        return torch.stack(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors at length 1."""
        return F.normalize(self.vectors, dim=-1)[codes].movedim(-1, 1)


class ImplicitCodebook(Quantizer):
    """Codes that follow from the settings: nothing to learn or save, but tables to make again."""

    settings: ScalarSettings | LookupFreeSettings

    def restore(self) -> None:
        """Put back the tables that are never saved."""
        with torch.device("cpu"):
            fresh = type(self)(self.settings)
        for name in self._non_persistent_buffers_set:
            getattr(self, name).copy_(getattr(fresh, name))

    def plain(self, latents: Tensor) -> Tensor:
        """The latents within [-1, 1], where the codes are."""
        return latents.tanh()


class AveragedCodebook(UnitCodebook, VectorQuantize):  # type: ignore[misc]
    """Unit vectors that follow their latents by moving average, over the latents of all processes."""

    codebook: Tensor
    zero: Tensor

    def __init__(self, settings: VectorSettings) -> None:
        super().__init__(
            dim=settings.codebook_dim,
            codebook_size=settings.codebook_size,
            use_cosine_sim=True,
            accept_image_fmap=True,
            decay=settings.codebook_decay,
            commitment_weight=settings.commitment_weight,
            threshold_ema_dead_code=settings.dead_code_threshold,
            kmeans_init=settings.kmeans_init,
            rotation_trick=settings.rotation_trick,
        )

    @property
    def vectors(self) -> Tensor:
        """The code vectors [K, D], as they are stored; a published codebook is not of length 1."""
        return self.codebook

    @property
    def stored(self) -> int:
        """Numbers of the codebook that are no parameters."""
        return self.vectors.numel()

    def restore(self) -> None:
        """Put back the constant that is never saved."""
        self.zero.zero_()


class LearnedCodebook(UnitCodebook):
    """Unit vectors that learn by gradient, as in LlamaGen; vector-quantize-pytorch averages such codebooks only.

    The loss pulls codes towards latents with weight 1 and latents towards codes with the commitment's.
    """

    def __init__(self, settings: VectorSettings) -> None:
        super().__init__()
        self.commitment_weight = settings.commitment_weight
        self.embedding = nn.Embedding(settings.codebook_size, settings.codebook_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    @property
    def vectors(self) -> Tensor:
        """The code vectors [K, D], as they are stored."""
        return self.embedding.weight

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return code vectors [B, D, h, w] with the latents' gradient, codes [B, h, w] and the loss."""
        with torch.autocast(latents.device.type, enabled=False):  # neighbours are closer than bfloat16 tells
            plain = self.plain(latents.float())
            with torch.no_grad():
                codes = self.codes(latents)
            chosen = self.lookup(codes)
            pull = F.mse_loss(chosen, plain.detach())
            loss = pull + self.commitment_weight * F.mse_loss(plain, chosen.detach())
            return plain + (chosen - plain).detach(), codes, loss


class ScalarQuantizer(ImplicitCodebook, FSQ):  # type: ignore[misc]
    """FSQ; it has no codebook and no loss, and a code's number counts through the levels."""

    implicit_codebook: Tensor

    def __init__(self, settings: ScalarSettings) -> None:
        with torch.device("cpu"):  # it counts its codes, which tensors without values cannot
            super().__init__(settings.levels)
        self.settings = settings

    @property
    def vectors(self) -> Tensor:
        """What the codes stand for [K, D], within [-1, 1]."""
        return self.implicit_codebook

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rounded latents [B, D, h, w] with the latents' gradient, codes [B, h, w] and 0 as the loss."""
        quantized, codes = FSQ.forward(self, latents)
        return quantized, codes.long(), latents.new_zeros((), dtype=torch.float32)

    def codes(self, latents: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of latents [B, D, h, w]."""
        codes: Tensor = FSQ.forward(self, latents.float())[1]
        return codes.long()


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, through which gradients pass."""
    from torch.distributed.nn.functional import all_reduce

    if not lookup_free_quantization.is_distributed():
        return tensor
    total: Tensor = all_reduce(tensor)
    return total / torch.distributed.get_world_size()


# Version 1.32 divides by the number of processes, but loses the sum before it.
lookup_free_quantization.maybe_distributed_mean = _mean_over_ranks


class LookupFreeQuantizer(ImplicitCodebook, LFQ):  # type: ignore[misc]
    """LFQ; its entropy loss takes [images x h x w, K] numbers of memory, so micro-batches are kept small."""

    codebook: Tensor
    mask: Tensor

    def __init__(self, settings: LookupFreeSettings) -> None:
        super().__init__(
            codebook_size=settings.codebook_size,
            entropy_loss_weight=settings.entropy_weight,
            diversity_gamma=settings.diversity_weight,
            commitment_loss_weight=settings.commitment_weight,
        )
        self.settings = settings

    @property
    def vectors(self) -> Tensor:
        """What the codes stand for [K, D], of -1 and 1."""
        return self.codebook

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return signs [B, D, h, w] with the latents' gradient, codes [B, h, w] and the loss."""
        quantized, codes, loss = LFQ.forward(self, latents)
        return quantized, codes.long(), loss

    def codes(self, latents: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of latents [B, D, h, w]; the first dimension is the highest bit."""
        bits = self.mask.long().view(1, -1, 1, 1)
        codes: Tensor = ((latents > 0) * bits).sum(1)
        return codes


class LinearCodebook(Quantizer, SimVQ):  # type: ignore[misc]
    """SimVQ: one linear layer moves all codes together, so none falls out of use."""

    codebook: Tensor
    frozen_codebook: Tensor

    def __init__(self, settings: LinearSettings) -> None:
        super().__init__(
            dim=settings.codebook_dim,
            codebook_size=settings.codebook_size,
            channel_first=True,
            rotation_trick=settings.rotation_trick,
            input_to_quantize_commit_loss_weight=settings.commitment_weight,
        )

    @property
    def vectors(self) -> Tensor:
        """The code vectors [K, D], through the linear layer."""
        return self.codebook

    @property
    def stored(self) -> int:
        """Numbers of the random vectors, which are no parameters."""
        return self.frozen_codebook.numel()

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return code vectors [B, D, h, w] with the latents' gradient, codes [B, h, w] and the loss."""
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = SimVQ.forward(self, latents.float())
        return quantized, codes, loss

    def codes(self, latents: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of latents [B, D, h, w]."""
        vectors = self.vectors.float()
        flat = latents.float().movedim(1, -1).flatten(1, 2)  # [B, h w, D]
        codes = [torch.cdist(one, vectors).argmin(-1) for one in flat]
        return torch.stack(codes).view(len(latents), *latents.shape[-2:])


def make_quantizer(settings: QuantizerSettings) -> Quantizer:
    """Return the quantiser that settings describe, with fresh weights."""
    if isinstance(settings, VectorSettings):
        averaged = settings.codebook_training == "average"
        return AveragedCodebook(settings) if averaged else LearnedCodebook(settings)
    if isinstance(settings, ScalarSettings):
        return ScalarQuantizer(settings)
    if isinstance(settings, LookupFreeSettings):
        return LookupFreeQuantizer(settings)
    return LinearCodebook(settings)

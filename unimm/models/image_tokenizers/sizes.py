"""Sizes of image tokenizers, as recipes and the configs of checkpoints have them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from unimm.models.image_tokenizers.quantizers import AnyQuantizer, Codes, VectorSettings
from unimm.sections import FieldError, Section

Side = Annotated[int, Field(gt=0, le=2**12)]
Channels = Annotated[
    list[Annotated[int, Field(gt=0, le=2**14)]], Field(min_length=1, max_length=8, strict=False)
]
Levels = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8, strict=False)]
Count = Annotated[int, Field(gt=0, le=2**6)]
Groups = Annotated[int, Field(gt=0, le=2**10)]
Latent = Annotated[int, Field(gt=0, le=2**12)]


class VQSizes(Section):
    """Sizes of an `ImageTokenizer`; each key is explained at `ImageTokenizerConfig`."""

    image_size: Side = 64
    patch_size: Count = 1
    block_out_channels: Channels
    layers_per_block: Count = 1
    attention_levels: Levels = Field(default_factory=list)
    mid_attention: bool = False
    norm_num_groups: Groups = 8
    latent_channels: Latent = 64
    linear_shortcut: bool = False
    latent_norm: bool = False
    quantizer: AnyQuantizer = Field(default_factory=VectorSettings)
    """A kind (vq, fsq, lfq, simvq) and its settings; those of vq may also stand beside the other sizes."""

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, data: Any) -> Any:
        """Put the vector quantiser's settings, which stood here before there was a choice, in their place."""
        if not isinstance(data, dict) or "quantizer" in data:
            return data
        given = {name: data[name] for name in VectorSettings.model_fields if name in data and name != "kind"}
        rest = {name: value for name, value in data.items() if name not in given}
        return rest | {"quantizer": {"kind": "vq"} | given}

    @model_validator(mode="after")
    def _fit(self) -> VQSizes:
        _check_fit(self, self.patch_size * 2 ** (len(self.block_out_channels) - 1))
        return self


class MoVQSizes(Section):
    """Sizes of a `MoVQTokenizer`; each key is explained at `MoVQConfig`."""

    image_size: Side = 720
    block_out_channels: Channels = Field(default_factory=lambda: [256, 512, 512, 1024])
    layers_per_block: Count = 2
    attention_levels: Levels = Field(default_factory=lambda: [3])
    norm_num_groups: Groups = 32
    latent_channels: Latent = 4
    codebook_size: Codes = 32768
    halvings: Annotated[int, Field(ge=0, le=6)] = 2

    @model_validator(mode="after")
    def _fit(self) -> MoVQSizes:
        _check_fit(self, 2 ** (len(self.block_out_channels) - 1))
        return self


KINDS: dict[str, type[VQSizes] | type[MoVQSizes]] = {"unimm_vq": VQSizes, "unimm_movq": MoVQSizes}


def _check_fit(sizes: VQSizes | MoVQSizes, stride: int) -> None:
    """Check that sizes go together."""
    if sizes.image_size % stride:
        raise FieldError(f"image_size: expected a multiple of the stride {stride}, got {sizes.image_size}")
    for number, channels in enumerate(sizes.block_out_channels):
        if channels % sizes.norm_num_groups:
            raise FieldError(
                f"block_out_channels[{number}]: expected a multiple of norm_num_groups "
                f"({sizes.norm_num_groups}), got {channels}"
            )
    for number, level in enumerate(sizes.attention_levels):
        if level >= len(sizes.block_out_channels):
            raise FieldError(
                f"attention_levels[{number}]: expected less than the number of levels "
                f"({len(sizes.block_out_channels)}), got {level}"
            )

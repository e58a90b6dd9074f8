"""What the small files of published checkpoints may say: the keys that are read, their types and ranges.

Everything else in these files is left alone.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model
from transformers import LlamaConfig
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from unimm.models.configs import Published, Text, section_for
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import Depth, Width

PixelCount = Annotated[int, Field(gt=0, le=2**31)]
Number = Annotated[float, Field(gt=0)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Number], Field(min_length=3, max_length=3)]


class OwnCode(Published):
    """Base of a config that names the publisher's own code, in whose place ours stands."""

    replaces_code: ClassVar[bool] = True


# --- Janus --------------------------------------------------------------------------------------------------

_ONLY_LLAMA: Any = (Literal["llama"], "llama")
LLAMA: Any = create_model("Llama", __base__=section_for(LlamaConfig), model_type=_ONLY_LLAMA)
JANUS: Any = create_model(
    "JanusDocument",
    __base__=Published,
    text_config=(LLAMA, None),
    vision_config=(section_for(JanusVisionConfig), None),
    vq_config=(section_for(JanusVQVAEConfig), None),
    image_token_id=(Annotated[int, Field(ge=0, lt=2**31)], None),
    tie_word_embeddings=(bool, None),
)


class TowerParams(Published):
    """The original's vision tower, by its name."""

    image_size: Side
    model_name: Text
    num_heads: Annotated[int, Field(gt=0, le=2**10)] | None = None


class Tower(Published):
    """Where the original says its vision tower."""

    params: TowerParams


class AlignerParams(Published):
    """A connector."""

    depth: Depth


class Aligner(Published):
    """Where the original says a connector."""

    params: AlignerParams


class HeadParams(Published):
    """The head of the codes."""

    image_token_embed: Width


class Head(Published):
    """Where the original says the head of the codes."""

    params: HeadParams


JANUS_ORIGINAL: Any = create_model(
    "JanusOriginalDocument",
    __base__=OwnCode,
    language_config=(LLAMA, ...),
    vision_config=(Tower, ...),
    aligner_config=(Aligner, ...),
    gen_aligner_config=(Aligner, ...),
    gen_head_config=(Head, ...),
)

# --- Emu3 ---------------------------------------------------------------------------------------------------

EMU3: Any = create_model(
    "Emu3Document",
    __base__=Published,
    text_config=(section_for(Emu3TextConfig), ...),
    vq_config=(section_for(Emu3VQVAEConfig), ...),
    tie_word_embeddings=(bool, None),
)
EMU3_ORIGINAL: Any = create_model("Emu3OriginalDocument", __base__=(OwnCode, section_for(Emu3TextConfig)))
EMU3_CODES: Any = section_for(Emu3VQVAEConfig)


class Emu3OriginalCodes(OwnCode):
    """The original's vision tokenizer."""

    ch: Width
    ch_mult: Annotated[list[Depth], Field(min_length=1, max_length=8)]
    z_channels: Annotated[int, Field(gt=0, le=2**12)]
    embed_dim: Width | None = None
    double_z: bool = False
    codebook_size: Annotated[int, Field(gt=0, le=2**20)]
    num_res_blocks: Depth
    attn_resolutions: Annotated[list[Annotated[int, Field(ge=0, le=2**10)]], Field(max_length=8)]
    temporal_downsample_factor: Depth


# --- both ---------------------------------------------------------------------------------------------------


class PixelSize(Published):
    """Limits of a side, or of an area."""

    shortest_edge: PixelCount | None = None
    longest_edge: PixelCount | None = None
    height: PixelCount | None = None
    width: PixelCount | None = None


class ImageOptions(OwnCode):
    """`preprocessor_config.json`, or the image processor in `processor_config.json`, in whose place ours stands."""

    image_mean: Colours | float | None = None
    image_std: Deviations | Number | None = None
    size: PixelSize | None = None
    min_pixels: PixelCount | None = None
    max_pixels: PixelCount | None = None
    do_normalize: bool | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=1e-9, lt=1e9)] | None = None


class Processor(Published):
    """`processor_config.json`."""

    sft_format: Literal["deepseek", "deepseek_old"] = "deepseek"
    use_default_system_prompt: bool | None = None

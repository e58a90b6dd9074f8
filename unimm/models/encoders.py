"""Understanding encoders: the vision transformers of timm that fit, by name, and what a config may change of one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import timm
from pydantic import Field

from unimm.sections import Section, near, show, validate

EncoderSize = Annotated[int, Field(gt=0, le=2**12)]
Share = Annotated[float, Field(ge=0, lt=1)]


class EncoderOptions(Section):
    """What `unimm.models.vision.create_encoder` takes besides the name; what is left out is as the name has it."""

    img_size: EncoderSize | None = None
    patch_size: EncoderSize | None = None
    embed_dim: Annotated[int, Field(gt=0, le=2**16)] | None = None
    depth: Annotated[int, Field(gt=0, le=2**10)] | None = None
    num_heads: EncoderSize | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=2**8)] | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    init_values: Annotated[float, Field(gt=0, le=1)] | None = None
    drop_path_rate: Share | None = None
    patch_drop_rate: Share | None = None
    proj_drop_rate: Share | None = None
    attn_drop_rate: Share | None = None
    stem: Literal["patch", "conv"] = "patch"


def check_architecture(name: str) -> str:
    """Return the name of an encoder, if timm has it and it fits: never a path or a repository.

    Raises:
        ValueError: it has not, or it does not.
    """
    known = [other for other in timm.list_models(module="vision_transformer") if "siglip" in other]
    if name not in known:
        raise ValueError(
            f"no SigLIP encoder of timm is named {show(name)}{near(name, known)} (such as {known[0]})"
        )
    return name


def check_encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an encoder as they are, if it can be built with them.

    Raises:
        FieldError: one is unknown, of the wrong type or out of range, or they do not go together.
    """
    validate(EncoderOptions, options, "")
    return options

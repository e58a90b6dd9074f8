"""Understanding encoders of timm and transformers: those that fit, by name, and what a config may change of one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import timm
from pydantic import Field
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimm.models.configs import check_rope, own_keys, section_for
from unimm.sections import FieldError, Section, near, show, validate

FOREIGN_ENCODERS = ("pixtral", "idefics3_vision", "internvl_vision")
"""Encoders of transformers that fit, by the `model_type` of their configs."""
FAMILIES_OF_TIMM = ("siglip", "_clip_")

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
    known = [
        other
        for other in timm.list_models(module="vision_transformer")
        if any(part in other for part in FAMILIES_OF_TIMM)
    ]
    if name not in known:
        siglip = next(other for other in known if "siglip" in other)
        raise ValueError(
            f"no SigLIP or CLIP encoder of timm is named {show(name)}{near(name, known)} (such as {siglip})"
        )
    return name


def check_encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an encoder as they are, if it can be built with them.

    Raises:
        FieldError: one is unknown, of the wrong type or out of range, or they do not go together.
    """
    validate(EncoderOptions, options, "")
    return options


def check_conv_stem(patch: int, width: int) -> None:
    """Refuse a convolutional stem whose convolutions cannot each halve the image.

    Raises:
        FieldError: naming the patch.
    """
    levels = patch.bit_length() - 1
    if levels < 1 or patch != 2**levels or width % 2 ** (levels - 1):
        raise FieldError(
            f"patch: {patch}; a convolutional stem needs a power of 2 that fits the width ({width})"
        )


def check_foreign_encoder(name: str, kwargs: dict[str, Any]) -> None:
    """Check that an encoder of transformers fits, and that its config has these fields.

    Raises:
        FieldError: it does not, or a field is unknown, of the wrong type or out of range.
    """
    if name not in FOREIGN_ENCODERS:
        raise FieldError(
            f"name: expected one of {', '.join(FOREIGN_ENCODERS)}, got {show(name)}{near(name, FOREIGN_ENCODERS)}"
        )
    described: Any = CONFIG_MAPPING[name]
    section = section_for(described)
    for key in own_keys(kwargs):
        if key not in section.model_fields:
            raise FieldError(f"kwargs.{key}: unknown key{near(key, section.model_fields)}")
    check_rope(kwargs.get("rope_parameters"), "kwargs.rope_parameters")
    validate(section, kwargs, "", "kwargs")


def foreign_config(name: str, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of transformers of an encoder that was checked.

    Raises:
        FieldError: its fields do not go together.
    """
    try:
        config: PreTrainedConfig = AutoConfig.for_model(name, **kwargs)
    except Exception as error:  # each config has checks of its own, of all kinds
        raise FieldError(f"encoder.kwargs: {' '.join(str(error).split())[:200]}") from None
    return config

"""Writes models in Aria's layouts: transformers', and that of the first releases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AriaConfig, AriaImageProcessor, AriaProcessor

from unimm.errors import UserError
from unimm.families.writing import (
    UnderstandingWriter,
    needs_token,
    template_of,
    token_name,
    write_generation,
    write_images,
    write_tokenizer,
)
from unimm.files import write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import (
    CodesEncoderConfig,
    FitViewsConfig,
    ResampleReducerConfig,
    TransformersEncoderConfig,
)
from unimm.processing.processor import UniMMProcessor

FIRST_DECODER = "aria_moe_lm"  # the decoder's kind in the first releases
VIEW_SIDES = (490, 980)  # pixels of a view, of which the published processors have no others
FIM_PREFIX, FIM_SUFFIX = "<fim_prefix>", "<fim_suffix>"
FIRST_TEXT = (
    "hidden_act", "hidden_size", "max_position_embeddings", "moe_num_experts", "moe_num_shared_experts", "moe_topk",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size", "bos_token_id",
    "eos_token_id", "pad_token_id", "head_dim",
)  # fmt: skip
FIRST_VISION = (
    "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size",
)  # fmt: skip


class AriaWriter(UnderstandingWriter):
    """One encoder, one way to reduce, a decoder of experts."""

    title = "Aria"
    keys: ClassVar = {"original": "first"}

    def tensors(self, config: UniMMConfig, layout: str) -> dict[str, Tensor]:
        """Return the encoder's last norm, which transformers has and no feature passes."""
        if layout == "original":
            return {}
        encoder = config.encoder_config()
        assert encoder is not None and not isinstance(encoder, CodesEncoderConfig)
        norm = "vision_tower.post_layernorm"
        return {f"{norm}.weight": torch.ones(encoder.width), f"{norm}.bias": torch.zeros(encoder.width)}

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """See `UnderstandingWriter`; the tokens around an image have names, and views few sizes."""
        super().check(config, processor, layout, where)
        needs_token(processor, processor.layout.begin, FIM_PREFIX, self.title)
        needs_token(processor, processor.layout.end, FIM_SUFFIX, self.title)
        side = _views(config).bounds[0]
        if side not in VIEW_SIDES:
            raise UserError(
                f"--to: views.bounds: {side}; Aria's layouts have views of {VIEW_SIDES[0]} or {VIEW_SIDES[1]} pixels"
            )

    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """See `UnderstandingWriter`."""
        image = token_name(processor, processor.layout.feature)
        template = template_of(processor, FIM_PREFIX + image + FIM_SUFFIX)
        written = _config(config, processor)
        if layout == "original":
            write_json(folder / "config.json", _first(written))
            write_images(folder, "AriaVisionProcessor", "AriaProcessor", _images(config))
            write_tokenizer(processor, folder, {}, template)
        else:
            written.save_pretrained(folder)
            tokenizer: Any = write_tokenizer(processor, folder, {"image_token": image})
            images = AriaImageProcessor(**_images(config))
            sizes: Any = _sizes(config)
            AriaProcessor(images, tokenizer, chat_template=template, size_conversion=sizes).save_pretrained(
                folder
            )
        write_generation(processor, folder)


def _views(config: UniMMConfig) -> FitViewsConfig:
    views = config.views_config()
    assert isinstance(views, FitViewsConfig)
    return views


def _queries(config: UniMMConfig) -> dict[int, int]:
    """Tokens of a view by its features."""
    reducer = config.reducer_config()
    assert isinstance(reducer, ResampleReducerConfig)
    return dict(reducer.queries)


def _sizes(config: UniMMConfig) -> dict[int, int]:
    """Tokens of a view by its pixels a side."""
    encoder = config.encoder_config()
    assert isinstance(encoder, TransformersEncoderConfig)
    return {math.isqrt(features) * encoder.patch: tokens for features, tokens in _queries(config).items()}


def _config(config: UniMMConfig, processor: UniMMProcessor) -> AriaConfig:
    encoder = config.encoder_config()
    assert isinstance(encoder, TransformersEncoderConfig)
    return AriaConfig(
        text_config=config.decoder,
        vision_config={**encoder.kwargs, "model_type": "idefics3_vision"},
        image_token_index=processor.layout.feature,
        projector_patch_to_query_dict=_queries(config),
        vision_feature_layer=-1,
        tie_word_embeddings=config.decoder_config().tie_word_embeddings,
        architectures=["AriaForConditionalGeneration"],
    )


def _first(written: AriaConfig) -> dict[str, Any]:
    """The first releases' form, whose decoder has other names."""
    whole: Any = written
    text, vision = whole.text_config, whole.vision_config
    code = "modeling_aria"
    return {
        "architectures": ["AriaForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{code}.AriaConfig",
            "AutoModelForCausalLM": f"{code}.AriaForConditionalGeneration",
        },
        "ignore_index": -100,
        "image_token_index": whole.image_token_index,
        "model_type": "aria",
        "projector_patch_to_query_dict": {
            str(features): tokens for features, tokens in whole.projector_patch_to_query_dict.items()
        },
        "text_config": {
            "model_type": FIRST_DECODER,
            **{name: value for name in FIRST_TEXT if (value := getattr(text, name, None)) is not None},
            "moe_intermediate_size": text.intermediate_size,
            "rope_theta": text.rope_parameters["rope_theta"],
        },
        "vision_config": {
            "model_type": "aria_vision_model",
            **{name: getattr(vision, name) for name in FIRST_VISION},
        },
    }


def _images(config: UniMMConfig) -> dict[str, Any]:
    """Options of the image processor."""
    views = _views(config)
    return {
        "max_image_size": views.bounds[0],
        "min_image_size": views.least,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }

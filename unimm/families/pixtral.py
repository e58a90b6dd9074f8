"""Pixtral: images at their own sizes, each row of features followed by a token.

Sources: Agrawal et al. 2024 (arXiv 2410.07073); transformers `models/pixtral` and `models/llava`; mistralai's
`mistral_inference` (`vision_encoder.py`) and `mistral_common` for the original layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field, create_model
from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig, PreTrainedTokenizerBase

from unimm.families.common import (
    CLIP_MEAN,
    CLIP_STD,
    UNDRAWN,
    decoder_of,
    expect,
    followed,
    special_token,
)
from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule, llama_layer, rotary_halves
from unimm.families.pixtral_writer import PixtralWriter
from unimm.families.source import Checkpoint, normalisation
from unimm.models.configs import Activation, Published, section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.layout import TokenId
from unimm.models.part_types import HeadCount, Width
from unimm.models.parts import TransformersEncoderConfig
from unimm.models.turns import Turns
from unimm.sections import validate

FEATURE, ROW_END, LAST_ROW_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
LONGEST = 1024  # pixels of an image's long side, where a checkpoint does not say
CONTEXT = 131072  # tokens, which the original's files do not say
TURNS = Turns(user="[INST]", assistant="[/INST]")

_Layers = Annotated[int, Field(gt=0, le=2**10)]
_Theta = Annotated[float, Field(ge=1, le=1e12)]
_ONLY_MISTRAL: Any = (Literal["mistral"], ...)
_ONLY_PIXTRAL: Any = (Literal["pixtral"], ...)
_MISTRAL: Any = section_for(MistralConfig)
_PIXTRAL: Any = section_for(PixtralVisionConfig)
_TEXT: Any = create_model("PixtralText", __base__=_MISTRAL, model_type=_ONLY_MISTRAL)
_VISION: Any = create_model("PixtralVision", __base__=_PIXTRAL, model_type=_ONLY_PIXTRAL)
_ALL_FEATURES: Any = (Literal["full"], "full")
DOCUMENT: Any = create_model(
    "PixtralDocument",
    __base__=Published,
    text_config=(_TEXT, ...),
    vision_config=(_VISION, ...),
    image_token_index=(TokenId, None),
    image_token_id=(TokenId, None),
    projector_hidden_act=(Activation, "gelu"),
    multimodal_projector_bias=(bool, True),
    vision_feature_layer=(Literal[-1], -1),
    vision_feature_select_strategy=_ALL_FEATURES,
    tie_word_embeddings=(bool, None),
)


class OriginalVision(Published):
    """The encoder in the original's `params.json`."""

    hidden_size: Width
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(gt=0, le=4096)] | None = None
    max_image_size: Annotated[int, Field(gt=0, le=4096)] | None = None
    patch_size: Annotated[int, Field(gt=0, le=2**10)]
    rope_theta: _Theta = 10000.0
    intermediate_size: Annotated[int, Field(gt=0, le=2**20)]
    num_hidden_layers: _Layers
    num_attention_heads: HeadCount
    adapter_bias: bool = True
    image_token_id: TokenId = 10
    image_break_token_id: TokenId = 12
    image_end_token_id: TokenId = 13


class Original(Published):
    """The original's `params.json`."""

    dim: Width
    n_layers: _Layers
    head_dim: Width
    hidden_dim: Annotated[int, Field(gt=0, le=2**20)]
    n_heads: HeadCount
    n_kv_heads: HeadCount
    norm_eps: Annotated[float, Field(gt=0, lt=1)]
    vocab_size: Annotated[int, Field(gt=0, le=2**22)]
    rope_theta: _Theta = 1e9
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**24)] = CONTEXT
    vision_encoder: OriginalVision


class Pixtral(Family):
    """Two layouts: transformers' `llava` with Pixtral's encoder, and the original's `params.json`."""

    name, title = "pixtral", "Pixtral"
    needs = ("encoder", "views")
    writer = PixtralWriter()
    weight_files: ClassVar = {"original": "consolidated.safetensors"}

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        original = checkpoint.layout == "original"
        found = _original_parts(checkpoint) if original else _transformers_parts(checkpoint)
        encoder, bias, act, feature = (found.pop(name) for name in ("encoder", "bias", "act", "feature"))
        decoder = found["decoder"]
        patch = encoder["patch_size"]
        tokenizer, where = checkpoint.text_tokenizer, checkpoint.folder
        ends = {
            name: special_token(tokenizer, token, where)
            for name, token in (("row_end", ROW_END), ("last_row_end", LAST_ROW_END))
        }
        return {
            **found,
            "views": {"kind": "fit", "unit": patch, **_views(checkpoint, encoder["image_size"])},
            "encoder": {
                "kind": "transformers",
                "name": "pixtral",
                "width": encoder["hidden_size"],
                "patch": patch,
                "kwargs": encoder,
            },
            "connector": {"kind": "mlp", "depth": 2, "bias": bias, "act": act},
            "layout": {
                "begin": None,
                "end": None,
                "feature": special_token(tokenizer, FEATURE, where) if feature is None else feature,
                "code": decoder["vocab_size"],
                "grid": UNDRAWN,
                "picture": ends,
            },
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, or `[INST] … [/INST]`."""
        return followed(checkpoint, TURNS, FEATURE)

    def text_tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """Build the text tokenizer, in the original layout from `tekken.json`."""
        path = checkpoint.folder / "tekken.json"
        if checkpoint.layout == "original" and path.exists():
            from unimm.families.tekken import read_tekken

            return read_tekken(path)
        return super().text_tokenizer(checkpoint)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of a layout; the original's rotary pairs are neighbours."""
        encoder = config.encoder_config()
        assert isinstance(encoder, TransformersEncoderConfig)
        if layout != "original":
            inner = getattr(config, "source_keys", None) == "inner"
            return _transformers_map("model." if inner else "", inner)
        return _original_map(encoder.kwargs["num_attention_heads"], config.decoder_config())

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this encoder."""
        return (config.encoder or {}).get("name") == "pixtral"


def _transformers_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    where = str(checkpoint.path)
    document = validate(DOCUMENT, checkpoint.document, where).model_dump(exclude_unset=True)
    config = LlavaConfig(**document)
    text: Any = config.text_config
    vision: Any = config.vision_config
    tied = bool(config.tie_word_embeddings)
    expect(where, "vision_config", vision, num_channels=3)
    known = section_for(PixtralVisionConfig).model_fields
    encoder = {name: value for name, value in vision.to_dict().items() if name in known and value is not None}
    inner = any(name.startswith("model.vision_tower.") for name in checkpoint.shapes)
    decoder = decoder_of(text, MistralConfig, tie_word_embeddings=tied)
    return {
        "decoder": {**decoder, "sliding_window": text.sliding_window},  # None: there is none
        "encoder": encoder,
        "act": config.projector_hidden_act,
        "bias": config.multimodal_projector_bias,
        "feature": document.get("image_token_index", document.get("image_token_id")),
        "tie_word_embeddings": tied,
        **({"source_keys": "inner"} if inner else {}),
    }


def _original_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    params = validate(Original, checkpoint.document, str(checkpoint.path))
    vision = params.vision_encoder
    decoder = MistralConfig(
        vocab_size=params.vocab_size, hidden_size=params.dim, intermediate_size=params.hidden_dim,
        num_hidden_layers=params.n_layers, num_attention_heads=params.n_heads, num_key_value_heads=params.n_kv_heads,
        head_dim=params.head_dim, rms_norm_eps=params.norm_eps, max_position_embeddings=params.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta}, sliding_window=None,
    )  # fmt: skip
    encoder = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.max_image_size or vision.image_size or LONGEST,
        "patch_size": vision.patch_size,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
    return {
        "decoder": {**decoder_of(decoder, MistralConfig), "sliding_window": None},
        "encoder": encoder,
        "act": "gelu",
        "bias": vision.adapter_bias,
        "feature": vision.image_token_id,
        "tie_word_embeddings": False,
    }


def _views(checkpoint: Checkpoint, longest: int) -> dict[str, Any]:
    """Limits and normalisation of images."""
    options, path = checkpoint.image_options()
    longest = (options.get("size") or {}).get("longest_edge") or longest
    options = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, **options}
    fixed = {"do_resize": True, "resample": int(Image.Resampling.BICUBIC)}
    return {"bounds": (longest, longest), **normalisation(options, path, fixed)}


def _transformers_map(prefix: str, inner: bool) -> KeyMap:
    """The map of transformers' layout, whose names its releases write with or without `model.` in front."""
    decoder = "model.language_model." if inner else "language_model.model."
    return KeyMap(
        rules=(
            Rule("vision.model.{rest}", f"{prefix}vision_tower.{{rest}}"),
            *(
                Rule(
                    f"connector.layers.{ours}.{{end}}",
                    f"{prefix}multi_modal_projector.linear_{theirs}.{{end}}",
                )
                for ours, theirs in ((0, 1), (2, 2))
            ),
            Rule("decoder.model.{rest}", f"{decoder}{{rest}}"),
            Rule("decoder.lm_head.weight", "lm_head.weight" if inner else "language_model.lm_head.weight"),
        ),
        tied=("decoder.lm_head.weight",),
    )


def _original_map(vision_heads: int, decoder: Any) -> KeyMap:
    """The map of the original layout."""
    query, key = rotary_halves(decoder.num_attention_heads), rotary_halves(decoder.num_key_value_heads)
    vision = rotary_halves(vision_heads)
    return KeyMap(
        rules=(
            Rule("vision.model.patch_conv.weight", "vision_encoder.patch_conv.weight"),
            Rule("vision.model.ln_pre.weight", "vision_encoder.ln_pre.weight"),
            *llama_layer("vision.model.transformer.layers.{i}", "vision_encoder.transformer.layers.{i}",
                     ("attention.", "feed_forward", "attention_norm", "ffn_norm"), vision, vision),
            Rule("connector.layers.0.{end}", "vision_language_adapter.w_in.{end}"),
            Rule("connector.layers.2.{end}", "vision_language_adapter.w_out.{end}"),
            *llama_layer("decoder.model.layers.{i}", "layers.{i}",
                     ("self_attn.", "mlp", "input_layernorm", "post_attention_layernorm"), query, key),
            Rule("decoder.model.embed_tokens.weight", "tok_embeddings.weight"),
            Rule("decoder.model.norm.weight", "norm.weight"),
            Rule("decoder.lm_head.weight", "output.weight"),
        ),
    )  # fmt: skip


FAMILY = Pixtral()

"""Aria: images padded to one square, of which learned queries make tokens, and a decoder of fine-grained experts.

An image is shown whole, as both processors do unless asked to split it; splitting it into crops is not supported.

Sources: Li et al. 2024 (arXiv 2410.05993); transformers `models/aria`; rhymes-ai/Aria `aria/model` for the names and
fields of its first releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, create_model
from transformers import AriaConfig, AriaTextConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from unimm.families.aria_writer import FIRST_DECODER, AriaWriter
from unimm.families.common import CHATML, UNDRAWN, decoder_of, expect, followed, special_token
from unimm.families.documents import OwnCode
from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule
from unimm.families.source import Checkpoint, normalisation
from unimm.models.configs import section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.layout import TokenId
from unimm.sections import validate

BEGIN, FEATURE, IMAGE_CLOSING = "<fim_prefix>", "<|img|>", "<fim_suffix>"
VIEW_SIDE, LEAST = 980, 336  # pixels of an image's long side, and at least of its short one, by default
LAYER_NORM_EPS = 1e-5  # of the projector's, which no config has

_TEXT_KIND: Any = (Literal["aria_text", "aria_moe_lm"], "aria_text")
_VISION_KIND: Any = (Literal["idefics3_vision", "aria_vision_model"], "idefics3_vision")
_TEXT: Any = create_model(
    "AriaText",
    __base__=section_for(AriaTextConfig),
    model_type=_TEXT_KIND,
    moe_intermediate_size=(Annotated[int, Field(gt=0, le=2**20)], None),
)
_VISION: Any = create_model(
    "AriaVision",
    __base__=section_for(Idefics3VisionConfig),
    model_type=_VISION_KIND,
)
_COUNT: Any = Annotated[int, Field(gt=0, le=2**20)]
DOCUMENT: Any = create_model(
    "AriaDocument",
    __base__=OwnCode,
    text_config=(_TEXT, ...),
    vision_config=(_VISION, ...),
    image_token_index=(TokenId, None),
    image_token_id=(TokenId, None),
    projector_patch_to_query_dict=(Annotated[dict[str, _COUNT], Field(min_length=1, max_length=64)], None),
    vision_feature_layer=(Literal[-1], -1),
    tie_word_embeddings=(bool, None),
)


class ImageSizes(OwnCode):
    """Sizes in the image processor's options."""

    max_image_size: Annotated[int, Field(gt=0, le=4096)] = VIEW_SIDE
    min_image_size: Annotated[int, Field(ge=0, le=4096)] = LEAST


class Aria(Family):
    """One layout, whose tensors have had three sets of names; the first releases' config has other fields too."""

    name, title = "aria", "Aria"
    needs = ("encoder", "views")
    writer = AriaWriter()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        where = str(checkpoint.path)
        document = validate(DOCUMENT, checkpoint.document, where).model_dump(exclude_unset=True)
        document["text_config"] = _text(document["text_config"])
        document["vision_config"] = {**document["vision_config"], "model_type": "idefics3_vision"}
        config: Any = AriaConfig(**document)
        text, vision, tied = config.text_config, config.vision_config, bool(config.tie_word_embeddings)
        expect(where, "vision_config", vision, num_channels=3)
        known = section_for(Idefics3VisionConfig).model_fields
        tokenizer, folder = checkpoint.text_tokenizer, checkpoint.folder
        names = _names(checkpoint)
        return {
            "decoder": decoder_of(text, AriaTextConfig, tie_word_embeddings=tied),
            "views": {
                "kind": "fit",
                "unit": vision.patch_size,
                "fill": "whole",
                **_views(checkpoint),
            },
            "encoder": {
                "kind": "transformers",
                "name": "idefics3_vision",
                "width": vision.hidden_size,
                "patch": vision.patch_size,
                "kwargs": {
                    name: value
                    for name, value in vision.to_dict().items()
                    if name in known and value is not None
                },
            },
            "reducer": {
                "kind": "resample",
                "heads": vision.num_attention_heads,
                "queries": tuple(sorted(config.projector_patch_to_query_dict.items())),
            },
            "connector": {
                "kind": "mlp",
                "depth": 2,
                "bias": False,
                "act": "gelu_new",
                "norm": "layer",
                "eps": LAYER_NORM_EPS,
            },
            "layout": {
                "begin": special_token(tokenizer, BEGIN, folder),
                "end": special_token(tokenizer, IMAGE_CLOSING, folder),
                "feature": config.image_token_index,
                "code": text.vocab_size,
                "grid": UNDRAWN,
            },
            "tie_word_embeddings": tied,
            **({} if names == "hub" else {"source_keys": names}),
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, which writes the tokens around an image itself."""
        return followed(checkpoint, CHATML, BEGIN + FEATURE + IMAGE_CLOSING)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map, of one of four sets of names."""
        names = getattr(config, "source_keys", None) or "hub"
        inner, first = names == "inner", names == "first"
        front = "model." if inner else ""
        tower = f"{front}vision_tower." + ("vision_model." if names in ("first", "wrapped") else "")
        text = "model.language_model." if inner else "language_model.model."
        experts = ("gate_up_proj", "down_proj") if inner else ("fc1.weight", "fc2.weight")
        return KeyMap(
            rules=(
                Rule("vision.model.{rest}", f"{tower}{{rest}}"),
                *_projector(f"{front}multi_modal_projector", first),
                *(
                    Rule(
                        f"decoder.model.layers.{{i}}.mlp.experts.{ours}",
                        f"{text}layers.{{i}}.mlp.experts.{theirs}",
                    )
                    for ours, theirs in zip(("gate_up_proj", "down_proj"), experts, strict=True)
                ),
                Rule("decoder.model.{rest}", f"{text}{{rest}}"),
                Rule(
                    "decoder.lm_head.weight", "lm_head.weight" if inner else "language_model.lm_head.weight"
                ),
            ),
            kept=(f"{tower}post_layernorm.{{end}}",),  # features are taken before it
            tied=("decoder.lm_head.weight",),
        )

    def layout_of(self, document: Mapping[str, Any]) -> str:
        """Return "original" for the form that was published first."""
        text = document.get("text_config")
        first = isinstance(text, dict) and (
            text.get("model_type") == FIRST_DECODER or "moe_intermediate_size" in text
        )
        return "original" if first else "transformers"

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this encoder, reducer and decoder."""
        encoder = (config.encoder or {}).get("name")
        kinds = (encoder, config.reducer.get("kind"), config.decoder["model_type"])
        return kinds == ("idefics3_vision", "resample", "aria_text")


def _text(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields as transformers has them; the first releases name an expert's width apart."""
    found = {**fields, "model_type": "aria_text"}
    width = found.pop("moe_intermediate_size", None)
    return found if width is None else {**found, "intermediate_size": width}


def _names(checkpoint: Checkpoint) -> str:
    """Which names a checkpoint's tensors have.

    "hub" as transformers writes them, "inner" as its modules are called, "first" as the first releases have them, and
    "wrapped" as those between have, whose encoder alone is named as in the first.
    """
    shapes = checkpoint.shapes
    if any(name.startswith("model.vision_tower.") for name in shapes):
        return "inner"
    if "multi_modal_projector.ln_ffn.weight" in shapes:
        return "first"
    return "wrapped" if any(name.startswith("vision_tower.vision_model.") for name in shapes) else "hub"


def _projector(theirs: str, first: bool) -> list[Rule]:
    """Rules of the reducer and the connector."""
    reducer, attention = "connector.reducer", f"{theirs}.cross_attn"
    known, norm, mlp = (
        ("ln_kv", "ln_ffn", "ffn") if first else ("layer_norm_kv", "layer_norm", "feed_forward")
    )
    return [
        Rule(f"{reducer}.query", f"{theirs}.query"),
        Rule(f"{reducer}.norm.{{end}}", f"{attention}.layer_norm.{{end}}"),
        Rule(f"{reducer}.norm_features.{{end}}", f"{attention}.{known}.{{end}}"),
        *(Rule(f"{reducer}.{name}.weight", f"{attention}.{name}_proj.weight") for name in "qkv"),
        Rule(f"{reducer}.attention.{{rest}}", f"{attention}.multihead_attn.{{rest}}"),
        Rule(f"{reducer}.output.{{end}}", f"{attention}.linear.{{end}}"),
        Rule("connector.norm.{end}", f"{theirs}.{norm}.{{end}}"),
        Rule("connector.layers.0.weight", f"{theirs}.{mlp}.linear_in.weight"),
        Rule("connector.layers.2.weight", f"{theirs}.{mlp}.linear_out.weight"),
    ]


def _views(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes and normalisation of images."""
    options, path = checkpoint.image_options()
    sizes = validate(ImageSizes, options, str(path))
    fixed = {"split_image": False, "resample": int(Image.Resampling.BICUBIC)}
    side = sizes.max_image_size
    return {"bounds": (side, side), "least": sizes.min_image_size, **normalisation(options, path, fixed)}


FAMILY = Aria()

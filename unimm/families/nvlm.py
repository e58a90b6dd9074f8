"""NVLM-D: an image as tiles and the whole of it, each behind a tag in words.

Sources: Dai et al. 2024 (arXiv 2409.11402); the code and `config.json` published with NVLM-D-72B. Its encoder has dummy
heads beyond those that it says, so that eight devices can share them: zeros, which are cut on reading and written back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, create_model
from transformers import Qwen2Config

from unimm.errors import UserError
from unimm.families.common import (
    CHATML,
    IMAGENET_MEAN,
    IMAGENET_STD,
    UNDRAWN,
    decoder_of,
    followed,
    special_token,
)
from unimm.families.documents import OwnCode
from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule, cut_rows, share
from unimm.families.source import Checkpoint, normalisation
from unimm.families.templates import PLACEHOLDER
from unimm.models.configs import Activation, Published, section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import HeadCount, Width
from unimm.models.parts import TransformersEncoderConfig
from unimm.sections import validate

FEATURE = "<|vision_pad|>"
TURNS = dataclasses.replace(CHATML, after_image="\n")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # which a template writes itself
DUMMY_HEADS = 7  # of the published model; a checkpoint's weights say how many it has
QKV = "vision_model.encoder.layers.0.attn.qkv.weight"

_QWEN2: Any = section_for(Qwen2Config)
_CLASSES: Any = (tuple[Literal["Qwen2ForCausalLM"]], Field(strict=False))
_TEXT: Any = create_model("NvlmText", __base__=_QWEN2, architectures=_CLASSES)
Tiles = Annotated[int, Field(gt=0, le=64)]


class NvlmVision(Published):
    """The encoder."""

    hidden_size: Width
    num_attention_heads: HeadCount
    num_hidden_layers: Annotated[int, Field(gt=0, le=2**10)]
    intermediate_size: Annotated[int, Field(gt=0, le=2**20)]
    image_size: Side
    patch_size: Annotated[int, Field(gt=0, le=2**10)]
    hidden_act: Activation = "gelu"
    layer_norm_eps: Annotated[float, Field(ge=1e-6, le=1e-6)] = (
        1e-6  # what transformers has for queries and keys
    )
    norm_type: Literal["rms_norm"] = "rms_norm"
    num_channels: Literal[3] = 3
    qk_normalization: Literal[True] = True
    qkv_bias: Literal[False] = False


class Fields(OwnCode):
    """`config.json` without its decoder."""

    vision_config: NvlmVision
    force_image_size: Side | None = None
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    dynamic_image_size: bool = True
    min_dynamic_patch: Tiles = 1
    max_dynamic_patch: Tiles = 6
    use_thumbnail: Literal[True] = True
    select_layer: Literal[-1] = -1
    ps_version: Literal["v2"] = "v2"


DOCUMENT: Any = create_model("NvlmDocument", __base__=Fields, llm_config=(_TEXT, ...))


class Nvlm(Family):
    """One layout, that of the publisher's own code."""

    name, title = "nvlm", "NVLM-D"
    needs = ("encoder", "views")

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        document = validate(DOCUMENT, checkpoint.document, str(checkpoint.path))
        vision = document.vision_config
        text = Qwen2Config(**document.llm_config.model_dump(exclude_unset=True, exclude={"architectures"}))
        side = document.force_image_size or vision.image_size
        if side != vision.image_size:
            raise UserError(
                f"{checkpoint.path}: force_image_size: {side} is not supported, only vision_config.image_size "
                f"({vision.image_size})"
            )
        features = side // vision.patch_size
        merge = round(1 / document.downsample_ratio)
        if features % merge or merge * document.downsample_ratio != 1:
            raise UserError(
                f"{checkpoint.path}: downsample_ratio: {document.downsample_ratio} does not divide {features} features "
                "a side"
            )
        cells = (features // merge, features // merge)
        tokenizer, where = checkpoint.text_tokenizer, checkpoint.folder
        return {
            "decoder": decoder_of(text, Qwen2Config),
            "views": {
                "kind": "canvas",
                "tile": side,
                "alone": True,
                **_tiles(document),
                **_colours(checkpoint),
            },
            "encoder": {
                "kind": "transformers",
                "name": "internvl_vision",
                "width": vision.hidden_size,
                "patch": vision.patch_size,
                "side": features,
                "kwargs": _encoder(vision),
            },
            "reducer": {"kind": "join", "side": merge},
            "connector": {
                "kind": "mlp",
                "depth": 2,
                "width": text.intermediate_size,
                "bias": False,
                "norm": "layer",
                "norm_at": "token",
                "eps": 1e-5,
            },
            "layout": {
                "begin": None,
                "end": None,
                "feature": special_token(tokenizer, FEATURE, where),
                "code": text.vocab_size,
                "grid": UNDRAWN,
                "picture": _picture(cells),
            },
            "tie_word_embeddings": text.tie_word_embeddings,
            "source_heads": _dummy_heads(checkpoint, vision),
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template; where that writes texts alone, an image is a line of its own."""
        turns = followed(checkpoint, TURNS, PLACEHOLDER)
        return turns if turns["template"] is not None else {**turns, "system": SYSTEM}

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of the published layout."""
        encoder = config.encoder_config()
        assert isinstance(encoder, TransformersEncoderConfig)
        dummies = getattr(config, "source_heads", DUMMY_HEADS)
        zeros = dummies * (encoder.width // encoder.kwargs["num_attention_heads"])
        inner, outer = "vision.model.encoder.layer.{i}", "vision_model.encoder.layers.{i}"
        names = {"attention.projection_layer.bias": "attn.proj.bias", "lambda_1": "ls1", "lambda_2": "ls2",
                 "mlp.fc1.{end}": "mlp.fc1.{end}", "mlp.fc2.{end}": "mlp.fc2.{end}",
                 "layernorm_before.weight": "norm1.weight", "layernorm_after.weight": "norm2.weight"}  # fmt: skip
        embeddings = {"cls_token": "class_embedding", "position_embeddings": "position_embedding",
                      "patch_embeddings.projection.{end}": "patch_embedding.{end}"}  # fmt: skip
        return KeyMap(
            rules=(
                *(
                    Rule(f"{inner}.attention.{name}_proj.weight", f"{outer}.attn.qkv.weight",
                         share(index, [encoder.width] * 3, zeros))
                    for index, name in enumerate("qkv")
                ),
                *(
                    Rule(f"{inner}.attention.{name}_norm.weight", f"{outer}.attn.{name}_norm.weight", cut_rows(zeros))
                    for name in "qk"
                ),
                Rule(f"{inner}.attention.projection_layer.weight", f"{outer}.attn.proj.weight", cut_rows(zeros, 1)),
                *(Rule(f"{inner}.{ours}", f"{outer}.{theirs}") for ours, theirs in names.items()),
                *(
                    Rule(f"vision.model.embeddings.{ours}", f"vision_model.embeddings.{theirs}")
                    for ours, theirs in embeddings.items()
                ),
                Rule("connector.norm.{end}", "mlp1.0.{end}"),
                *(Rule(f"connector.layers.{i}.weight", f"mlp1.{i + 1}.weight") for i in (0, 2)),
                Rule("decoder.{rest}", "language_model.{rest}"),
            ),
            tied=("decoder.lm_head.weight",),
        )  # fmt: skip

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this encoder."""
        return (config.encoder or {}).get("name") == "internvl_vision"


def _tiles(document: Fields) -> dict[str, int]:
    """How many tiles an image has."""
    if not document.dynamic_image_size:
        return {"most": 1}
    return {"most": document.max_dynamic_patch, "least": document.min_dynamic_patch}


def _colours(checkpoint: Checkpoint) -> dict[str, Any]:
    """Normalisation of images, of which the published folder has no file."""
    options, path = checkpoint.image_options()
    options = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, **options}
    return normalisation(options, path, {"do_resize": True, "resample": int(Image.Resampling.BICUBIC)})


def _encoder(vision: NvlmVision) -> dict[str, Any]:
    """Fields of transformers' encoder."""
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "image_size",
             "patch_size", "hidden_act", "layer_norm_eps", "norm_type")  # fmt: skip
    fields = {name: getattr(vision, name) for name in names}
    return {**fields, "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": True}


def _picture(cells: tuple[int, int]) -> dict[str, Any]:
    """The grammar of an image, whose tags are plain words."""
    return {
        "opening": "<Image>",
        "closing": "</Image>",
        "tile": cells,
        "tile_tag": "<tile_{}>",
        "whole_tag": "<tile_global_thumbnail>",
        "whole_at": "last",
        "alone": True,
    }


def _dummy_heads(checkpoint: Checkpoint, vision: NvlmVision) -> int:
    """How many heads the weights have beyond those that the config says."""
    if (qkv := checkpoint.shapes.get(QKV)) is None:
        return DUMMY_HEADS
    head = vision.hidden_size // vision.num_attention_heads
    return max(qkv.shape[0] // (3 * head) - vision.num_attention_heads, 0)


FAMILY = Nvlm()

"""Llama 3.2 Vision: an image's tiles are looked at by gated cross-attention before some of the decoder's layers.

One token of the stream marks an image, whose features are the memory of those blocks. Where transformers differs from
Meta's code, this follows Meta: states that enter a layer of the encoder are joined, not those that leave it; and what
stands before an image sees nothing of it. transformers counts decoder layers and blocks together, and keeps the tables
of tiles by arrangement; Meta's have a cell for each row and column, of which those beyond every arrangement are kept
aside. A folder of Meta's says neither whether the model was instructed, so its turns are Instruct's, nor the sizes of
the encoder, which are those of the published code unless `vision_encoder` says others under that code's names.

Sources: Dubey et al. 2024 (arXiv 2407.21783), section 7; meta-llama/llama-models `models/llama3`; transformers
`models/mllama`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field, create_model
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

from unimm.errors import UserError
from unimm.families.common import CLIP_MEAN, CLIP_STD, UNDRAWN, decoder_of, expect, special_token
from unimm.families.documents import OwnCode
from unimm.families.family import Family
from unimm.families.keymap import KeyMap
from unimm.families.llama_tokenizer import IMAGE, RANKS_FILE, read_llama_tokenizer
from unimm.families.llama_vision_keys import original_map, shard_axis, transformers_map
from unimm.families.llama_vision_writer import EXTRA, LlamaVisionWriter
from unimm.families.shards import ONE_FILE
from unimm.families.source import Checkpoint, normalisation
from unimm.families.templates import Template, follow, processor_template, tokenizer_template
from unimm.families.tensors import NoWeightsError
from unimm.models.configs import Published, section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.layout import TokenId
from unimm.models.part_types import HeadCount, Width
from unimm.models.tiled import tile_ratios
from unimm.models.turns import Turns
from unimm.sections import validate

CONTEXT = 131072  # tokens, which the original's files do not say
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of the original, where it says `use_scaled_rope`."""
BASE = Turns(user="", assistant="", bos="after_images")
"""Of a model that was not instructed: images, begin token, text."""
INSTRUCT = """
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
"""What Meta's code writes (`chat_format.py`), as a template."""

_Count = Annotated[int, Field(gt=0, le=2**10)]
_Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=2**10)], ...], Field(strict=False)]
_ONLY_TEXT: Any = (Literal["mllama_text_model"], "mllama_text_model")
_ONLY_VISION: Any = (Literal["mllama_vision_model"], "mllama_vision_model")
_TEXT: Any = create_model("LlamaVisionText", __base__=section_for(MllamaTextConfig), model_type=_ONLY_TEXT)
_VISION: Any = create_model(
    "LlamaVisionEncoder", __base__=section_for(MllamaVisionConfig), model_type=_ONLY_VISION
)
DOCUMENT: Any = create_model(
    "LlamaVisionDocument",
    __base__=Published,
    text_config=(_TEXT, ...),
    vision_config=(_VISION, ...),
    image_token_index=(TokenId, None),
    image_token_id=(TokenId, None),
)


class OriginalVision(Published):
    """The encoder, by the published code's constants where a `params.json` does not say."""

    patch_size: _Count = 14
    width: Width = 1280
    layers: _Count = 32
    heads: HeadCount = 16
    mlp_ratio: Annotated[float, Field(gt=0, le=2**8)] = 4.0
    n_global_layers: _Count = 8
    max_num_tiles: Annotated[int, Field(gt=0, le=64)] = 4
    return_intermediate: _Layers = (3, 7, 15, 23, 30)


class Original(Published):
    """The original's `params.json`."""

    dim: Width
    n_layers: _Count
    n_heads: HeadCount
    n_kv_heads: HeadCount
    vocab_size: Annotated[int, Field(gt=0, le=2**22)]
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=2**8)] | None = None
    multiple_of: Annotated[int, Field(gt=0, le=2**16)] = 256
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 500000.0
    use_scaled_rope: bool = False
    vision_chunk_size: Side
    vision_max_num_chunks: Annotated[int, Field(gt=0, le=64)] = 4
    vision_num_cross_attention_layers: _Count
    vision_encoder: OriginalVision = Field(default_factory=OriginalVision)
    quantization_args: None = None
    lora_args: None = None

    @property
    def mlp_width(self) -> int:
        """Width of the MLPs of layers and blocks."""
        width = int(8 * self.dim / 3)
        width = width if self.ffn_dim_multiplier is None else int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def schedule(self) -> list[int]:
        """Layers before which a block stands: from the last on, evenly."""
        count = self.vision_num_cross_attention_layers
        step = math.ceil(self.n_layers / count)
        return list(range(self.n_layers))[::-1][::step][:count][::-1]


class Tiles(OwnCode):
    """What the image processor's options have that others' have not."""

    max_image_tiles: Annotated[int, Field(gt=0, le=64)] | None = None


class LlamaVision(Family):
    """Two layouts: transformers' `mllama`, and Meta's `params.json` with `consolidated.NN.pth`."""

    name, title = "llama_vision", "Llama 3.2 Vision"
    needs = ("encoder", "views")
    shard_axes: ClassVar = {"original": shard_axis}
    writer = LlamaVisionWriter()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        original = checkpoint.layout == "original"
        found = _original_parts(checkpoint) if original else _transformers_parts(checkpoint)
        decoder, encoder = found["decoder"], found["encoder"]
        mark = special_token(checkpoint.text_tokenizer, IMAGE, checkpoint.folder)
        given, places, most = (found.pop(name) for name in ("mark", "places", "most"))
        if given not in (None, mark):
            raise UserError(f"{checkpoint.path}: image_token_index: expected {mark} ({IMAGE}), got {given}")
        return {
            **found,
            "extra_tokens": EXTRA,
            "views": _views(checkpoint, encoder["image_size"], most),
            "reducer": {"kind": "join", "side": 1},
            "connector": {"kind": "mlp", "depth": 1},
            "fusion": {
                "kind": "cross",
                "layers": tuple(places),
                "heads": decoder["num_attention_heads"],
                "kv_heads": decoder["num_key_value_heads"],
                "width": decoder["intermediate_size"],
                "eps": decoder["rms_norm_eps"],
            },
            "layout": {
                "begin": None,
                "end": None,
                "feature": mark,
                "code": decoder["vocab_size"] + EXTRA,  # which is no token
                "grid": UNDRAWN,
                "picture": {"mark": "image"},
            },
            "tie_word_embeddings": False,
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, else Instruct's for the original, or none for a base model.

        A template that says the date says that of the day on which it is read.
        """
        template = processor_template(checkpoint) or tokenizer_template(checkpoint)
        if template is None and checkpoint.layout == "original":
            template = Template(INSTRUCT, str(checkpoint.folder))
        if template is None:
            return vars(BASE)
        return vars(follow(template, Turns(), checkpoint.text_tokenizer, IMAGE))

    def text_tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """Build the text tokenizer, in the original layout from `tokenizer.model`."""
        path = checkpoint.folder / RANKS_FILE
        if checkpoint.layout == "original" and path.exists():
            return read_llama_tokenizer(path)
        return super().text_tokenizer(checkpoint)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of a layout."""
        if layout == "original":
            return original_map(config)
        return transformers_map(config, getattr(config, "source_keys", None) == "inner")

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this encoder, and blocks of cross-attention."""
        return (config.encoder or {}).get("kind") == "tiled" and config.fusion.get("kind") == "cross"


# --- what a checkpoint says ---------------------------------------------------------------------------------


def _transformers_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    where = str(checkpoint.path)
    document = validate(DOCUMENT, checkpoint.document, where).model_dump(exclude_unset=True)
    config = MllamaConfig(**document)
    text: Any = config.text_config
    vision: Any = config.vision_config
    layers, tiles = list(vision.intermediate_layers_indices), vision.max_num_tiles
    width = vision.hidden_size * (1 + len(layers))
    ratios = [list(grid) for grid in tile_ratios(tiles)]
    fixed = {"num_channels": 3, "hidden_act": "gelu", "norm_eps": 1e-5, "vision_output_dim": width}
    expect(where, "vision_config", vision, **fixed, supported_aspect_ratios=ratios)
    expect(where, "text_config", text, tie_word_embeddings=False, hidden_act="silu")
    crossing = sorted(text.cross_attention_layers)
    if not crossing or crossing[-1] >= text.num_hidden_layers - 1 or len(set(crossing)) < len(crossing):
        raise UserError(
            f"{where}: text_config.cross_attention_layers: expected layers that each have another behind them, of "
            f"{text.num_hidden_layers}, got {crossing}"
        )
    inner = any(name.startswith("model.vision_model.") for name in checkpoint.shapes)
    return {
        "decoder": decoder_of(text, LlamaConfig, num_hidden_layers=text.num_hidden_layers - len(crossing)),
        "encoder": {
            "kind": "tiled",
            "image_size": vision.image_size,
            "patch": vision.patch_size,
            "hidden": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "global_depth": vision.num_global_layers,
            "heads": vision.attention_heads,
            "mlp_width": vision.intermediate_size,
            "tiles": tiles,
            "layers": tuple(layers),
        },
        "places": [layer - number for number, layer in enumerate(crossing)],
        "most": tiles,
        "mark": document.get("image_token_index", document.get("image_token_id")),
        **({"source_keys": "inner"} if inner else {}),
    }


def _original_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    where = str(checkpoint.path)
    params = validate(Original, checkpoint.document, where)
    vision = params.vision_encoder
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        rope |= {"rope_type": "llama3", **ROPE}
    tokenizer = checkpoint.text_tokenizer
    decoder = LlamaConfig(
        vocab_size=params.vocab_size, hidden_size=params.dim, intermediate_size=params.mlp_width,
        num_hidden_layers=params.n_layers, num_attention_heads=params.n_heads, num_key_value_heads=params.n_kv_heads,
        rms_norm_eps=params.norm_eps, max_position_embeddings=CONTEXT, rope_parameters=rope,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if sorted(vision.return_intermediate) != list(vision.return_intermediate):
        raise UserError(f"{where}: vision_encoder.return_intermediate: expected layers in their order")
    return {
        "decoder": decoder_of(decoder, LlamaConfig),
        "encoder": {
            "kind": "tiled",
            "image_size": params.vision_chunk_size,
            "patch": vision.patch_size,
            "hidden": vision.width,
            "depth": vision.layers,
            "global_depth": vision.n_global_layers,
            "heads": vision.heads,
            "mlp_width": int(vision.mlp_ratio * vision.width),
            "tiles": vision.max_num_tiles,
            "layers": vision.return_intermediate,
        },
        "places": params.schedule,
        "most": params.vision_max_num_chunks,
        "mark": None,
        "source_shards": _shards(checkpoint),
    }


def _shards(checkpoint: Checkpoint) -> int:
    """Files that hold slices, 0 for one without a number."""
    try:
        files = checkpoint.own_weight_files
    except NoWeightsError:
        return 0
    return 0 if files[0].name == ONE_FILE else len(files)


def _views(checkpoint: Checkpoint, side: int, most: int) -> dict[str, Any]:
    """How an image is cut, and its normalisation."""
    options, path = checkpoint.image_options()
    options = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, **options}
    size = options.get("size") or {}
    given = (size.get("height") or side, size.get("width") or side)
    if given != (side, side):
        raise UserError(f"{path}: size: {given[0]} x {given[1]} is not supported, only {side} x {side}")
    fixed = {"do_resize": True, "do_pad": True, "resample": int(Image.Resampling.BILINEAR)}
    return {
        "kind": "canvas",
        "tile": side,
        "most": validate(Tiles, options, str(path)).max_image_tiles or most,
        "choose": "scale",
        "place": "corner",
        "whole": "none",
        "resample": "bilinear",
        **normalisation(options, path, fixed),
    }


FAMILY = LlamaVision()

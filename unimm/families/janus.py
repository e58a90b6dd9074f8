"""Janus, Janus-Pro: configs and key maps of the original repository and of transformers.

Sources: deepseek-ai/Janus `janus/models/` (`modeling_vlm.py`, `siglip_vit.py`, `projector.py`, `vq_model.py`) and
transformers `models/janus`. The original's vision tower has timm's own keys, so only prefixes change there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import JanusConfig, LlamaConfig

from unimm.errors import UserError
from unimm.families import llamagen
from unimm.families.documents import JANUS, JANUS_ORIGINAL, Processor
from unimm.families.family import Family
from unimm.families.janus_writer import (
    FEATURE,
    FORMATS,
    IMAGE_BEGIN,
    IMAGE_END,
    SAMPLING,
    TOWERS,
    JanusWriter,
)
from unimm.families.keymap import LEAD, STACK, KeyMap, Rule, under
from unimm.families.source import HALF, Checkpoint, normalisation
from unimm.families.templates import follow, processor_template, tokenizer_template
from unimm.models.configuration import UniMMConfig
from unimm.models.former import VisionConfig
from unimm.models.turns import Turns
from unimm.processing.processor import PROCESSOR_FILE
from unimm.processing.views import MIN_SIDE
from unimm.sections import validate

VISION_ARCHITECTURE = "vit_large_patch16_siglip_384"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

_VISION_BLOCK = "vision.model.blocks.{i}"
_ROTARY = "layers.{i}.self_attn.rotary_emb.inv_freq"


class Janus(Family):
    """Both layouts keep everything in one folder."""

    name, title = "janus", "Janus"
    sampling = SAMPLING
    needs = ("encoder", "generation")
    writer = JanusWriter()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration; sizes that the original keeps in code are read off the weights."""
        original, where = checkpoint.layout == "original", str(checkpoint.path)
        document, read = (JANUS_ORIGINAL, _original_parts) if original else (JANUS, _transformers_parts)
        config = validate(document, checkpoint.document, where).model_dump(exclude_unset=True)
        parts = read(config, checkpoint.shapes, where)
        begin, end, feature = (_token(checkpoint, token) for token in (IMAGE_BEGIN, IMAGE_END, FEATURE))
        generation = parts["generation"]
        side = generation["image_size"] // generation["stride"]
        layout = {
            "begin": begin,
            "end": end,
            "feature": feature,
            "code": parts["decoder"]["vocab_size"],  # codes have no token: one past the vocabulary
            "grid": (side, side),
        }
        seen = VisionConfig(**parts.pop("vision"), **_normalisation(checkpoint)).parts()
        return {**parts, **seen, "layout": layout}

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, or of the format that the original names."""
        path, original = checkpoint.folder / PROCESSOR_FILE, checkpoint.layout == "original"
        options = checkpoint.json(PROCESSOR_FILE)
        validate(Processor, options, str(path))
        named = options.get("sft_format") if original else None
        if named not in (None, *FORMATS):
            raise UserError(f"{path}: sft_format: {named!r} is not supported; known are {', '.join(FORMATS)}")
        says_system = original or options.get("use_default_system_prompt")
        base = Turns.deepseek(*FORMATS[named or "deepseek"], SYSTEM if says_system else "")
        template = processor_template(checkpoint) or (
            tokenizer_template(checkpoint) if named is None else None
        )
        if template is None:
            return vars(base)
        if original:  # whose system's words are part of the format, not of every prompt
            base = dataclasses.replace(base, system="", message=SYSTEM)
        return vars(follow(template, base, checkpoint.text_tokenizer, FEATURE))

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of a layout; transformers' numbers the layers of connectors in its own way."""
        if layout == "original":
            return ORIGINAL
        generation = config.generation_config()
        code_depth = generation.depth if generation is not None else None
        return _transformers(max(config.connector_depth(), code_depth or 0))

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model's codes, if it has any, have a vocabulary of their own."""
        return not config.layout.get("codes")


def _token(checkpoint: Checkpoint, token: str) -> int:
    number = checkpoint.text_tokenizer.get_vocab().get(token)
    if number is None:
        raise UserError(f"{checkpoint.folder}: the tokenizer has no {token}; this is no Janus checkpoint")
    return int(number)


def _normalisation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Mean, deviation and padding of the images to understand."""
    options, path = checkpoint.image_options()
    fixed = {
        "do_resize": True,
        "do_pad": True,
        "resample": int(Image.Resampling.BICUBIC),
        "min_size": MIN_SIDE,
    }
    read = normalisation(options, path, fixed)
    ground = options.get("image_mean") or HALF  # also where they are not normalised
    return {**read, "pad_value": tuple(min(max(int(level * 255), 0), 255) for level in ground)}


def _original_parts(config: dict[str, Any], shapes: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Parts of a `UniMMConfig` from the original's config; sizes that are in its code are read off the weights."""
    tower = config["vision_config"]["params"]
    prefix = "gen_vision_model."
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    tokenizer = llamagen.VQ_16 if not own else llamagen.tokenizer_options(own, "conv_blocks", "res", where)
    image_size = int(config["vision_config"]["params"]["image_size"])
    depths = {part: int(config[f"{part}_config"]["params"]["depth"]) for part in ("aligner", "gen_aligner")}
    head_width = int(config["gen_head_config"]["params"]["image_token_embed"])
    return {
        "decoder": LlamaConfig(**config["language_config"]).to_dict(),
        "vision": _vision(image_size, **_original_tower(tower, shapes, where)),
        "generation": _generation(tokenizer, image_size, depths["gen_aligner"], head_width),
        "image_tokenizer": {"model_type": "unimm_vq", "image_size": image_size, **tokenizer},
        "connector": {"kind": "mlp", "depth": depths["aligner"]},
        "tie_word_embeddings": bool(config["language_config"].get("tie_word_embeddings", False)),
    }


def _original_tower(tower: Mapping[str, Any], shapes: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Sizes of the vision tower: those of its published name, or, where there are weights, theirs."""
    prefix = "vision_model.vision_tower"
    known = TOWERS.get(tower["model_name"])
    heads = tower.get("num_heads") or (known or {}).get("heads")
    if heads is None:
        names = ", ".join(TOWERS)
        raise UserError(
            f"{where}: vision_config.params.model_name: {tower['model_name']!r} has no known number of heads; "
            f"known are {names} (or give num_heads beside it)"
        )
    if f"{prefix}.patch_embed.proj.weight" not in shapes:
        if known is None and not shapes:
            raise UserError(
                f"{where}: vision_config.params.model_name: {tower['model_name']!r} is no published tower, so that "
                "its sizes are those of the weights, which are not here"
            )
        if known is None:
            raise UserError(f"{where}: {prefix}.patch_embed.proj.weight is missing from the weights")
        return known
    width, _, patch, _ = shapes[f"{prefix}.patch_embed.proj.weight"].shape
    blocks = re.compile(rf"{re.escape(prefix)}\.blocks\.(\d+)\.")
    depth = len({found[1] for name in shapes if (found := blocks.match(name))})
    first = shapes.get(f"{prefix}.blocks.0.mlp.fc1.weight")
    ratio = 4.0 if first is None else first.shape[0] / width
    return {"patch": int(patch), "width": int(width), "depth": depth, "heads": int(heads), "ratio": ratio}


def _transformers_parts(config: dict[str, Any], shapes: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Parts of a `UniMMConfig` from transformers' `JanusConfig`."""
    full = JanusConfig(**config)
    text, vision, codes = (getattr(full, f"{part}_config") for part in ("text", "vision", "vq"))
    for name, wanted in (("use_qk_norm", False), ("hidden_act", "gelu"), ("attention_bias", True)):
        if (given := getattr(vision, name)) != wanted:
            raise UserError(f"{where}: vision_config.{name}: {given!r} is not supported, only {wanted!r}")
    levels = len(codes.channel_multiplier)
    image_size = codes.num_patches * 2 ** (levels - 1)
    tokenizer = {
        "patch_size": 1,
        "block_out_channels": [codes.base_channels * factor for factor in codes.channel_multiplier],
        "layers_per_block": codes.num_res_blocks,
        "attention_levels": [levels - 1],
        "mid_attention": True,
        "norm_num_groups": llamagen.GROUPS,
        "latent_channels": codes.latent_channels,
        "codebook_size": codes.num_embeddings,
        "codebook_dim": codes.embed_dim,
    }
    decoder = text.to_dict() | {"tie_word_embeddings": full.tie_word_embeddings}
    return {
        "decoder": decoder,
        "vision": _vision(
            vision.image_size,
            patch=vision.patch_size,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            ratio=vision.mlp_ratio,
        ),
        "generation": _generation(tokenizer, image_size, codes.num_hidden_layers, codes.projection_dim),
        "image_tokenizer": {"model_type": "unimm_vq", "image_size": image_size, **tokenizer},
        "connector": {"kind": "mlp", "depth": vision.depth},
        "tie_word_embeddings": full.tie_word_embeddings,
    }


def _vision(image_size: int, patch: int, width: int, depth: int, heads: int, ratio: float) -> dict[str, Any]:
    sizes = {"img_size": image_size, "patch_size": patch, "embed_dim": width, "depth": depth}
    return {
        "name": VISION_ARCHITECTURE,
        "image_size": image_size,
        "tokens": (image_size // patch) ** 2,
        "width": width,
        "kwargs": {**sizes, "num_heads": heads, "mlp_ratio": ratio},
    }


def _generation(tokenizer: dict[str, Any], image_size: int, depth: int, head_width: int) -> dict[str, Any]:
    return {
        "codes": tokenizer["codebook_size"],
        "dim": tokenizer["codebook_dim"],
        "image_size": image_size,
        "stride": 2 ** (len(tokenizer["block_out_channels"]) - 1),
        "depth": depth,
        "head_width": head_width,
    }


def _tokenizer_extras(prefix: str) -> dict[str, Any]:
    """What a map needs for the image tokenizer besides its rules."""
    return {
        "constants": {f"image_tokenizer.{name}": value for name, value in llamagen.CONSTANTS.items()},
        "derived": tuple(under(list(llamagen.DERIVED), "image_tokenizer.", prefix)),
    }


ORIGINAL = KeyMap(
    rules=(
        Rule("vision.model.{rest}", "vision_model.vision_tower.{rest}"),
        Rule("connector.layers.{i}.{end}", "aligner.layers.{i}.{end}"),
        Rule("code_embedding.table.weight", "gen_embed.weight"),
        Rule("code_embedding.connector.{i}.{end}", "gen_aligner.layers.{i}.{end}"),
        Rule("code_head.0.{end}", "gen_head.output_mlp_projector.{end}"),
        Rule("code_head.2.{end}", "gen_head.vision_head.{end}"),
        Rule("decoder.{rest}", "language_model.{rest}"),
        *under(llamagen.ORIGINAL, "image_tokenizer.", "gen_vision_model."),
    ),
    kept=(
        *(f"gen_vision_model.{name}" for name in llamagen.KEPT),
        f"language_model.model.{_ROTARY}",
        "vision_model.vision_tower.attn_pool.{rest}",
    ),
    tied=("decoder.lm_head.weight",),
    **_tokenizer_extras("gen_vision_model."),
)


def _transformers(layers: int) -> KeyMap:
    """The map of transformers' layout; `layers` are the linear layers of the connectors, which it numbers apart."""
    attention = "model.vision_model.encoder.layers.{i}.self_attn"
    block = "model.vision_model.encoder.layers.{i}"
    stacked = tuple(f"{attention}.{name}_proj.{{end}}" for name in "qkv")
    return KeyMap(
        rules=(
            Rule(
                "vision.model.patch_embed.proj.{end}", "model.vision_model.embeddings.patch_embedding.{end}"
            ),
            Rule("vision.model.pos_embed", "model.vision_model.embeddings.position_embedding.weight", LEAD),
            Rule(f"{_VISION_BLOCK}.attn.qkv.{{end}}", stacked, STACK),
            Rule(f"{_VISION_BLOCK}.attn.proj.{{end}}", f"{attention}.projection_layer.{{end}}"),
            Rule(f"{_VISION_BLOCK}.norm1.{{end}}", f"{block}.layer_norm1.{{end}}"),
            Rule(f"{_VISION_BLOCK}.norm2.{{end}}", f"{block}.layer_norm2.{{end}}"),
            Rule(f"{_VISION_BLOCK}.mlp.fc{{j}}.{{end}}", f"{block}.mlp.fc{{j}}.{{end}}"),
            Rule("vision.model.norm.{end}", "model.vision_model.post_layernorm.{end}"),
            *_numbered("connector.layers", "model.aligner", layers),
            Rule("code_embedding.table.weight", "model.generation_embeddings.weight"),
            *_numbered("code_embedding.connector", "model.generation_aligner", layers),
            Rule("code_head.0.{end}", "model.generation_head.proj_out.{end}"),
            Rule("code_head.2.{end}", "model.generation_head.vision_head.{end}"),
            Rule("decoder.lm_head.weight", "lm_head.weight"),
            Rule("decoder.model.{rest}", "model.language_model.{rest}"),
            *under(llamagen.TRANSFORMERS, "image_tokenizer.", "model.vqmodel."),
        ),
        kept=(f"model.language_model.{_ROTARY}", "model.vision_model.embeddings.position_ids"),
        tied=("decoder.lm_head.weight",),
        **_tokenizer_extras("model.vqmodel."),
    )


def _numbered(ours: str, theirs: str, layers: int) -> list[Rule]:
    """Rules of a connector: ours counts the activations between its linear layers, theirs does not."""
    rules = [Rule(f"{ours}.0.{{end}}", f"{theirs}.fc1.{{end}}")]
    return rules + [
        Rule(f"{ours}.{2 * n}.{{end}}", f"{theirs}.hidden_layers.{n - 1}.{{end}}") for n in range(1, layers)
    ]


FAMILY = Janus()

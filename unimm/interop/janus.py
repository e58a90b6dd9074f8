"""Janus, Janus-Pro: configs and key maps of the original repository and of transformers.

Sources: deepseek-ai/Janus `janus/models/` (`modeling_vlm.py`, `siglip_vit.py`, `projector.py`, `vq_model.py`) and
transformers `models/janus`. The original's vision tower has timm's own keys, so only prefixes change there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.interop import llamagen
from unimm.interop.files import (
    PICTURES_FILE,
    normalisation,
    picture_options,
    read_chat_template,
    read_optional,
    write_json,
)
from unimm.interop.keymap import LEAD, STACK, KeyMap, Rule, under
from unimm.interop.source import read_json
from unimm.processing import MIN_SIDE, PROCESSOR_FILE, Conversation, UniMMProcessor, read_tokenizer

MODEL_TYPES = {"janus": "transformers", "multi_modality": "original"}  # of `config.json`: layout
VISION_ARCHITECTURE = "vit_large_patch16_siglip_384"
SUBFOLDERS: dict[str, dict[str, str]] = {}  # all is in one folder
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {"patch": 16, "width": 1024, "depth": 24, "heads": 16, "ratio": 4.0}
}
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
# special tokens that the grammar needs, as every published tokenizer names them
BEGIN, END, FEATURE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
ROLES = {
    False: ("<|User|>", "<|Assistant|>"),
    True: ("User", "Assistant"),
}  # by whether the format is the old one
# Turns as `Conversation.deepseek` has them, for transformers' processor; USER and ASSISTANT are filled in.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- 'ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- ('' if loop.first else '\\n') + '<image_placeholder>' + ('' if loop.last else '\\n') -}}
{%- else -%}
{{- part['text'] | trim -}}
{%- endif -%}
{%- endfor -%}
{{- '\\n\\n' if add_generation_prompt or not loop.last else '' -}}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""

_VISION_BLOCK = "vision.model.blocks.{i}"
_ROTARY = "layers.{i}.self_attn.rotary_emb.inv_freq"


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


def key_map(layout: str, config: UniMMConfig) -> KeyMap:
    """Return the key map of the `original` or the `transformers` layout for a model of this configuration."""
    if layout == "original":
        return ORIGINAL
    generation = config.generation_config()
    assert generation is not None
    return _transformers(max(config.connector_depth, generation.depth or 0))


def unimm_config(folder: Path, layout: str, shapes: Mapping[str, Tensor]) -> UniMMConfig:
    """Translate a checkpoint's configuration.

    Args:
        folder: the checkpoint, with `config.json` and the tokenizer's files.
        layout: `original` or `transformers`.
        shapes: its tensors on the meta device; sizes that the original keeps in code are read off them.

    Raises:
        UserError: a line that names the file and field that is missing or not supported.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        read = _original_parts if layout == "original" else _transformers_parts
        parts = read(config, shapes, str(path))
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    words = read_words(folder)
    begin, end, feature = (_token(words, token, folder) for token in (BEGIN, END, FEATURE))
    generation = parts["generation"]
    side = generation["image_size"] // generation["stride"]
    return UniMMConfig(
        **parts | {"vision": {**parts["vision"], **_normalisation(folder)}},
        layout={
            "begin": begin,
            "end": end,
            "feature": feature,
            "code": parts["decoder"]["vocab_size"],  # codes have no token: one past the vocabulary
            "features": parts["vision"]["tokens"],
            "grid": (side, side),
        },
        conversation=vars(_conversation(folder, layout)),
    )


def read_words(folder: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's text tokenizer."""
    return read_tokenizer(folder)


def _token(words: Any, token: str, folder: Path) -> int:
    number = words.get_vocab().get(token)
    if number is None:
        raise UserError(f"{folder}: the tokenizer has no {token}; this is no Janus checkpoint")
    return int(number)


def _normalisation(folder: Path) -> dict[str, Any]:
    """Mean, deviation and padding of the pictures to understand."""
    read = normalisation(picture_options(folder))
    return {**read, "pad_value": tuple(int(level * 255) for level in read["mean"])}


def _conversation(folder: Path, layout: str) -> Conversation:
    """The turns that a checkpoint was trained on."""
    options = read_optional(folder / PROCESSOR_FILE)
    if layout == "original":
        old = options.get("sft_format", "deepseek") == "deepseek_old"
        return Conversation.deepseek(*ROLES[old], SYSTEM)
    template = read_chat_template(folder)
    old = bool(template) and ROLES[False][0] not in template
    return Conversation.deepseek(*ROLES[old], SYSTEM if options.get("use_default_system_prompt") else "")


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
        "connector_depth": depths["aligner"],
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
        "connector_depth": vision.depth,
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


def beside(folder: Path, layout: str) -> dict[str, Path]:
    """Return the folders of further weights: none, all is in one."""
    return {}


def holds(config: UniMMConfig) -> bool:
    """Whether a model is of this family: its codes have a vocabulary of their own."""
    return not config.layout.get("codes")


def check_writable(config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
    """Check that Janus's layouts have a place for all that a model has.

    Raises:
        UserError: a line that names what there is no place for.
    """
    vision, generation = config.vision_config(), config.generation_config()
    if vision is None or generation is None:
        raise UserError("--to: this model cannot both understand and draw, and Janus's layouts need both")
    options = config.image_tokenizer or {}
    foreign = {
        "vision.merge": vision.merge != 1,
        "generation.places": generation.places,
        "image_tokenizer.linear_shortcut": options.get("linear_shortcut", False),
        "image_tokenizer.latent_norm": options.get("latent_norm", False),
        "image_tokenizer.patch_size": options.get("patch_size", 1) != 1,
    }
    if found := [name for name, present in foreign.items() if present]:
        raise UserError(f"--to: Janus's layouts have no place for this model's {', '.join(found)}")


def write_files(config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
    """Write the files beside the weights, for a model that does not come from this layout."""
    processor.tokenizer.save_pretrained(folder)
    if layout == "original":
        _write_original(config, processor, folder)
    else:
        _write_transformers(config, processor, folder)


def _is_old(processor: UniMMProcessor) -> bool:
    return not processor.conversation.user.startswith(ROLES[False][0])


def _write_original(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    vision, generation = config.vision_config(), config.generation_config()
    assert vision is not None and generation is not None
    decoder = config.decoder_config()
    width = decoder.hidden_size
    sizes = vision.kwargs
    found = {"patch": sizes["patch_size"], "width": vision.width, "depth": sizes["depth"]}
    named = [name for name, tower in TOWERS.items() if found.items() <= tower.items()]
    tower = {"image_size": vision.image_size, "select_feature": "same", "select_layer": -1}
    tower["model_name"] = named[0] if named else f"siglip_patch{found['patch']}_{vision.image_size}"
    if not named:
        tower["num_heads"] = sizes["num_heads"]  # the original knows no other tower than its own

    def connector(depth: int, width_in: int) -> dict[str, Any]:
        sizes = {"depth": depth, "input_dim": width_in, "n_embed": width, "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": "aligner", "params": sizes}

    head = {"image_token_embed": generation.head_width or width, "image_token_size": generation.codes}
    document = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": {**config.decoder, "architectures": None},
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": tower},
        "aligner_config": connector(config.connector_depth, vision.width),
        "gen_aligner_config": connector(generation.depth or config.connector_depth, generation.dim),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {**head, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": generation.codes, "n_embed": generation.dim},
        },
    }
    write_json(folder / "config.json", document)
    mean, std = list(processor.mean), list(processor.std)
    pictures = {"image_size": vision.image_size, "image_mean": mean, "image_std": std, "min_size": MIN_SIDE}
    write_json(folder / PICTURES_FILE, {"image_processor_type": "VLMImageProcessor", **pictures})
    write_json(
        folder / PROCESSOR_FILE,
        {
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek_old" if _is_old(processor) else "deepseek",
            "image_tag": FEATURE,
            "num_image_tokens": vision.length,
            "add_special_token": False,
            "mask_prompt": False,
        },
    )


def _write_transformers(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    vision, generation = config.vision_config(), config.generation_config()
    assert vision is not None and generation is not None
    sizes, codes = vision.kwargs, config.image_tokenizer or {}
    width, first = config.decoder_config().hidden_size, codes["block_out_channels"][0]
    written = JanusConfig(
        text_config=config.decoder,
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["num_heads"],
            "image_size": vision.image_size,
            "patch_size": sizes["patch_size"],
            "mlp_ratio": sizes["mlp_ratio"],
            "projection_dim": width,
            "num_image_tokens": vision.length,
            "depth": config.connector_depth,
        },
        vq_config={
            "embed_dim": codes["codebook_dim"],
            "num_embeddings": codes["codebook_size"],
            "latent_channels": codes["latent_channels"],
            "base_channels": first,
            "channel_multiplier": [channels // first for channels in codes["block_out_channels"]],
            "num_res_blocks": codes["layers_per_block"],
            "projection_dim": generation.head_width or width,
            "num_hidden_layers": generation.depth or config.connector_depth,
            "image_token_embed_dim": width,
        },
        image_token_id=processor.layout.feature,
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["JanusForConditionalGeneration"],
    )
    written.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=processor.bos,
        eos_token_id=processor.eos,
        pad_token_id=processor.pad,
        generation_kwargs={"boi_token_id": processor.layout.begin},
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    names = {"image_token": FEATURE, "boi_token": BEGIN, "eoi_token": END}
    write_json(path, read_json(path) | {"extra_special_tokens": names})
    size = {"height": vision.image_size, "width": vision.image_size}
    pictures = JanusImageProcessor(size=size, image_mean=list(processor.mean), image_std=list(processor.std))
    user, assistant = ROLES[_is_old(processor)]
    JanusProcessor(
        pictures,
        read_tokenizer(folder),
        chat_template=CHAT_TEMPLATE.replace("USER", user).replace("ASSISTANT", assistant),
        use_default_system_prompt=bool(processor.conversation.system),
        num_image_tokens=vision.length,
    ).save_pretrained(folder)

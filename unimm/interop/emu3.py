"""Emu3 (Stage1, Chat, Gen): configs and key maps of the original repository and of transformers.

One vocabulary holds words and codes, so the decoder's own table and head serve both. In the original layout the
vision tokenizer is a checkpoint of its own.

Sources: baaivision/Emu3 `emu3/mllm/`, `emu3/tokenizer/modeling_emu3visionvq.py`; transformers `models/emu3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Emu3Config, Emu3ImageProcessor, Emu3Processor, GenerationConfig, LlamaConfig
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.interop.emu3_words import TiktokenFiles, read_words, with_placeholder
from unimm.interop.files import (
    PICTURES_FILE,
    normalisation,
    picture_options,
    read_chat_template,
    write_json,
)
from unimm.interop.keymap import SAME, SQUEEZE, KeyMap, Op, Rule, under
from unimm.interop.source import read_json
from unimm.processing import Conversation, UniMMProcessor

MODEL_TYPES = {"emu3": "transformers", "Emu3": "original"}  # of `config.json`: layout
TOKENIZER_FOLDER = "Emu3-VisionTokenizer"
VISION = "vision_tokenizer."  # prefix that its tensors get here
SUBFOLDERS = {"original": {VISION: TOKENIZER_FOLDER}}  # by layout: prefix of the names, folder
# Where decoder, head and image tokenizer are. transformers' model has the names of `inner` since its second release,
# but goes on writing those of its first, and reads both.
PREFIXES = {
    "original": ("model.", "", VISION),
    "transformers": ("text_model.model.", "text_model.", "vqmodel."),
    "inner": ("model.text_model.", "", "model.vqmodel."),
}
AREA = 720 * 720  # pixels of a drawing, unless asked otherwise
POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

USER, ASSISTANT, STOPPED = "USER: ", "ASSISTANT:", ". "
# Turns as `Conversation` has them, for transformers' processor: images first; END is what follows a question.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '' if message['role'] == 'system' else message['role'].upper() + ': ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{- '<image>' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- (part['text'] | trim) + ('END' if message['role'] == 'user' else ' ') -}}
{%- endfor -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "attention_dropout",
)  # fmt: skip


def _residual(ours: str, theirs: str) -> list[Rule]:
    """A residual block; what a norm is made of differs between the sides, and is named alike."""
    return [
        Rule(f"{ours}.norm{{n}}.{{rest}}", f"{theirs}.norm{{n}}.{{rest}}"),
        Rule(f"{ours}.conv{{n}}.{{end}}", f"{theirs}.conv{{n}}.{{end}}"),
        Rule(f"{ours}.conv_shortcut.{{end}}", f"{theirs}.nin_shortcut.{{end}}"),
    ]


def _attention(ours: str, theirs: str, norm: str, layout: str) -> list[Rule]:
    """Self-attention: 1x1 convolutions with their norm inside (original), or linear layers with it beside."""
    original = layout == "original"
    names = ("q", "k", "v", "proj_out") if original else ("q_proj", "k_proj", "v_proj", "out_proj")
    inner = f"{theirs}.norm" if original else norm
    rules = [
        Rule(f"{ours}.group_norm.{{end}}", f"{inner}.{{end}}"),
        Rule(f"{ours}.spatial_norm.{{rest}}", f"{inner}.{{rest}}"),
    ]
    for name, other in zip(("to_q", "to_k", "to_v", "to_out.0"), names, strict=True):
        ops: list[tuple[str, Op]] = [("weight", SQUEEZE if original else SAME), ("bias", SAME)]
        rules += [Rule(f"{ours}.{name}.{end}", f"{theirs}.{other}.{end}", op) for end, op in ops]
    return rules


def _side(side: str, levels: int, layout: str) -> list[Rule]:
    """Encoder or decoder. The decoder's levels are counted from the coarsest here, from the finest there."""
    original, down = layout == "original", side == "encoder"
    stack = f"{side}.{'down' if down else 'up'}"
    if not original:
        stack = f"{side}.{'down_block.down' if down else 'up_block.up'}"
    mid = f"{side}.{'mid' if original else 'middle_block'}"
    sampler = "downsampl" if down else "upsampl"
    rules: list[Rule] = []
    for level in range(levels):
        ours = f"{side}.down_blocks.{level}" if down else f"{side}.up_blocks.{levels - 1 - level}"
        theirs = f"{stack}.{level}"
        rules += _residual(f"{ours}.resnets.{{j}}", f"{theirs}.block.{{j}}")
        rules += _attention(
            f"{ours}.attentions.{{j}}", f"{theirs}.attn.{{j}}", f"{theirs}.attn_norms.{{j}}", layout
        )
        rules.append(Rule(f"{ours}.{sampler}ers.0.conv.{{end}}", f"{theirs}.{sampler}e.conv.{{end}}"))
    return [
        *rules,
        *_residual(f"{side}.mid_block.resnets.0", f"{mid}.block_1"),
        *_attention(f"{side}.mid_block.attentions.0", f"{mid}.attn_1", f"{mid}.attn_norm", layout),
        *_residual(f"{side}.mid_block.resnets.1", f"{mid}.block_2"),
        Rule(f"{side}.conv_norm_out.{{rest}}", f"{side}.norm_out.{{rest}}"),
        Rule(f"{side}.conv_in.{{end}}", f"{side}.conv_in.{{end}}"),
        Rule(f"{side}.conv_out.{{end}}", f"{side}.conv_out.{{end}}"),
        Rule(f"{side}_time.convs.{{i}}.{{rest}}", f"{side}.time_conv.{{i}}.{{rest}}"),
        Rule(f"{side}_time.residuals.{{i}}.{{rest}}", f"{side}.time_res_stack.{{i}}.{{rest}}"),
    ]


def tokenizer_map(layout: str, levels: int) -> KeyMap:
    """Return the map of the vision tokenizer alone.

    Args:
        layout: `original` or `transformers`.
        levels: of its encoder, `len(config.block_out_channels)`.
    """
    return KeyMap(
        rules=(
            *_side("encoder", levels, layout),
            *_side("decoder", levels, layout),
            Rule("quant_conv.{rest}", "quant_conv.{rest}"),
            Rule("post_quant_conv.{rest}", "post_quant_conv.{rest}"),
            Rule("codebook.weight", "quantize.embedding.weight"),
        )
    )


def tokenizer_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the vision tokenizer's config, of either layout, to fields of `MoVQConfig`.

    Raises:
        UserError: a field is missing, or is of a value that no published tokenizer has.
    """
    names = ("base_channels", "channel_multiplier", "latent_channels")
    if "ch" in config:
        names = ("ch", "ch_mult", "z_channels")
    try:
        base, multiplier, latent = (config[name] for name in names)
        spans = int(config["temporal_downsample_factor"])
        wanted = {"embed_dim": latent, "double_z": False, "double_latent": False, "num_attention_heads": 1}
        for name, value in wanted.items():
            if config.get(name, value) != value:
                raise UserError(f"{where}: {name}: {config[name]!r} is not supported, only {value!r}")
        if spans & (spans - 1) or spans < 1:
            raise UserError(f"{where}: temporal_downsample_factor: {spans}, expected a power of 2")
        return {
            "block_out_channels": [base * factor for factor in multiplier],
            "layers_per_block": config["num_res_blocks"],
            "attention_levels": list(config["attn_resolutions"]),
            "latent_channels": latent,
            "codebook_size": config["codebook_size"],
            "halvings": spans.bit_length() - 1,
        }
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None


def key_map(layout: str, config: UniMMConfig) -> KeyMap:
    """Return the key map of the whole model in the `original` or the `transformers` layout."""
    assert config.image_tokenizer is not None
    levels = len(config.image_tokenizer["block_out_channels"])
    names = (getattr(config, "source_keys", None) if layout == "transformers" else None) or layout
    text, head, images = PREFIXES[names]
    tokenizer = tokenizer_map(layout, levels).rules
    return KeyMap(
        rules=(
            Rule("decoder.lm_head.weight", f"{head}lm_head.weight"),
            Rule("decoder.model.{rest}", f"{text}{{rest}}"),
            *under(list(tokenizer), "image_tokenizer.", images),
        ),
        kept=(f"{text}layers.{{i}}.self_attn.rotary_emb.inv_freq",),
        tied=("decoder.lm_head.weight",),
    )


def unimm_config(folder: Path, layout: str, shapes: Mapping[str, Tensor]) -> UniMMConfig:
    """Translate a checkpoint's configuration.

    Args:
        folder: the checkpoint, with `config.json` and the tokenizer's files; in the original layout the vision
            tokenizer lies in a folder of its own (see `beside`).
        layout: `original` or `transformers`.
        shapes: its tensors on the meta device.

    Raises:
        UserError: a line that names the file and field that is missing or not supported.
    """
    path = folder / "config.json"
    config = read_json(path)
    places = [folder]
    text: Any
    codes: Any
    if layout == "original":
        places.append(beside(folder, layout)[VISION])
        text, codes = config, read_json(places[1] / "config.json")
    else:
        text, codes = (config.get(part) for part in ("text_config", "vq_config"))
    if not isinstance(text, dict) or not isinstance(codes, dict):
        raise UserError(f"{path}: text_config and vq_config are missing; this is no whole Emu3 checkpoint")
    if layout == "transformers":  # which leaves out what is as by default
        codes = Emu3VQVAEConfig(**codes).to_dict()
    where = path if layout == "transformers" else places[-1] / path.name
    tokenizer = {"model_type": "unimm_movq", **tokenizer_options(codes, str(where))}
    stride = 2 ** (len(tokenizer["block_out_channels"]) - 1)
    side = max(round(AREA**0.5 / stride), 1)
    words = read_words(folder)
    decoder = _decoder(text, config, words)
    keys: dict[str, Any] = {}
    if any(name.startswith("model.text_model.") for name in shapes):
        keys["source_keys"] = "inner"
    return UniMMConfig(
        decoder=decoder,
        generation={
            "codes": tokenizer["codebook_size"],
            "dim": tokenizer["latent_channels"],
            "image_size": side * stride,
            "stride": stride,
            "shared": True,
            **_pictures(places),
        },
        image_tokenizer={**tokenizer, "image_size": side * stride},
        layout=_layout(words, tokenizer["codebook_size"], decoder["vocab_size"], side, folder),
        conversation=vars(
            Conversation(
                user=USER,
                assistant=_assistant(folder, layout),
                system="You are a helpful assistant. ",
                bare_drawings=True,
                praise=POSITIVE,
                negative=NEGATIVE,
            )
        ),
        tie_word_embeddings=decoder["tie_word_embeddings"],
        **keys,
    )


def _assistant(folder: Path, layout: str) -> str:
    """What closes a question: in the original a full stop comes first, in transformers' template none."""
    stop = layout == "original" or f"'{STOPPED}'" in read_chat_template(folder)
    return (STOPPED if stop else " ") + ASSISTANT


def beside(folder: Path, layout: str) -> dict[str, Path]:
    """Return the folders of further weights, by the prefix that their tensors get; only the original has one.

    Raises:
        UserError: the vision tokenizer is neither in the folder nor beside it.
    """
    if layout != "original":
        return {}
    for place in (folder / TOKENIZER_FOLDER, folder.parent / TOKENIZER_FOLDER):
        if place.is_dir():
            return {VISION: place}
    raise UserError(f"{folder}: Emu3's weights need {TOKENIZER_FOLDER} in that folder or beside it")


def _decoder(text: Mapping[str, Any], config: Mapping[str, Any], words: Any) -> dict[str, Any]:
    """Emu3's decoder is Llama's; only its defaults differ, and what is as by default need not be written."""
    own = ("model_type", "architectures", "transformers_version", "auto_map", "pad_token_id")
    given = {key: value for key, value in text.items() if key not in own}
    full = Emu3TextConfig(**given, pad_token_id=words.pad_token_id).to_dict()
    known = LlamaConfig().to_dict().keys()
    options = {key: value for key, value in full.items() if key in known and key not in own[:-1]}
    options["tie_word_embeddings"] = config.get("tie_word_embeddings", full["tie_word_embeddings"])
    return LlamaConfig(**options).to_dict()


def _pictures(places: Sequence[Path]) -> dict[str, Any]:
    """Limits and normalisation of the pictures to understand, from the first of these folders that says them."""
    options = picture_options(*places, key="min_pixels")
    area = (options.get("min_pixels", 512 * 512), options.get("max_pixels", 1024 * 1024))
    return {"area": area, **normalisation(options)}


def _layout(words: Any, codes: int, vocabulary: int, side: int, folder: Path) -> dict[str, Any]:
    """The grammar's tokens, by the names that every published tokenizer gives them."""
    known = words.get_vocab()

    def token(name: str) -> int:
        if name not in known:
            raise UserError(f"{folder}: the tokenizer has no {name}; this is no Emu3 checkpoint")
        return int(known[name])

    first = token("<|visual token 000000|>")
    if token(f"<|visual token {codes - 1:06d}|>") != first + codes - 1:
        raise UserError(f"{folder}: the tokenizer's {codes} visual tokens do not follow one another")
    return {
        "begin": token("<|image start|>"),
        "end": token("<|image end|>"),
        # the original writes codes at once; its placeholder is one past the vocabulary, and never embedded
        "feature": known.get("<image>", vocabulary),
        "code": first,
        "features": 0,
        "grid": (side, side),
        "codes": codes,
        "wrapper": token("<|image token|>"),
        "end_of_line": token("<|extra_200|>"),
        "end_of_frame": token("<|extra_201|>"),
    }


def holds(config: UniMMConfig) -> bool:
    """Whether a model is of this family: its codes are tokens."""
    return bool(config.layout.get("codes"))


def check_writable(config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
    """Check that a layout has a place for all that a model has.

    Raises:
        UserError: a line that names what there is no place for.
    """
    codes, turn, kind = config.image_tokenizer or {}, processor.conversation, config.decoder["model_type"]
    if config.vision is not None or codes.get("model_type") != "unimm_movq":
        raise UserError("--to: Emu3's layouts hold a decoder and a MoVQ tokenizer, and nothing else")
    if kind != "llama":
        raise UserError(f"--to: Emu3's layouts hold a decoder of the kind 'llama', this one is {kind!r}")
    if any(width % codes["block_out_channels"][0] for width in codes["block_out_channels"]):
        raise UserError("--to: Emu3's layouts say channels as multiples of the image tokenizer's first")
    if turn.user != USER or turn.assistant not in (f" {ASSISTANT}", STOPPED + ASSISTANT):
        raise UserError(
            f"--to: Emu3's layouts write turns as {USER!r} and {ASSISTANT!r}, this model does not"
        )
    if layout == "transformers":
        with_placeholder(processor.tokenizer, where)
        return
    TiktokenFiles.of(processor.tokenizer, where)
    own = config.decoder_config()
    foreign = {
        "attention_bias": own.attention_bias,
        "mlp_bias": own.mlp_bias,
        "head_dim": own.head_dim != own.hidden_size // own.num_attention_heads,
        "rope_parameters": own.rope_parameters["rope_type"] not in ("default", "linear", "dynamic"),
    }
    if found := [name for name, present in foreign.items() if present]:
        raise UserError(f"--to: Emu3's original layout has no place for this decoder's {', '.join(found)}")


def write_files(config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
    """Write the files beside the weights, for a model that does not come from this layout."""
    if layout == "original":
        _write_original(config, processor, folder)
    else:
        _write_transformers(config, processor, folder)
    GenerationConfig(
        bos_token_id=processor.bos,
        eos_token_id=processor.eos,
        pad_token_id=processor.pad,
        do_sample=True,
        top_k=2048,
    ).save_pretrained(folder)


def _picture_options(config: UniMMConfig) -> dict[str, Any]:
    generation = config.generation_config()
    assert generation is not None and generation.area is not None
    return {
        "min_pixels": generation.area[0],
        "max_pixels": generation.area[1],
        "spatial_factor": generation.stride,
        "image_mean": list(generation.mean),
        "image_std": list(generation.std),
    }


def _channels(codes: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The first level's channels and each level's as a multiple of them."""
    first = codes["block_out_channels"][0]
    return first, [channels // first for channels in codes["block_out_channels"]]


def _write_transformers(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    codes = config.image_tokenizer
    assert codes is not None
    words = with_placeholder(processor.tokenizer, str(folder))
    first, multiples = _channels(codes)
    own = ("model_type", "architectures", "transformers_version", "pretraining_tp", "_name_or_path")
    Emu3Config(
        text_config={key: value for key, value in config.decoder.items() if key not in own},
        vq_config={
            "codebook_size": codes["codebook_size"],
            "embed_dim": codes["latent_channels"],
            "latent_channels": codes["latent_channels"],
            "temporal_downsample_factor": 2 ** codes["halvings"],
            "base_channels": first,
            "channel_multiplier": multiples,
            "num_res_blocks": codes["layers_per_block"],
            "attn_resolutions": codes["attention_levels"],
            "hidden_size": codes["block_out_channels"][-1],
        },
        vocabulary_map=words.get_vocab(),
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["Emu3ForConditionalGeneration"],
    ).save_pretrained(folder)
    template = CHAT_TEMPLATE.replace("END", processor.conversation.assistant.removesuffix(ASSISTANT))
    Emu3Processor(
        Emu3ImageProcessor(**_picture_options(config)), words, chat_template=template
    ).save_pretrained(folder)


def _write_original(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    codes, decoder, layout = config.image_tokenizer, config.decoder_config(), processor.layout
    assert codes is not None
    TiktokenFiles.of(processor.tokenizer, str(folder)).write(folder)
    rope = decoder.rope_parameters
    scaling = {"type": rope["rope_type"], "factor": rope.get("factor")}
    text = {name: getattr(decoder, name) for name in _TEXT_FIELDS}
    document = {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": "Emu3",
        **text,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "bos_token_id": processor.bos,
        "eos_token_id": processor.eos,
        "pad_token_id": processor.pad,
        "img_token_id": layout.wrapper,
        "boi_token_id": layout.begin,
        "eoi_token_id": layout.end,
        "eol_token_id": layout.end_of_line,
        "eof_token_id": layout.end_of_frame,
        "image_area": AREA,
    }
    write_json(folder / "config.json", document)
    first, multiples = _channels(codes)
    sizes = {
        "architectures": ["Emu3VisionVQModel"],
        "model_type": "Emu3VisionVQ",
        "codebook_size": codes["codebook_size"],
        "embed_dim": codes["latent_channels"],
        "z_channels": codes["latent_channels"],
        "double_z": False,
        "in_channels": 3,
        "out_channels": 3,
        "temporal_downsample_factor": 2 ** codes["halvings"],
        "ch": first,
        "ch_mult": multiples,
        "num_res_blocks": codes["layers_per_block"],
        "attn_resolutions": codes["attention_levels"],
        "dropout": 0.0,
    }
    write_json(folder / TOKENIZER_FOLDER / "config.json", sizes)
    pictures = {"image_processor_type": "Emu3VisionVQImageProcessor", **_picture_options(config)}
    write_json(folder / TOKENIZER_FOLDER / PICTURES_FILE, pictures)

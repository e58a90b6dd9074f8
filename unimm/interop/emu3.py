"""Emu3 (Stage1, Chat, Gen): configs and key maps of the original repository and of transformers.

One vocabulary holds words and codes, so the decoder's own table and head serve both. In the original layout the
vision tokenizer is a checkpoint of its own.

Sources: baaivision/Emu3 `emu3/mllm/`, `emu3/tokenizer/modeling_emu3visionvq.py`; transformers `models/emu3`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.normalizers import NFC
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from unimm.configuration import UniMMConfig
from unimm.errors import UserError
from unimm.interop.keymap import SAME, SQUEEZE, KeyMap, Op, Rule, under
from unimm.interop.source import read_json
from unimm.processing import PROCESSOR_FILE, Conversation, UniMMProcessor, read_tokenizer

PREPROCESSOR_FILE = "preprocessor_config.json"
TOKENIZER_FOLDER = "Emu3-VisionTokenizer"
VISION = "vision_tokenizer."  # prefix that its tensors get here
SUBFOLDERS = {"original": {VISION: TOKENIZER_FOLDER}}  # by layout: prefix of the names, folder
# where decoder, head and image tokenizer are; `first` is how transformers' first Emu3 checkpoints were written
PREFIXES = {
    "original": ("model.", "", VISION),
    "transformers": ("model.text_model.", "", "model.vqmodel."),
    "first": ("text_model.model.", "text_model.", "vqmodel."),
}
# the original tokenizer's tokens between its words and the images' (`emu3/mllm/tokenization_emu3.py`)
FIRST_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)
AREA = 720 * 720  # pixels of a drawing, unless asked otherwise
POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


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
    """Return the key map of the whole model: `original`, `transformers`, or `transformers` as it was at first."""
    assert config.image_tokenizer is not None
    levels = len(config.image_tokenizer["block_out_channels"])
    text, head, images = PREFIXES[getattr(config, "source_keys", None) or layout]
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
        places.append(beside(folder)[VISION])
        text, codes = config, read_json(places[1] / "config.json")
    else:
        text, codes = (config.get(part) for part in ("text_config", "vq_config"))
    if not isinstance(text, dict) or not isinstance(codes, dict):
        raise UserError(f"{path}: text_config and vq_config are missing; this is no whole Emu3 checkpoint")
    tokenizer = {"model_type": "unimm_movq", **tokenizer_options(codes, str(path))}
    stride = 2 ** (len(tokenizer["block_out_channels"]) - 1)
    side = max(round(AREA**0.5 / stride), 1)
    words = read_words(folder)
    decoder = _decoder(text, config, words)
    keys: dict[str, Any] = {}
    if any(name.startswith("text_model.") for name in shapes):
        keys["source_keys"] = "first"
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
                user="USER: ",
                assistant=" ASSISTANT:" if layout == "transformers" else ". ASSISTANT:",
                system="You are a helpful assistant. ",
                bare_drawings=True,
                praise=POSITIVE,
                negative=NEGATIVE,
            )
        ),
        tie_word_embeddings=decoder["tie_word_embeddings"],
        **keys,
    )


def read_words(folder: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's text tokenizer; the original's, which is code of its own, is read from its two files.

    Raises:
        UserError: the original's files are there, but the package that reads them is not.
    """
    ranks = folder / "emu3.tiktoken"
    if not ranks.exists() or (folder / "tokenizer.json").exists():
        return read_tokenizer(folder)
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError(f"{ranks}: needs the package tiktoken; install it (pip install tiktoken)")
    images = (folder / "emu3_vision_tokens.txt").read_text(encoding="utf-8").split("\n")
    special = [*FIRST_TOKENS, *(token.strip() for token in images if token.strip())]
    converter = TikTokenConverter(str(ranks), extra_special_tokens=special)
    converter.pattern = converter.pattern.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
    tokenizer = converter.converted()
    tokenizer.normalizer = NFC()
    names = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def beside(folder: Path) -> dict[str, Path]:
    """Return the folders of further weights of the original layout, by the prefix that their tensors get.

    Raises:
        UserError: the vision tokenizer is neither in the folder nor beside it.
    """
    for place in (folder / TOKENIZER_FOLDER, folder.parent / TOKENIZER_FOLDER):
        if place.is_dir():
            return {VISION: place}
    raise UserError(f"{folder}: Emu3's weights need {TOKENIZER_FOLDER} in that folder or beside it")


def _decoder(text: Mapping[str, Any], config: Mapping[str, Any], words: Any) -> dict[str, Any]:
    """Emu3's decoder is Llama's; only its defaults differ."""
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    dropped = ("model_type", "architectures", "transformers_version", "auto_map", "pad_token_id")
    options = {key: value for key, value in text.items() if key in known and key not in dropped}
    options.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return LlamaConfig(**options, pad_token_id=words.pad_token_id).to_dict()


def _pictures(places: Sequence[Path]) -> dict[str, Any]:
    """Limits and normalisation of the pictures to understand, from the first of these folders that says them."""
    found = [place / name for place in places for name in (PREPROCESSOR_FILE, PROCESSOR_FILE)]
    documents = [read_json(path) for path in found if path.exists()]
    known = [document.get("image_processor", document) for document in documents]
    options: dict[str, Any] = next((document for document in known if "min_pixels" in document), {})
    return {
        "area": (options.get("min_pixels", 512 * 512), options.get("max_pixels", 1024 * 1024)),
        "mean": tuple(options.get("image_mean") or (0.5, 0.5, 0.5)),
        "std": tuple(options.get("image_std") or (0.5, 0.5, 0.5)),
    }


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


def check_writable(config: UniMMConfig) -> None:
    """Raise a `UserError` if a model has what Emu3's layouts have no place for."""
    if config.vision is not None or (config.image_tokenizer or {}).get("model_type") != "unimm_movq":
        raise UserError("--to: Emu3's layouts hold a decoder and a MoVQ tokenizer, and nothing else")


def write_files(config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
    """Refuse, until the layouts can be written for a model that does not come from them."""
    raise UserError(f"--to: an Emu3 checkpoint can only go back to the layout it came from, not to {layout}")

"""Writes models in Emu3's layouts: the files beside the weights, of the original repository and of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Emu3Config, Emu3ImageProcessor, Emu3Processor, GenerationConfig

from unimm.errors import UserError
from unimm.families.emu3_text_tokenizer import PLACEHOLDER, TiktokenFiles, with_placeholder
from unimm.families.family import SeparateImageTokenizer, Writer
from unimm.families.generation_config import sampling_options
from unimm.families.movq import MODEL_TYPE
from unimm.families.source import PREPROCESSOR_FILE
from unimm.families.written_template import chat_template
from unimm.files import write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import AreaViewsConfig
from unimm.processing.processor import UniMMProcessor

VISION_TOKENIZER = SeparateImageTokenizer(
    "vision_tokenizer.", "Emu3-VisionTokenizer", "BAAI/Emu3-VisionTokenizer", MODEL_TYPE
)
SAMPLING = {
    "guidance_scale": 3.0,
    "temperature": 1.0,
    "top_k": 2048,
    "top_p": None,
}  # of emu3's image_generation.py
AREA = 720 * 720  # pixels of a drawing, unless asked otherwise
USER, ASSISTANT, STOPPED = "USER: ", "ASSISTANT:", ". "
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "attention_dropout",
)  # fmt: skip


class Emu3Writer(Writer):
    """Emu3's layouts hold a decoder of Llama's kind, which draws with a MoVQ tokenizer, and no encoder."""

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """Check that nothing is beyond what Emu3's own code has, turns and text tokenizer included."""
        codes, turn, kind = config.image_tokenizer or {}, processor.turns, config.decoder["model_type"]
        if (config.encoder or {}).get("kind") != "codes" or codes.get("model_type") != "unimm_movq":
            raise UserError("--to: Emu3's layouts hold a decoder and a MoVQ tokenizer, and nothing else")
        if kind != "llama":
            raise UserError(f"--to: Emu3's layouts hold a decoder of the kind 'llama', this one is {kind!r}")
        if any(width % codes["block_out_channels"][0] for width in codes["block_out_channels"]):
            raise UserError("--to: Emu3's layouts say channels as multiples of the image tokenizer's first")
        if layout == "transformers":
            with_placeholder(processor.tokenizer, where)
            return
        if turn.user != USER or turn.assistant not in (f" {ASSISTANT}", STOPPED + ASSISTANT):
            raise UserError(
                f"--to: Emu3's original layout writes turns as {USER!r} and {ASSISTANT!r}, this model does not"
            )
        TiktokenFiles.of(processor.tokenizer, where)
        own = config.decoder_config()
        foreign = {
            "attention_bias": own.attention_bias,
            "mlp_bias": own.mlp_bias,
            "head_dim": own.head_dim != own.hidden_size // own.num_attention_heads,
            "rope_parameters": own.rope_parameters["rope_type"] not in ("default", "linear", "dynamic"),
        }
        if found := [name for name, present in foreign.items() if present]:
            raise UserError(
                f"--to: Emu3's original layout has no place for this decoder's {', '.join(found)}"
            )

    def write(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """Write the files beside the weights."""
        if layout == "original":
            _write_original(config, processor, folder)
        else:
            _write_transformers(config, processor, folder)
        GenerationConfig(
            bos_token_id=processor.bos,
            eos_token_id=processor.end_tokens[0] if len(processor.end_tokens) == 1 else processor.end_tokens,
            pad_token_id=processor.pad,
            do_sample=True,
            top_k=SAMPLING["top_k"],
            **({"generation_kwargs": own} if (own := sampling_options(config, SAMPLING)) else {}),
        ).save_pretrained(folder)


def _image_options(config: UniMMConfig) -> dict[str, Any]:
    views = config.views_config()
    assert isinstance(views, AreaViewsConfig)
    return {
        "min_pixels": views.least,
        "max_pixels": views.most,
        "spatial_factor": views.stride,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }


def _channels(codes: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The first level's channels and each level's as a multiple of them."""
    first = codes["block_out_channels"][0]
    return first, [channels // first for channels in codes["block_out_channels"]]


def _write_transformers(config: UniMMConfig, processor: UniMMProcessor, folder: Path) -> None:
    codes = config.image_tokenizer
    assert codes is not None
    text_tokenizer = with_placeholder(processor.tokenizer, str(folder))
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
        vocabulary_map=text_tokenizer.get_vocab(),
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["Emu3ForConditionalGeneration"],
    ).save_pretrained(folder)
    template = chat_template(processor, PLACEHOLDER, " ", images_first=True)
    Emu3Processor(
        Emu3ImageProcessor(**_image_options(config)), text_tokenizer, chat_template=template
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
        "model_type": VISION_TOKENIZER.model_type,
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
    write_json(folder / VISION_TOKENIZER.folder / "config.json", sizes)
    images = {"image_processor_type": "Emu3VisionVQImageProcessor", **_image_options(config)}
    write_json(folder / VISION_TOKENIZER.folder / PREPROCESSOR_FILE, images)

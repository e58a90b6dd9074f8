"""Writes models in Llama 3.2 Vision's layouts: transformers' `mllama`, and Meta's `params.json`.

Meta's layout says little: its turns are Instruct's unless a template stands beside it, its context is that of the
published models, blocks stand evenly, and a text tokenizer that is not Llama 3's is written as transformers has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import MllamaConfig, MllamaImageProcessor, MllamaProcessor

from unimm.errors import UserError
from unimm.families.common import CLIP_MEAN, CLIP_STD
from unimm.families.llama_tokenizer import IMAGE, RANKS_FILE, read_llama_tokenizer, written_ranks
from unimm.families.writing import (
    UnderstandingWriter,
    needs_token,
    template_of,
    write_generation,
    write_images,
    write_tokenizer,
)
from unimm.files import write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.encoder_parts import TiledEncoderConfig
from unimm.models.fusion_parts import CrossFusionConfig
from unimm.models.parts import CanvasViewsConfig
from unimm.models.tiled import tile_ratios
from unimm.models.turns import TEMPLATE_FILE
from unimm.processing.processor import UniMMProcessor

EXTRA = 8  # rows of the embedding, for tokens that are never written


class LlamaVisionWriter(UnderstandingWriter):
    """One encoder of tiles, and blocks of cross-attention with as many heads as the decoder."""

    title = "Llama 3.2 Vision"
    keys: ClassVar[Mapping[str, str] | None] = {}
    extra_tokens = EXTRA

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """See `UnderstandingWriter`; the mark of an image has a name."""
        super().check(config, processor, layout, where)
        needs_token(processor, processor.layout.feature, IMAGE, self.title)

    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """See `UnderstandingWriter`."""
        views = config.views_config()
        assert isinstance(views, CanvasViewsConfig)
        template = template_of(processor, IMAGE)
        normal: dict[str, Any] = {"image_mean": list(views.mean), "image_std": list(views.std)}
        if layout == "original":
            write_json(folder / "params.json", _params(config))
            _write_words(processor, folder, template)
            if normal != {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}:
                write_images(folder, "MllamaImageProcessor", "MllamaProcessor", normal)
            return
        _config(config, processor).save_pretrained(folder)
        tokenizer = write_tokenizer(processor, folder, {})
        size = {"height": views.tile, "width": views.tile}
        images = MllamaImageProcessor(size=size, max_image_tiles=views.most, **normal)
        MllamaProcessor(images, tokenizer, chat_template=template).save_pretrained(folder)
        write_generation(processor, folder)


def _write_words(processor: UniMMProcessor, folder: Path, template: str) -> None:
    """Write the text tokenizer of Meta's layout, and the template that its code does not know."""
    path = folder / RANKS_FILE
    if (ranks := written_ranks(processor.tokenizer)) is not None:
        path.write_text(ranks, encoding="ascii")
        same = (
            read_llama_tokenizer(path).backend_tokenizer.to_str()
            == processor.tokenizer.backend_tokenizer.to_str()
        )
        if not same:
            path.unlink()
    if not path.exists():
        write_tokenizer(processor, folder, {})
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _parts(config: UniMMConfig) -> tuple[TiledEncoderConfig, CrossFusionConfig, Any]:
    """The parts that the family needs."""
    encoder, fusion = config.encoder_config(), config.fusion_part()
    assert isinstance(encoder, TiledEncoderConfig) and isinstance(fusion, CrossFusionConfig)
    decoder: Any = config.decoder_config()
    if decoder.model_type != "llama":
        raise UserError(
            f"--to: Llama 3.2 Vision's layouts have no place for a decoder of {decoder.model_type}"
        )
    return encoder, fusion, decoder


def _config(config: UniMMConfig, processor: UniMMProcessor) -> MllamaConfig:
    encoder, fusion, decoder = _parts(config)
    places = sorted(fusion.layers)
    text = {
        "vocab_size": decoder.vocab_size, "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size, "hidden_act": decoder.hidden_act,
        "num_hidden_layers": decoder.num_hidden_layers + len(places),
        "num_attention_heads": decoder.num_attention_heads, "num_key_value_heads": decoder.num_key_value_heads,
        "cross_attention_layers": [place + number for number, place in enumerate(places)],
        "max_position_embeddings": decoder.max_position_embeddings, "rms_norm_eps": decoder.rms_norm_eps,
        "rope_parameters": dict(decoder.rope_parameters), "initializer_range": decoder.initializer_range,
        "bos_token_id": processor.bos, "eos_token_id": processor.end_tokens[0], "pad_token_id": processor.pad,
    }  # fmt: skip
    vision = {
        "hidden_size": encoder.hidden, "intermediate_size": encoder.mlp_width, "num_hidden_layers": encoder.depth,
        "num_global_layers": encoder.global_depth, "attention_heads": encoder.heads, "image_size": encoder.image_size,
        "patch_size": encoder.patch, "max_num_tiles": encoder.tiles, "vision_output_dim": encoder.width,
        "intermediate_layers_indices": list(encoder.layers),
        "supported_aspect_ratios": [list(grid) for grid in tile_ratios(encoder.tiles)],
    }  # fmt: skip
    return MllamaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.layout.feature,
        architectures=["MllamaForConditionalGeneration"],
    )


def _params(config: UniMMConfig) -> dict[str, Any]:
    encoder, fusion, decoder = _parts(config)
    views = config.views_config()
    assert isinstance(views, CanvasViewsConfig)
    rope = decoder.rope_parameters
    return {
        "dim": decoder.hidden_size,
        "n_layers": decoder.num_hidden_layers,
        "n_heads": decoder.num_attention_heads,
        "n_kv_heads": decoder.num_key_value_heads,
        "vocab_size": decoder.vocab_size,
        # of which the width is made by two roundings down
        "ffn_dim_multiplier": (decoder.intermediate_size + 0.5) / int(8 * decoder.hidden_size / 3),
        "multiple_of": 1,
        "norm_eps": decoder.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3",
        "vision_chunk_size": views.tile,
        "vision_max_num_chunks": views.most,
        "vision_num_cross_attention_layers": len(fusion.layers),
        "vision_encoder": {
            "patch_size": encoder.patch,
            "width": encoder.hidden,
            "layers": encoder.depth,
            "heads": encoder.heads,
            "mlp_ratio": encoder.mlp_width / encoder.hidden,
            "n_global_layers": encoder.global_depth,
            "max_num_tiles": encoder.tiles,
            "return_intermediate": list(encoder.layers),
        },
    }

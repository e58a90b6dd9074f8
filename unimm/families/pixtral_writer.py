"""Writes models in Pixtral's layouts: transformers', and the original's `params.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaConfig, PixtralImageProcessor, PixtralProcessor

from unimm.errors import UserError
from unimm.families.tekken import TEKKEN_FILE, tekken_document
from unimm.families.writing import (
    UnderstandingWriter,
    needs_token,
    template_of,
    token_name,
    write_generation,
    write_tokenizer,
)
from unimm.files import write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import FitViewsConfig, MlpConnectorConfig, TransformersEncoderConfig
from unimm.processing.processor import UniMMProcessor

ROW_BREAK, IMAGE_END = "[IMG_BREAK]", "[IMG_END]"


class PixtralWriter(UnderstandingWriter):
    """One encoder and a decoder of Mistral's."""

    title = "Pixtral"

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """See `UnderstandingWriter`; the tokens of rows have names, and the original's heads are its own."""
        super().check(config, processor, layout, where)
        picture = processor.layout.picture
        needs_token(processor, None if picture is None else picture.row_end, ROW_BREAK, self.title)
        needs_token(processor, None if picture is None else picture.last_row_end, IMAGE_END, self.title)
        if layout == "original" and config.decoder_config().tie_word_embeddings:
            raise UserError(
                "--to: Pixtral's original layout has a head of its own, this model's is its embedding"
            )

    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """See `UnderstandingWriter`."""
        if layout == "original":
            write_json(folder / "params.json", _params(config, processor))
            if (document := tekken_document(processor.tokenizer)) is not None:
                write_json(folder / TEKKEN_FILE, document)
            else:  # which the original's code does not read, but this does
                write_tokenizer(processor, folder, {}, template_of(processor, "[IMG]"))
            return
        image = token_name(processor, processor.layout.feature)
        _config(config, processor).save_pretrained(folder)
        tokenizer = write_tokenizer(processor, folder, {})
        views, encoder, _ = _parts(config)
        images = PixtralImageProcessor(
            size={"longest_edge": max(views.bounds)},
            patch_size={"height": encoder.patch, "width": encoder.patch},
            image_mean=list(views.mean),
            image_std=list(views.std),
        )
        PixtralProcessor(
            images,
            tokenizer,
            patch_size=encoder.patch,
            image_token=image,
            image_break_token=ROW_BREAK,
            image_end_token=IMAGE_END,
            chat_template=template_of(processor, image),
        ).save_pretrained(folder)
        write_generation(processor, folder)


def _parts(config: UniMMConfig) -> tuple[FitViewsConfig, TransformersEncoderConfig, MlpConnectorConfig]:
    """The parts that the family needs."""
    views, encoder, connector = config.views_config(), config.encoder_config(), config.connector_config()
    assert isinstance(views, FitViewsConfig) and isinstance(encoder, TransformersEncoderConfig)
    if not isinstance(connector, MlpConnectorConfig):
        raise UserError("--to: Pixtral's layouts have no place for this model's connector")
    return views, encoder, connector


def _config(config: UniMMConfig, processor: UniMMProcessor) -> LlavaConfig:
    _, encoder, connector = _parts(config)
    decoder: Any = config.decoder_config()
    return LlavaConfig(
        # None: there is none, which is not so by default
        text_config={**config.decoder, "sliding_window": decoder.sliding_window},
        vision_config={**encoder.kwargs, "model_type": "pixtral"},
        image_token_index=processor.layout.feature,
        projector_hidden_act=connector.act,
        multimodal_projector_bias=connector.bias,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=config.decoder_config().tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )


def _params(config: UniMMConfig, processor: UniMMProcessor) -> dict[str, Any]:
    views, encoder, connector = _parts(config)
    decoder: Any = config.decoder_config()
    picture, sizes = processor.layout.picture, encoder.kwargs
    assert picture is not None
    return {
        "dim": decoder.hidden_size,
        "n_layers": decoder.num_hidden_layers,
        "head_dim": decoder.head_dim,
        "hidden_dim": decoder.intermediate_size,
        "n_heads": decoder.num_attention_heads,
        "n_kv_heads": decoder.num_key_value_heads,
        "norm_eps": decoder.rms_norm_eps,
        "vocab_size": decoder.vocab_size,
        "rope_theta": decoder.rope_parameters["rope_theta"],
        "max_position_embeddings": decoder.max_position_embeddings,
        "vision_encoder": {
            "hidden_size": encoder.width,
            "num_channels": 3,
            "image_size": sizes.get("image_size", max(views.bounds)),
            "max_image_size": max(views.bounds),
            "patch_size": encoder.patch,
            "rope_theta": sizes["rope_parameters"]["rope_theta"],
            "intermediate_size": sizes["intermediate_size"],
            "num_hidden_layers": sizes["num_hidden_layers"],
            "num_attention_heads": sizes["num_attention_heads"],
            "adapter_bias": connector.bias,
            "image_token_id": processor.layout.feature,
            "image_break_token_id": picture.row_end,
            "image_end_token_id": picture.last_row_end,
        },
    }

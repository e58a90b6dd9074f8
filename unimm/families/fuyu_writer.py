"""Writes models in Fuyu's layout: as transformers has it, or in the form of the published folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import FuyuConfig, FuyuImageProcessor, FuyuProcessor

from unimm.errors import UserError
from unimm.families.writing import (
    UnderstandingWriter,
    needs_token,
    token_name,
    write_generation,
    write_images,
    write_tokenizer,
)
from unimm.files import write_json
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import FitViewsConfig, LinearEncoderConfig
from unimm.processing.processor import UniMMProcessor

IMAGE, LINE = "|SPEAKER|", "|NEWLINE|"  # tokens of an image, as transformers' processor calls them
OPEN_ANSWER = "<0x04>"
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")


class FuyuWriter(UnderstandingWriter):
    """Patches without an encoder."""

    title = "Fuyu"

    def check(self, config: UniMMConfig, processor: UniMMProcessor, layout: str, where: str) -> None:
        """See `UnderstandingWriter`; the processor knows tokens by their names."""
        super().check(config, processor, layout, where)
        picture = processor.layout.picture
        needs_token(processor, processor.layout.feature, IMAGE, self.title)
        if OPEN_ANSWER not in processor.tokenizer.get_vocab():
            raise UserError(
                f"--to: Fuyu's layouts open an answer with {OPEN_ANSWER}, which this model's text tokenizer has not"
            )
        needs_token(processor, None if picture is None else picture.row_end, LINE, self.title)

    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """See `UnderstandingWriter`."""
        encoder = config.encoder_config()
        assert isinstance(encoder, LinearEncoderConfig)
        text = config.decoder_config().to_dict()
        # which has no room for what it is by default
        text = {name: text[name] for name in {*config.decoder, "rope_parameters"} if name in text}
        written = FuyuConfig(
            text_config={**text, "model_type": "persimmon"},
            patch_size=encoder.patch,
            num_channels=3,
            image_token_id=processor.layout.feature,
            tie_word_embeddings=config.decoder_config().tie_word_embeddings,
            architectures=["FuyuForCausalLM"],
        )
        tokenizer = write_tokenizer(processor, folder, {})
        if layout == "original":
            write_json(folder / "config.json", _flat(written))
            write_images(folder, "FuyuImageProcessor", "FuyuProcessor", _images(config))
        else:
            written.save_pretrained(folder)
            FuyuProcessor(FuyuImageProcessor(**_images(config)), tokenizer).save_pretrained(folder)
        assert token_name(processor, processor.layout.feature) == IMAGE
        write_generation(processor, folder)


def _flat(written: FuyuConfig) -> dict[str, Any]:
    """The published form: the decoder's fields stand among the others."""
    document = written.to_dict()
    text = document.pop("text_config")
    rope = text.pop("rope_parameters")
    own = {name: value for name, value in text.items() if name not in ("model_type", "architectures")}
    return {
        **own,
        **document,
        **{name: rope[name] for name in ROPE_FIELDS if name in rope},
        "rope_scaling": None,
    }


def _images(config: UniMMConfig) -> dict[str, Any]:
    """Options of the image processor."""
    views = config.views_config()
    assert isinstance(views, FitViewsConfig)
    pad = views.pad_value if isinstance(views.pad_value, int) else views.pad_value[0]
    return {
        "size": {"height": views.bounds[0], "width": views.bounds[1]},
        "patch_size": {"height": views.unit, "width": views.unit},
        "padding_value": float(pad),
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }

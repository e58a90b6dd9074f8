"""Writes models in Qwen2-VL's layout: as transformers has it, or in the form of the published folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

from unimm.errors import UserError
from unimm.families.writing import (
    UnderstandingWriter,
    template_of,
    token_name,
    write_generation,
    write_images,
    write_tokenizer,
)
from unimm.files import write_json
from unimm.models.configs import section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.parts import AreaViewsConfig, JoinReducerConfig, MropePositionsConfig, NaflexEncoderConfig
from unimm.processing.processor import UniMMProcessor

VIDEO_FILE = "video_preprocessor_config.json"


class Qwen2VLWriter(UnderstandingWriter):
    """One encoder, one way to join, positions of three axes."""

    title = "Qwen2-VL"

    def write_files(self, config: UniMMConfig, processor: UniMMProcessor, folder: Path, layout: str) -> None:
        """See `UnderstandingWriter`."""
        tokens = processor.layout
        image, video = (token_name(processor, token) for token in (tokens.feature, tokens.video))
        around = [token_name(processor, token) for token in (tokens.begin, tokens.end)]
        template = template_of(processor, image.join(around))
        names = {"image_token": image, **({"video_token": video} if video else {})}
        written = _config(config, processor)
        if layout == "original":
            write_json(folder / "config.json", _flat(written))
            write_tokenizer(processor, folder, names, template)
            options = _images(config)
            size = options.pop("size")
            limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            write_images(folder, "Qwen2VLImageProcessor", "Qwen2VLProcessor", {**options, **limits})
            frames = _images(config, frames=True)
            if frames["size"] != size:  # else they are as images
                write_json(folder / VIDEO_FILE, {"video_processor_type": "Qwen2VLVideoProcessor", **frames})
        else:
            written.save_pretrained(folder)
            tokenizer = write_tokenizer(processor, folder, names)
            images = Qwen2VLImageProcessor(**_images(config))
            videos = Qwen2VLVideoProcessor(**_images(config, frames=True))
            Qwen2VLProcessor(images, tokenizer, videos, chat_template=template).save_pretrained(folder)
        write_generation(processor, folder)


def _config(config: UniMMConfig, processor: UniMMProcessor) -> Qwen2VLConfig:
    encoder, places = config.encoder_config(), config.positions_config()
    reducer, layout = config.reducer_config(), processor.layout
    assert isinstance(encoder, NaflexEncoderConfig) and isinstance(reducer, JoinReducerConfig)
    assert isinstance(places, MropePositionsConfig)
    if layout.begin is None or layout.end is None:
        raise UserError("--to: Qwen2-VL's layouts have a token before and after an image, this model has not")
    decoder = config.decoder_config()
    known = section_for(Qwen2VLTextConfig).model_fields  # whose defaults are others than Qwen2's
    text = {name: value for name, value in decoder.to_dict().items() if name in known and value is not None}
    text["rope_parameters"] = {**decoder.rope_parameters, "mrope_section": list(places.sections)}
    return Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": encoder.depth,
            "embed_dim": encoder.width,
            "num_heads": encoder.heads,
            "hidden_size": decoder.hidden_size,
            "mlp_ratio": int(encoder.mlp_ratio)
            if encoder.mlp_ratio == int(encoder.mlp_ratio)
            else encoder.mlp_ratio,
            "patch_size": encoder.patch,
            "spatial_merge_size": reducer.side,
            "temporal_patch_size": encoder.frames,
        },
        image_token_id=layout.feature,
        # beyond the vocabulary where there is none
        video_token_id=config.vocabulary if layout.video is None else layout.video,
        vision_start_token_id=layout.begin,
        vision_end_token_id=layout.end,
        tie_word_embeddings=config.decoder_config().tie_word_embeddings,
        architectures=["Qwen2VLForConditionalGeneration"],
    )


def _flat(written: Qwen2VLConfig) -> dict[str, Any]:
    """The published form: the decoder's fields stand among the others."""
    document = written.to_dict()
    text = document.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    apart = ("model_type", "architectures", "transformers_version", "layer_types", "dtype")
    own = {name: value for name, value in text.items() if name not in apart and value is not None}
    document["vision_config"] |= {
        "in_chans": 3,
        "spatial_patch_size": document["vision_config"]["patch_size"],
    }
    return {**own, **document, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _images(config: UniMMConfig, frames: bool = False) -> dict[str, Any]:
    """Options of the image processor, or of that of frames."""
    views, encoder, reducer = config.views_config(), config.encoder_config(), config.reducer_config()
    assert isinstance(views, AreaViewsConfig) and isinstance(encoder, NaflexEncoderConfig)
    assert isinstance(reducer, JoinReducerConfig)
    least, most = views.least, views.most
    if frames:
        least, most = views.frame_least or least, views.frame_most or most
    return {
        "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": encoder.patch,
        "merge_size": reducer.side,
        "temporal_patch_size": encoder.frames,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }

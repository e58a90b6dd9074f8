"""Qwen2-VL: images and videos of any size, and positions of time, row and column.

Sources: Wang et al. 2024 (arXiv 2409.12191); transformers `models/qwen2_vl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from PIL import Image
from pydantic import ConfigDict, Field, create_model
from transformers import Qwen2Config, Qwen2VLConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from unimm.families.common import CHATML, CLIP_MEAN, CLIP_STD, UNDRAWN, decoder_of, expect, followed
from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule, patches
from unimm.families.qwen2_vl_writer import VIDEO_FILE, Qwen2VLWriter
from unimm.families.source import Checkpoint, normalisation
from unimm.models.configs import section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.layout import TokenId
from unimm.models.parts import NaflexEncoderConfig
from unimm.processing.processor import PROCESSOR_FILE
from unimm.sections import validate

_TEXT: Any = section_for(Qwen2VLTextConfig)
_TOKEN: Any = (TokenId, None)
DOCUMENT: Any = create_model(
    "Qwen2VLDocument",
    __base__=_TEXT,
    text_config=(_TEXT, None),
    vision_config=(section_for(Qwen2VLVisionConfig), ...),
    image_token_id=_TOKEN,
    vision_start_token_id=_TOKEN,
    vision_end_token_id=_TOKEN,
    video_token_id=_TOKEN,
    tie_word_embeddings=(bool, None),
)
_Pixels: Any = Annotated[int, Field(gt=0, lt=2**40)] | None
VideoOptions: Any = create_model(
    "Qwen2VLVideoOptions",
    __config__=ConfigDict(extra="allow"),
    size=(dict[str, _Pixels] | None, None),
    min_pixels=(_Pixels, None),
    max_pixels=(_Pixels, None),
)
"""What is read of how frames of videos are prepared; without it they are as images."""
LEAST, MOST = 56 * 56, 28 * 28 * 1280  # pixels of an image, where a checkpoint does not say
# transformers' model has the names of `inner`, but goes on writing those of the hub, and reads both
PREFIXES = {"hub": ("visual.", "model."), "inner": ("model.visual.", "model.language_model.")}


class Qwen2VL(Family):
    """One layout, in which `config.json` has the decoder's fields in a section of its own or not."""

    name, title = "qwen2_vl", "Qwen2-VL"
    needs = ("encoder", "views")
    writer = Qwen2VLWriter()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        where = str(checkpoint.path)
        document = validate(DOCUMENT, checkpoint.document, where).model_dump(exclude_unset=True)
        config = Qwen2VLConfig(**document)
        text: Any = config.text_config
        vision: Any = config.vision_config
        expect(where, "vision_config", vision, hidden_act="quick_gelu", in_channels=3)
        expect(where, "text_config", text, use_sliding_window=False)
        rope = dict(text.rope_parameters)
        sections = rope.pop("mrope_section", None) or _even(text.hidden_size // text.num_attention_heads // 2)
        merge = vision.spatial_merge_size
        encoder = NaflexEncoderConfig(
            vision.embed_dim, vision.depth, vision.num_heads, vision.patch_size, vision.temporal_patch_size,
            float(vision.mlp_ratio),
        )  # fmt: skip
        tied = bool(config.tie_word_embeddings)
        inner = any(name.startswith("model.visual.") for name in checkpoint.shapes)
        return {
            "decoder": decoder_of(text, Qwen2Config, rope_parameters=rope, tie_word_embeddings=tied),
            "views": {"kind": "area", "stride": vision.patch_size * merge, **_views(checkpoint)},
            "encoder": vars(encoder),
            "reducer": {"kind": "join", "side": merge},
            "connector": {
                "kind": "mlp",
                "depth": 2,
                "width": vision.embed_dim * merge**2,
                "norm": "layer",
                "norm_at": "feature",
            },
            "positions": {"kind": "mrope", "sections": tuple(sections)},
            "layout": {
                "begin": config.vision_start_token_id,
                "end": config.vision_end_token_id,
                "feature": config.image_token_id,
                "video": config.video_token_id if config.video_token_id < text.vocab_size else None,
                "code": text.vocab_size,
                "grid": UNDRAWN,
            },
            "tie_word_embeddings": tied,
            **({"source_keys": "inner"} if inner else {}),
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, which writes the tokens around an image itself."""
        tokens = [int(parts["layout"][name]) for name in ("begin", "feature", "end")]
        placeholder = "".join(checkpoint.text_tokenizer.convert_ids_to_tokens(tokens))
        return followed(checkpoint, CHATML, placeholder)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map, of one of two sets of names."""
        images, text = PREFIXES[getattr(config, "source_keys", None) or "hub"]
        encoder = config.encoder_config()
        assert isinstance(encoder, NaflexEncoderConfig)
        side = encoder.patch
        return KeyMap(
            rules=(
                Rule(
                    "vision.model.embeds.proj.weight",
                    f"{images}patch_embed.proj.weight",
                    patches(3, encoder.frames, side, side),
                ),
                Rule("vision.model.blocks.{rest}", f"{images}blocks.{{rest}}"),
                Rule("connector.norm.{end}", f"{images}merger.ln_q.{{end}}"),
                Rule("connector.layers.{i}.{end}", f"{images}merger.mlp.{{i}}.{{end}}"),
                Rule("decoder.model.{rest}", f"{text}{{rest}}"),
                Rule("decoder.lm_head.weight", "lm_head.weight"),
            ),
            tied=("decoder.lm_head.weight",),
        )

    def layout_of(self, document: Mapping[str, Any]) -> str:
        """Return "original" for the form that was published first."""
        return "transformers" if "text_config" in document else "original"

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has this encoder and these positions."""
        encoder = config.encoder or {}
        kinds = (encoder.get("kind"), encoder.get("stem", "patch"), config.positions.get("kind"))
        return kinds == ("naflex", "patch", "mrope")


def _even(frequencies: int) -> tuple[int, int, int]:
    """Sections in the published ratio, 2 : 3 : 3."""
    time = frequencies // 4
    return time, (frequencies - time) // 2, frequencies - time - (frequencies - time) // 2


def _given(frames: dict[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in frames.items() if value is not None}


def _views(checkpoint: Checkpoint) -> dict[str, Any]:
    """Limits and normalisation of images."""
    options, path = checkpoint.image_options()
    size = options.get("size") or {}
    least = options.get("min_pixels") or size.get("shortest_edge") or LEAST
    most = options.get("max_pixels") or size.get("longest_edge") or MOST
    videos = checkpoint.json(PROCESSOR_FILE).get("video_processor") or checkpoint.json(VIDEO_FILE)
    videos = validate(VideoOptions, videos, str(checkpoint.folder / VIDEO_FILE)).model_dump()
    area = videos["size"] or {}
    frames = {
        "frame_least": videos["min_pixels"] or area.get("shortest_edge"),
        "frame_most": videos["max_pixels"] or area.get("longest_edge"),
    }
    options = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, **options}
    fixed = {"do_resize": True, "resample": int(Image.Resampling.BICUBIC)}
    return {"least": least, "most": most, **_given(frames), **normalisation(options, path, fixed)}


FAMILY = Qwen2VL()

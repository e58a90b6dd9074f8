"""Emu3 (Stage1, Chat, Gen): configs and key maps of the original repository and of transformers.

One vocabulary holds words and codes, so the decoder's own table and head serve both. In the original layout the
vision tokenizer is a checkpoint of its own.

Sources: baaivision/Emu3 `emu3/mllm/`; transformers `models/emu3`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

from unimm.errors import UserError
from unimm.families.documents import EMU3, EMU3_ORIGINAL
from unimm.families.emu3_text_tokenizer import PLACEHOLDER, read_text_tokenizer
from unimm.families.emu3_writer import AREA, ASSISTANT, SAMPLING, STOPPED, USER, VISION_TOKENIZER, Emu3Writer
from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule, under
from unimm.families.movq import tokenizer_map, tokenizer_options
from unimm.families.source import MODEL_FILE, Checkpoint, normalisation
from unimm.families.templates import Template, follow, processor_template, tokenizer_template
from unimm.models.configuration import UniMMConfig
from unimm.models.turns import Turns
from unimm.processing.tokenizer_files import complete
from unimm.sections import validate

# Where decoder, head and image tokenizer are. transformers' model has the names of `inner` since its second release,
# but goes on writing those of its first, and reads both.
PREFIXES = {
    "original": ("model.", "", VISION_TOKENIZER.prefix),
    "transformers": ("text_model.model.", "text_model.", "vqmodel."),
    "inner": ("model.text_model.", "", "model.vqmodel."),
}
POSITIVE = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
SYSTEM = "You are a helpful assistant."
IMAGE_SLOT, QUESTION_SLOT = "{image_prompt}", "{text_prompt}"  # in the template of the original's processor


class Emu3(Family):
    """Images are understood by their codes, so there is no encoder; the original has its vision tokenizer apart."""

    name, title = "emu3", "Emu3"
    sampling = SAMPLING
    needs = ("generation", "views")
    image_tokenizers: ClassVar = {"original": VISION_TOKENIZER}
    writer = Emu3Writer()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration, and that of its vision tokenizer."""
        original, where = checkpoint.layout == "original", checkpoint.path
        config = validate(EMU3_ORIGINAL if original else EMU3, checkpoint.document, str(where)).model_dump(
            exclude_unset=True
        )
        if original:
            text, codes = config, checkpoint.json(MODEL_FILE, VISION_TOKENIZER.prefix)
            where = checkpoint.folders[VISION_TOKENIZER.prefix] / MODEL_FILE
        else:  # which leaves out what is as by default
            text, codes = config["text_config"], Emu3VQVAEConfig(**config["vq_config"]).to_dict()
        tokenizer = {"model_type": "unimm_movq", **tokenizer_options(codes, str(where))}
        stride = 2 ** (len(tokenizer["block_out_channels"]) - 1)
        side = max(round(AREA**0.5 / stride), 1)
        text_tokenizer = complete(checkpoint.text_tokenizer, text)
        decoder = _decoder(text, config, text_tokenizer)
        keys: dict[str, Any] = {}
        if any(name.startswith("model.text_model.") for name in checkpoint.shapes):
            keys["source_keys"] = "inner"
        return {
            "decoder": decoder,
            "generation": {
                "codes": tokenizer["codebook_size"],
                "dim": tokenizer["latent_channels"],
                "image_size": side * stride,
                "stride": stride,
                "shared": True,
            },
            "views": {"kind": "area", "stride": stride, **_views(checkpoint)},
            "encoder": {"kind": "codes"},
            "image_tokenizer": {**tokenizer, "image_size": side * stride},
            "layout": _layout(
                text_tokenizer, tokenizer["codebook_size"], decoder["vocab_size"], side, checkpoint.folder
            ),
            "tie_word_embeddings": decoder["tie_word_embeddings"],
            **keys,
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the turns of a checkpoint's template, or Emu3's; in the original a full stop follows a question."""
        base = Turns(
            user=USER,
            assistant=(STOPPED if checkpoint.layout == "original" else " ") + ASSISTANT,
            system=f"{SYSTEM} ",
            bare_drawings=True,
            praise=POSITIVE,
            negative=NEGATIVE,
        )
        template = processor_template(checkpoint) or tokenizer_template(checkpoint)
        if template is None:
            return vars(base)
        if QUESTION_SLOT in template.text:
            return vars(_formatted(template, base))
        base = dataclasses.replace(base, system="", message=SYSTEM)
        return vars(follow(template, base, checkpoint.text_tokenizer, PLACEHOLDER))

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map of a layout; transformers' has one of two sets of names."""
        assert (
            config.image_tokenizer is not None
        )  # there is none without `generation`, which the family needs
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

    def text_tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """Build the text tokenizer of `tokenizer.json`, or of the original's two files."""
        return read_text_tokenizer(checkpoint.folder, checkpoint.document)

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model's codes are tokens."""
        return bool(config.layout.get("codes"))


def _formatted(template: Template, base: Turns) -> Turns:
    """The turns of the original processor's template, which is a Python format: `USER: {image_prompt}{text_prompt}`."""
    before, found, rest = template.text.partition(IMAGE_SLOT)
    between, _, after = rest.partition(QUESTION_SLOT)
    if not found or QUESTION_SLOT in after or "{" in before + between + after:
        raise UserError(
            f"{template.where}: expected {IMAGE_SLOT}, then {QUESTION_SLOT}, each once, and no other slots"
        )
    system = before.removesuffix(USER) if before.endswith(USER) else ""
    user = before.removeprefix(system)
    return dataclasses.replace(base, user=user, assistant=after, system=system, after_image=between)


def _decoder(text: Mapping[str, Any], config: Mapping[str, Any], text_tokenizer: Any) -> dict[str, Any]:
    """Emu3's decoder is Llama's; only its defaults differ, and what is as by default need not be written."""
    full = Emu3TextConfig(**{**text, "pad_token_id": text_tokenizer.pad_token_id}).to_dict()
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    options = {key: value for key, value in full.items() if key in known}
    options["tie_word_embeddings"] = config.get("tie_word_embeddings", full["tie_word_embeddings"])
    return LlamaConfig(**options).to_dict()


def _views(checkpoint: Checkpoint) -> dict[str, Any]:
    """Limits and normalisation of the images to understand, from the first of its folders that says them."""
    options, path = checkpoint.image_options(key="min_pixels")
    fixed = {"do_resize": True, "resample": int(Image.Resampling.BICUBIC)}
    area = {"least": options.get("min_pixels", 512 * 512), "most": options.get("max_pixels", 1024 * 1024)}
    return {**area, **normalisation(options, path, fixed)}


def _layout(text_tokenizer: Any, codes: int, vocabulary: int, side: int, folder: Path) -> dict[str, Any]:
    """The grammar's tokens, by the names that every published tokenizer gives them."""
    known = text_tokenizer.get_vocab()

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


FAMILY = Emu3()

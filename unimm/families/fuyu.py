"""Fuyu: no encoder; the pixels of each patch are projected to the decoder, each row is followed by a token.

transformers' class takes one image a sample; here a sample may have several, all before its words. Coordinates in
words are read and written by `unimm.processing.places`.

Sources: Bavishi et al. 2023 (adept.ai/blog/fuyu-8b); transformers `models/fuyu` and `models/persimmon`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, create_model
from tokenizers import AddedToken
from tokenizers.models import Unigram
from transformers import PersimmonConfig, PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.families.common import UNDRAWN, decoder_of, expect, special_token
from unimm.families.documents import OwnCode
from unimm.families.family import Family
from unimm.families.fuyu_writer import FuyuWriter
from unimm.families.keymap import KeyMap, Rule
from unimm.families.source import Checkpoint, normalisation
from unimm.models.configs import section_for
from unimm.models.configuration import UniMMConfig
from unimm.models.layout import TokenId
from unimm.models.part_types import Grey
from unimm.models.turns import Turns
from unimm.sections import validate

FEATURE, ROW_END, ANSWER = "|SPEAKER|", "|NEWLINE|", "<0x04>"
BOUNDS = (1080, 1920)  # pixels of height and width, where a checkpoint does not say
PAD = 1  # of 255: transformers pads before it brings pixels to [0, 1]
NEVER = -1e4  # score of a piece that no text is cut into
TURNS = Turns(user="", assistant=f"\n{ANSWER}", bos="after_images", places="tokens")

_TEXT_KIND: Any = (Literal["persimmon"], "persimmon")
_TEXT: Any = create_model("FuyuText", __base__=section_for(PersimmonConfig), model_type=_TEXT_KIND)
DOCUMENT: Any = create_model(
    "FuyuDocument",
    __base__=section_for(PersimmonConfig),
    text_config=(_TEXT, None),
    patch_size=(Annotated[int, Field(gt=0, le=2**10)], 30),
    num_channels=(Literal[3], 3),
    image_token_id=(TokenId, None),
    tie_word_embeddings=(bool, None),
)


class ImageOptions(OwnCode):
    """What the image processor's options have that others' have not."""

    padding_value: Grey | Annotated[float, Field(ge=0, le=255)] = PAD


class Fuyu(Family):
    """One layout, in which `config.json` has the decoder's fields in a section of its own or not."""

    name, title = "fuyu", "Fuyu"
    needs = ("encoder", "views")
    writer = FuyuWriter()

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Translate a checkpoint's configuration."""
        where = str(checkpoint.path)
        document = validate(DOCUMENT, checkpoint.document, where).model_dump(exclude_none=True)
        text = PersimmonConfig(**document.get("text_config") or _flat(document))
        tied = bool(document.get("tie_word_embeddings", text.tie_word_embeddings))
        tokenizer, folder = checkpoint.text_tokenizer, checkpoint.folder
        patch = document["patch_size"]
        feature = special_token(tokenizer, FEATURE, folder)
        expect(where, "config", document, image_token_id=feature)
        inner = any(name.startswith("model.vision_embed_tokens.") for name in checkpoint.shapes)
        return {
            "decoder": decoder_of(text, PersimmonConfig, tie_word_embeddings=tied),
            "views": {"kind": "fit", "unit": patch, "fill": "pad", **_views(checkpoint, patch)},
            "encoder": {"kind": "linear", "width": text.hidden_size, "patch": patch},
            "connector": {"kind": "none"},
            "layout": {
                "begin": None,
                "end": None,
                "feature": feature,
                "code": text.vocab_size,
                "grid": UNDRAWN,
                "picture": {"row_end": special_token(tokenizer, ROW_END, folder)},
            },
            "tie_word_embeddings": tied,
            **({"source_keys": "inner"} if inner else {}),
        }

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the published form: images, begin token, question, line break, answer token."""
        special_token(checkpoint.text_tokenizer, ANSWER, checkpoint.folder)
        return vars(TURNS)

    def text_tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """Build the text tokenizer, with the tokens of images and answers apart from all pieces of texts."""
        tokens = (FEATURE, ROW_END, ANSWER)
        return _apart(super().text_tokenizer(checkpoint), tokens, checkpoint.folder)

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map, of one of two sets of names."""
        inner = getattr(config, "source_keys", None) == "inner"
        front, text = ("model.", "model.language_model.") if inner else ("", "language_model.model.")
        return KeyMap(
            rules=(
                Rule("vision.model.{end}", f"{front}vision_embed_tokens.{{end}}"),
                Rule("decoder.model.{rest}", f"{text}{{rest}}"),
                Rule(
                    "decoder.lm_head.weight", "lm_head.weight" if inner else "language_model.lm_head.weight"
                ),
            ),
            tied=("decoder.lm_head.weight",),
        )

    def layout_of(self, document: Mapping[str, Any]) -> str:
        """Return "original" for the form that was published first."""
        return "transformers" if document.get("text_config") else "original"

    def holds(self, config: UniMMConfig) -> bool:
        """Whether a model has no encoder but patches, and this decoder."""
        kinds = (
            (config.encoder or {}).get("kind"),
            config.connector.get("kind"),
            config.decoder["model_type"],
        )
        return kinds == ("linear", "none", "persimmon")


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields, where they stand among the others."""
    return {
        name: value for name, value in document.items() if name in section_for(PersimmonConfig).model_fields
    }


def _views(checkpoint: Checkpoint, patch: int) -> dict[str, Any]:
    """Limits, padding and normalisation of images."""
    options, path = checkpoint.image_options()
    pad = validate(ImageOptions, options, str(path)).padding_value
    if pad != math.floor(pad):
        raise UserError(f"{path}: padding_value: {pad} is not supported, only whole grey levels")
    size = options.get("size") or {}
    fixed = {
        "do_resize": True, "do_pad": True, "padding_mode": "constant", "resample": int(Image.Resampling.BILINEAR),
        "patch_size": {"height": patch, "width": patch},
    }  # fmt: skip
    return {
        "bounds": (size.get("height") or BOUNDS[0], size.get("width") or BOUNDS[1]),
        "pad_value": int(pad),
        "resample": "bilinear",
        **normalisation(options, path, fixed),
    }


def _apart(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...], where: Path
) -> PreTrainedTokenizerBase:
    """Make pieces of a text tokenizer special tokens, so that no text holds one, whatever is typed.

    Raises:
        UserError: texts hold one all the same.
    """
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    words: Any = tokenizer
    state = json.loads(words.backend_tokenizer.to_str())["model"]
    if state.get("type") == "Unigram":
        pieces = [(piece, NEVER if piece in known else score) for piece, score in state["vocab"]]
        words.backend_tokenizer.model = Unigram(pieces, state["unk_id"], state.get("byte_fallback", False))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    for token in (FEATURE, ROW_END):
        typed = tokenizer.encode(f"a {token}", add_special_tokens=False, split_special_tokens=True)
        if tokenizer.convert_tokens_to_ids(token) in typed:
            raise UserError(f"{where}: the text tokenizer reads {token} in texts; expected a Unigram model")
    return tokenizer


FAMILY = Fuyu()

"""The parts that an image to understand goes through, as a recipe gives them: `model.understanding`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from unimm.models.parts import PART_KINDS, CanvasViewsConfig, part_fields, read_part
from unimm.models.seeing import Seeing
from unimm.sections import FieldError, Section

TokenName = Annotated[str, Field(min_length=1, max_length=256)]
TagWords = Annotated[str, Field(max_length=256)]
_PARTS = ("views", "encoder", "reducer", "connector", "fusion", "positions")
_TINY_PATCH = 4
_TINY: dict[str, dict[str, Any]] = {
    "naflex": {"width": 16, "depth": 1, "heads": 2, "patch": _TINY_PATCH},
    "linear": {"width": 32, "patch": _TINY_PATCH},
    "timm": {"tokens": 64, "width": 16},
    "tiled": {
        "image_size": 64, "patch": 8, "hidden": 16, "depth": 2, "global_depth": 1, "heads": 2, "mlp_width": 32,
        "tiles": 4, "layers": [1],
    },
}  # fmt: skip
_TINY_SIDE = 64  # pixels of a view


class PictureSection(Section):
    """What stands around and between the features of an image; see `unimm.models.layout.PictureLayout`.

    Tokens are given by name; those that the text tokenizer lacks are added to it.
    """

    opening: TagWords = ""
    closing: TagWords = ""
    begin: TokenName | None = None
    end: TokenName | None = None
    row_end: TokenName | None = None
    last_row_end: TokenName | None = None
    tile_tag: TagWords = ""
    whole_tag: TagWords = ""
    joint: bool = False
    add: bool = False
    mark: Literal["none", "image", "tile"] = "none"
    apart: bool = False


class UnderstandingSection(Section):
    """Each part by its fields in `unimm.models.parts`; views and encoder have to be given."""

    views: dict[str, Any]
    encoder: dict[str, Any]
    reducer: dict[str, Any] = Field(default_factory=dict)
    connector: dict[str, Any] = Field(default_factory=dict)
    fusion: dict[str, Any] = Field(default_factory=dict)
    """With the kind `both` the words of `picture.tile_tag` stand in the memory, and become its `tags`."""
    positions: dict[str, Any] = Field(default_factory=dict)
    extra_tokens: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Tokens behind the decoder's vocabulary that are read and never written: those of images that the text tokenizer
    lacks get a table of their own, which a stage may train while the decoder is frozen."""
    picture: PictureSection | None = None
    """Null: an image is a begin token, its features and an end token."""
    begin: TokenName | None = "<begin_of_image>"
    """Token before an image; null: none, and nothing can be drawn."""
    end: TokenName | None = "<end_of_image>"
    feature: TokenName = "<image_placeholder>"
    """Token that stands where a feature goes."""

    @model_validator(mode="after")
    def _readable(self) -> UnderstandingSection:
        for name in _PARTS:
            read_part(name, getattr(self, name))
        return self

    def parts(self, text_tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        """Return the parts as fields of `UniMMConfig`.

        Args:
            text_tokenizer: makes tokens of tags that stand in a memory.
        """
        found = {name: part_fields(read_part(name, getattr(self, name))) for name in _PARTS}
        tag = "" if self.picture is None else self.picture.tile_tag
        if found["fusion"]["kind"] == "both" and tag:
            words = [tag.format(number) for number in range(1, found["views"]["most"] + 1)]
            found["fusion"]["tags"] = [
                text_tokenizer.encode(word, add_special_tokens=False) for word in words
            ]
        return found

    def layout(self, text_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return how an image is written, as fields of `ImageLayout`; tokens that are lacking are added.

        Args:
            text_tokenizer: changed in place.
        """
        picture = self.picture
        ends = (
            {} if picture is None else picture.model_dump(include={"begin", "end", "row_end", "last_row_end"})
        )
        own = {"begin": self.begin, "end": self.end, "feature": self.feature}
        names = [name for name in (*own.values(), *ends.values()) if name is not None]
        known = text_tokenizer.get_vocab()
        text_tokenizer.add_special_tokens(
            {"additional_special_tokens": [name for name in dict.fromkeys(names) if name not in known]},
            replace_extra_special_tokens=False,
        )
        known = text_tokenizer.get_vocab()
        layout: dict[str, Any] = {key: None if name is None else known[name] for key, name in own.items()}
        if picture is not None:
            words = picture.model_dump(exclude={*ends})
            tokens = {key: None if name is None else known[name] for key, name in ends.items()}
            layout["picture"] = {**words, **tokens, **self._canvas()}
        return layout

    def _canvas(self) -> dict[str, Any]:
        """What follows from the views for the grammar, where these are tiles."""
        seeing = Seeing(*(read_part(name, getattr(self, name)) for name in ("views", "encoder", "reducer")))
        views = seeing.views
        if not isinstance(views, CanvasViewsConfig) or (self.picture and self.picture.mark == "image"):
            return {}
        overlap = seeing.overlap // getattr(seeing.reducer, "side", 1)
        return {"tile": seeing.tile, "whole_at": views.whole, "alone": views.alone, "overlap": overlap}


def tiny_understanding(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section of the same make as this one, of tiny parts."""
    tiny = {name: dict(section.get(name) or {}) for name in PART_KINDS if name in _PARTS}
    encoder = _tiny_encoder(tiny["encoder"])
    reducer = _tiny_reducer(tiny["reducer"])
    unit = encoder.get("patch", 8) * (reducer.get("side", 1) if reducer.get("kind", "join") == "join" else 1)
    connector = tiny["connector"]
    if connector.get("width") is not None:
        joined = _joined(dict(section["encoder"]), tiny["reducer"])
        connector["width"] = _joined(encoder, reducer) if connector["width"] == joined else 24
    fusion = tiny["fusion"]
    if "layers" in fusion:
        fusion |= {"layers": [0, 1], "heads": 2, "kv_heads": 1, "width": 32}
    positions = tiny["positions"]
    if "sections" in positions:
        positions["sections"] = (2, 3, 3)  # of the tiny decoder's 8 frequencies
    rest = {name: value for name, value in section.items() if name not in _PARTS}
    views = _tiny_views(tiny["views"], unit)
    return {
        **rest,
        "views": views,
        "encoder": encoder,
        "reducer": reducer,
        "connector": connector,
        "fusion": fusion,
        "positions": positions,
    }


def _joined(encoder: dict[str, Any], reducer: dict[str, Any]) -> int:
    """How wide the features of an encoder are once they are joined; 0 where its fields do not say."""
    width: int = encoder.get("width", 0) * reducer.get("side", 1) ** 2
    return width


def _tiny_views(views: dict[str, Any], unit: int) -> dict[str, Any]:
    kind = views.get("kind", "square")
    own: dict[str, dict[str, Any]] = {
        "square": {"image_size": _TINY_SIDE},
        "area": {"least": unit**2, "most": _TINY_SIDE**2, "stride": unit},
        "fit": {"bounds": (_TINY_SIDE, _TINY_SIDE), "unit": unit, "least": 0},
        "canvas": {"tile": _TINY_SIDE, "most": 4, "least": 1, "overlap": 16 if views.get("overlap") else 0},
    }
    if kind not in own:
        raise FieldError(f"understanding.views.kind: expected one of {', '.join(own)}, got {kind!r}")
    return {**views, **own[kind]}


def _tiny_encoder(encoder: dict[str, Any]) -> dict[str, Any]:
    kind = encoder.get("kind", "timm")
    if kind == "transformers":
        side = encoder.get("side")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        patch = [8, 8] if isinstance(encoder.get("kwargs", {}).get("patch_size"), list) else 8
        pixels = [_TINY_SIDE, _TINY_SIDE] if isinstance(patch, list) else _TINY_SIDE
        kwargs = {**encoder.get("kwargs", {}), **sizes, "patch_size": patch, "image_size": pixels}
        return {**encoder, "width": 16, "patch": 8, "side": 8 if side else 0, "kwargs": kwargs}
    tiny = {**encoder, **_TINY.get(kind, {})}
    if kind == "timm":
        layers = tuple(range(len(encoder.get("layers") or ())))
        depth = max(len(layers), 1)
        tiny["kwargs"] = {
            "img_size": _TINY_SIDE,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": depth,
            "num_heads": 2,
        }
        tiny |= {"layers": layers, "width": 16 * depth}
    return tiny


def _tiny_reducer(reducer: dict[str, Any]) -> dict[str, Any]:
    kind = reducer.get("kind", "join")
    own: dict[str, dict[str, Any]] = {
        "attend": {"width": 16, "heads": 2},
        "resample": {"heads": 2, "queries": (((_TINY_SIDE // 8) ** 2, 4),)},
        "abstract": {"side": 2, "width": 16, "depth": 1},
    }
    return {**reducer, **own.get(kind, {})}

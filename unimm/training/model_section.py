"""The `model` section of a recipe: a whole model, or the parts that one is assembled from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimm.data.tables.settings import TABLE_SOURCE
from unimm.locate import EMBEDDED
from unimm.models.configs import section_for
from unimm.models.configuration import read_image_tokenizer
from unimm.models.decoders import decoder_config, read_decoder
from unimm.models.former import VisionConfig
from unimm.sections import FieldError, NotNegative, Positive, Section, read_dataclass
from unimm.training.understanding import UnderstandingSection, tiny_understanding


def _decoder(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """Check a decoder's fields; what the text tokenizer decides may be left out."""
    if fields is not None:
        decoder_config(read_decoder(fields, key=""), key="")
    return fields


def _vision(described: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(described, dict):
        read_dataclass(VisionConfig, described, "")
    return described


def _image_tokenizer(described: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(described, dict):
        read_image_tokenizer(described)
    return described


class SamplingDefaults(Section):
    """How a model draws where nobody says otherwise; what is left out stays as it was."""

    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: NotNegative | None = None
    """0: no limit."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


class ModelSection(Section):
    """The model: a whole one (`pretrained`), or a decoder and two encoders that are joined by new connectors.

    `image_tokenizer: null` makes one that only understands, `vision: null` one that only draws.
    """

    pretrained: str | None = None
    """A whole model, as `unimm.load` takes it; of the other keys only those from here to `renew_tokens`, and
    `initialize`, have a meaning then."""
    sampling: SamplingDefaults | None = None
    """How the exported model draws by itself; null: as the one that it starts from does."""
    renew_tokens: bool = False
    """Give tokens that were never trained, which new words are spelt in, distinct values at the start."""
    decoder: Annotated[dict[str, Any] | None, AfterValidator(_decoder)] = None
    """Config of one of transformers' language models that fit (`unimm.models.decoders`)."""
    vision: Annotated[str | dict[str, Any] | None, AfterValidator(_vision)] = None
    """The export of a `siglip` run, or the fields of a `VisionConfig`; null: the model sees no images, unless
    `shared`."""
    understanding: UnderstandingSection | None = None
    """The parts that an image to understand goes through, in the place of `vision`."""
    image_tokenizer: Annotated[str | dict[str, Any] | None, AfterValidator(_image_tokenizer)] = None
    """A folder or file that holds an image tokenizer, "embedded" for the embedded model's, or the fields of its config
    (`model_type: unimm_vq`); null: the model does not draw."""
    text_tokenizer: str | None = None
    """A folder; "embedded" for that of the embedded model; "tables" for one of the words of `data.tables`; null: that
    of the `siglip` run."""
    weights: dict[Literal["decoder", "vision", "image_tokenizer"], str] = Field(default_factory=dict)
    """Published weights to start parts from that are described by their fields."""
    shared: bool = False
    """Codes are tokens of the text vocabulary, as Emu3 has them; there is no understanding encoder then."""
    merge: Positive = 2
    connector_depth: Positive = 2
    learned_positions: bool = True
    """Whether a code's position in the grid is embedded too; Janus leaves positions to the decoder."""
    code_depth: Positive | None = None
    """Layers of the code connector; null: `connector_depth`."""
    code_head_width: Positive | None = None
    """Width between the two layers of the code head; null: the decoder's."""
    initialize: str | None = None
    """Folder of an earlier export, on the same codes, or "embedded", to start from; null: from nothing."""
    initialize_parts: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """Which parts come from there, the others start as in any run; null: all that the model has."""

    @model_validator(mode="after")
    def _complete(self) -> ModelSection:
        if self.pretrained is not None:
            return self
        if self.decoder is None:
            raise FieldError("decoder: missing; give it, or a whole model as pretrained")
        if self.shared and self.vision is not None:
            raise FieldError("vision: a model whose codes are tokens understands by them; remove it")
        if self.shared and self.image_tokenizer is None:
            raise FieldError("image_tokenizer: missing; codes that are tokens need one")
        if self.understanding is not None:
            if self.vision is not None or self.shared:
                raise FieldError("understanding: given beside vision or shared; leave one of them out")
            if self.weights.get("vision") is not None:
                raise FieldError("weights.vision: give initialize and initialize_parts with understanding")
        needed = ("image_tokenizer",) if self.shared or self.understanding else ("vision", "image_tokenizer")
        for name in needed:
            if name not in self.model_fields_set:
                message = "missing; give it, or null for a model without, or a whole model as pretrained"
                raise FieldError(f"{name}: {message}")
        if self.vision is None and self.understanding is None and self.image_tokenizer is None:
            raise ValueError("vision and image_tokenizer are null; give one of them")
        for name in self.weights:
            if getattr(self, name) is None:
                raise FieldError(f"weights.{name}: this model has no such part; leave it out")
        if not isinstance(self.vision, str) and self.text_tokenizer is None:
            raise FieldError("text_tokenizer: missing; give a folder that holds one")
        return self


def tiny_model(section: dict[str, Any]) -> dict[str, Any]:
    """A `model` section of the same make as this one, of tiny parts with random weights."""
    decoder = section.get("decoder") or {"model_type": "llama"}
    tiny: dict[str, Any] = {
        "decoder": _tiny_decoder(decoder),
        "image_tokenizer": {
            "image_size": 64,
            "patch_size": 4,
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "latent_channels": 8,
            "codebook_size": 32,
            "codebook_dim": 4,
        },
        "text_tokenizer": TABLE_SOURCE if section.get("text_tokenizer") == TABLE_SOURCE else EMBEDDED,
    }
    if section.get("shared"):
        return {**tiny, "shared": True}
    if understanding := section.get("understanding"):
        tiny["understanding"] = tiny_understanding(understanding)
        return tiny | ({"image_tokenizer": None} if section.get("image_tokenizer") is None else {})
    width = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    sizes = {"image_size": 64, "tokens": 64, "width": 16, "kwargs": width}
    tiny["vision"] = {"name": "vit_base_patch16_siglip_224", **sizes}
    left_out = [] if section.get("pretrained") else [name for name, part in section.items() if part is None]
    return tiny | {name: None for name in ("vision", "image_tokenizer") if name in left_out}


def _tiny_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    """A decoder of the same kind as this one: its sizes are tiny, a few of what else it is stay."""
    kind = decoder.get("model_type", "llama")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "moe_num_experts": 4,
        "moe_topk": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    described: Any = CONFIG_MAPPING[kind]
    known = section_for(described).model_fields
    always = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    own: dict[str, Any] = {name: value for name, value in sizes.items() if name in known or name in always}
    kept: dict[str, Any] = {name: decoder[name] for name in ("hidden_act", "qk_layernorm") if name in decoder}
    return {"model_type": kind, **own, **kept}

"""What a unified model is made of: `UniMMConfig`, a description of each part that a part is built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from transformers import AutoConfig, PreTrainedConfig

from unimm.errors import UserError
from unimm.models.configs import DTYPE_KEYS, common_options, own_keys
from unimm.models.consistency import (
    check_fusion,
    check_generation,
    check_layout,
    check_marks,
    check_positions,
    check_rasters,
    check_seeing,
)
from unimm.models.decoders import decoder_config, read_decoder
from unimm.models.former import former_parts
from unimm.models.image_tokenizers.movq import MoVQConfig
from unimm.models.image_tokenizers.vq import ImageTokenizerConfig
from unimm.models.layout import ImageLayout
from unimm.models.parts import (
    PART_KINDS,
    ConnectorConfig,
    EncoderConfig,
    FusionConfig,
    ImageGenerationConfig,
    MlpConnectorConfig,
    PositionsConfig,
    ReducerConfig,
    ViewsConfig,
    part_fields,
    read_part,
)
from unimm.models.quantization import SmallWeights
from unimm.models.seeing import Seeing
from unimm.models.turns import Turns
from unimm.sections import FieldError, Section, near, read_dataclass, show, validate

ImageTokenizerSizes: TypeAlias = ImageTokenizerConfig | MoVQConfig
IMAGE_TOKENIZERS: dict[str, type[ImageTokenizerSizes]] = {
    kind.model_type: kind for kind in (ImageTokenizerConfig, MoVQConfig)
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How codes are sampled where a caller does not say: a model's own defaults.

    Attributes:
        guidance_scale: how hard a drawing follows its prompt; 1 is no guidance.
        temperature: what logits are divided by; 0 takes the likeliest code.
        top_k: among how many of the likeliest codes; None: all.
        top_p: among the likeliest codes of which mass; None: all.

    Raises:
        UserError: a line that names the field that no distribution has, and what would be right.
    """

    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] = 5.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(gt=0, le=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.guidance_scale):
            wanted = "a finite number (5 is usual, 1 is no guidance)"
            raise UserError(f"guidance_scale: {self.guidance_scale}; give {wanted}")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature: {self.temperature}; give a number of 0 (greedy) or more")
        if self.top_k is not None and not (_is_number(self.top_k, int) and self.top_k >= 1):
            raise UserError(f"top_k: {self.top_k}; give 1 or more, or leave it out")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p: {self.top_p}; give a number above 0, at most 1, or leave it out")

    def updated(
        self,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> SamplingConfig:
        """Return these defaults with what a caller says in their place: None says nothing, a top_k of 0 is none.

        Raises:
            UserError: an option has no such value.
        """
        said = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        given: dict[str, Any] = {name: _as_python(value) for name, value in said.items() if value is not None}
        if _is_number(given.get("top_k"), int) and given["top_k"] == 0:
            given["top_k"] = None
        return dataclasses.replace(self, **given)


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    """Whether a value is a finite number, which True and text are not."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond floats
        return False


def _as_python(value: Any) -> Any:
    """A number of NumPy or torch as one of Python."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


OPTIONAL_PARTS = ("views", "encoder", "generation")
ALWAYS_THERE = ("reducer", "connector", "fusion", "positions")
SOURCE_KEYS = (
    "source_keys",
    "source_layout",
    "source_heads",
    "source_shards",
)  # where a converted model comes from


class UniMMConfig(PreTrainedConfig):
    """Parts of a `UniMMModel`, each as the plain dictionary that goes into `config.json`.

    A number format that a part's dictionary names is dropped: a model has one, which is said when it is loaded.

    Args:
        decoder: config of one of transformers' language models (`{"model_type": "llama", ...}`), see
            `unimm.models.decoders`.
        image_tokenizer: config of the image tokenizer, by its `model_type`; needed with `generation`.
        layout: fields of `ImageLayout`: the token ids around and inside an image.
        conversation: fields of `unimm.models.turns.Turns`, or None for unimm's own.
        sampling: fields of `SamplingConfig`, how the model draws by itself; None: as those are by default.
        family: the published architecture that the model is of, None for one of unimm's own making.
        quantization: fields of `unimm.models.quantization.SmallWeights`; None: the weights are as they were trained.
        **parts: `views`, `encoder`, `reducer`, `connector`, `fusion`, `positions` and `generation`, each the fields of
            one of its kinds in `unimm.models.parts`. A model without an encoder cannot look at images, one without
            `generation` cannot draw. `extra_tokens`: how many tokens behind the decoder's vocabulary are read but never
            written, so that the head has no row for them (Molmo). What else transformers' configs take.

    Raises:
        UserError: a key is unknown, a value is of the wrong type or out of range, or parts do not go together.
    """

    model_type = "unimm"
    quantization: dict[str, Any] | None = None
    extra_tokens: int = 0

    def __init__(
        self,
        decoder: dict[str, Any] | PreTrainedConfig | None = None,
        image_tokenizer: dict[str, Any] | None = None,
        layout: dict[str, Any] | None = None,
        conversation: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        family: str | None = None,
        quantization: dict[str, Any] | None = None,
        **parts: Any,
    ) -> None:
        if isinstance(decoder, PreTrainedConfig):
            decoder = decoder.to_dict()
        self.decoder = read_decoder({"model_type": "llama"} if decoder is None else decoder)
        if decoder is not None and "num_attention_heads" not in self.decoder:
            raise FieldError(
                "decoder.num_attention_heads: missing; weights of any number of heads have the same shapes"
            )
        given = {"layout": _mapping(layout, "layout") or {}, **parts}
        if extra := given.pop("extra_tokens", 0):  # else the key is not written
            self.extra_tokens = extra
        for name in (*PART_KINDS, "vision"):
            given[name] = _without_dtype(_mapping(given.pop(name, None), name))
        given = former_parts(given)
        self.layout: dict[str, Any] = given.pop("layout")
        self.views, self.encoder, self.generation = (given.pop(name) for name in OPTIONAL_PARTS)
        self.reducer, self.connector, self.fusion, self.positions = (
            given.pop(name) or part_fields(PART_KINDS[name][0]()) for name in ALWAYS_THERE
        )
        self.image_tokenizer = _image_tokenizer(image_tokenizer)
        self.conversation = _mapping(conversation, "conversation")
        if self.conversation is not None:  # what few have is written where it is not as by default
            rare = {"bos": "first", "system_last": False, "images_before": False}
            self.conversation = {
                name: value for name, value in self.conversation.items() if rare.get(name, ...) != value
            }
        self.sampling = _mapping(sampling, "sampling")
        self.family = family
        if quantization is not None:  # else the key is not written
            self.quantization = _mapping(quantization, "quantization")
        self._check()
        super().__init__(**common_options(given, *SOURCE_KEYS))

    def _check(self) -> None:
        """Check each part, and that they go together."""
        validate(_Plain, {"family": self.family, "extra_tokens": self.extra_tokens}, "")
        read_dataclass(Turns, self.conversation or {}, "", "conversation")
        self.sampling_config()
        self.small_weights()
        decoder, generation = self.decoder_config(), self.generation_config()
        for name in PART_KINDS:
            self.part(name)
        if generation is not None and self.image_tokenizer is None:
            raise FieldError(
                "image_tokenizer: missing, though `generation` is given; add the tokenizer's config"
            )
        tokenizer = self.image_tokenizer_config()
        seeing = self.seeing()
        check_seeing(seeing, generation, decoder.max_position_embeddings)
        fusion = self.fusion_part()
        check_fusion(fusion, seeing, decoder)
        check_positions(self.positions_config(), fusion, decoder)
        if generation is not None and tokenizer is not None:
            check_generation(generation, tokenizer)
        if self.layout:
            check_layout(self.image_layout(), self.vocabulary, generation)
            check_rasters(self.image_layout(), seeing)
            check_marks(self.image_layout(), fusion)

    def decoder_config(self) -> PreTrainedConfig:
        """Return the decoder's own config object."""
        return decoder_config(self.decoder)

    def part(self, name: str) -> Any:
        """Return the typed description of a part; None where the model has none."""
        fields = getattr(self, name)
        return None if fields is None else read_part(name, fields)

    def views_config(self) -> ViewsConfig | None:
        """Return what images to understand are brought to."""
        views: ViewsConfig | None = self.part("views")
        return views

    def encoder_config(self) -> EncoderConfig | None:
        """Return what makes features of them."""
        encoder: EncoderConfig | None = self.part("encoder")
        return encoder

    def reducer_config(self) -> ReducerConfig:
        """Return what makes fewer features of many."""
        reducer: ReducerConfig = self.part("reducer")
        return reducer

    def connector_config(self) -> ConnectorConfig:
        """Return what brings features to the decoder's width."""
        connector: ConnectorConfig = self.part("connector")
        return connector

    def fusion_part(self) -> FusionConfig:
        """Return how what was seen reaches the decoder; transformers has another `fusion_config`."""
        fusion: FusionConfig = self.part("fusion")
        return fusion

    def connector_depth(self) -> int:
        """Return the connector's linear layers; 0 where there is none."""
        connector = self.connector_config()
        return connector.depth if isinstance(connector, MlpConnectorConfig) else 0

    def positions_config(self) -> PositionsConfig:
        """Return how positions of the stream are counted."""
        positions: PositionsConfig = self.part("positions")
        return positions

    @property
    def vocabulary(self) -> int:
        """Tokens that have a row of their own in the embedding."""
        return int(self.decoder_config().vocab_size) + self.extra_tokens

    def seeing(self) -> Seeing:
        """Return the parts that an image to understand goes through."""
        return Seeing(self.views_config(), self.encoder_config(), self.reducer_config())

    def generation_config(self) -> ImageGenerationConfig | None:
        """Return the typed description of the code side."""
        generation: ImageGenerationConfig | None = self.part("generation")
        return generation

    def image_layout(self) -> ImageLayout:
        """Return how images sit among the tokens."""
        return read_dataclass(ImageLayout, self.layout, "", "layout")

    def image_tokenizer_config(self) -> ImageTokenizerSizes | None:
        """Return the image tokenizer's own config object."""
        if self.image_tokenizer is None:
            return None
        try:
            return read_image_tokenizer(self.image_tokenizer)
        except FieldError as error:
            raise FieldError(f"image_tokenizer.{error}") from None

    def small_weights(self) -> SmallWeights | None:
        """Return how the weights are quantised; None where they are not."""
        return (
            None
            if self.quantization is None
            else validate(SmallWeights, self.quantization, "", "quantization")
        )

    def sampling_config(self) -> SamplingConfig:
        """Return how the model draws where nobody says otherwise."""
        return read_dataclass(SamplingConfig, self.sampling or {}, "", "sampling")


def read_image_tokenizer(fields: Mapping[str, Any]) -> ImageTokenizerSizes:
    """Return the config of an image tokenizer, by its `model_type`, an `ImageTokenizerConfig` if none is given.

    Raises:
        FieldError: there is no such kind, or a field is wrong.
    """
    options = own_keys(fields)
    kind = fields.get("model_type", ImageTokenizerConfig.model_type)
    if not isinstance(kind, str) or kind not in IMAGE_TOKENIZERS:
        known = ", ".join(IMAGE_TOKENIZERS)
        raise FieldError(
            f"model_type: expected one of {known}, got {show(kind)}{near(kind, IMAGE_TOKENIZERS)}"
        )
    return IMAGE_TOKENIZERS[kind](**options)


class _Plain(Section):
    """What stands beside the parts."""

    family: Annotated[str, Field(max_length=64)] | None
    extra_tokens: Annotated[int, Field(ge=0, le=2**16)]


def _mapping(section: Any, key: str) -> dict[str, Any] | None:
    """A part as it is, if it is one."""
    if section is not None and not isinstance(section, dict):
        raise FieldError(f"{key}: expected a mapping, got {show(section)}")
    return section


def _without_dtype(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A part's description without number formats: all parts have that of the whole model."""
    if part is None:
        return None
    return {
        key: _without_dtype(value) if isinstance(value, dict) else value
        for key, value in part.items()
        if key not in DTYPE_KEYS
    }


def _image_tokenizer(section: Any) -> dict[str, Any] | None:
    """An image tokenizer's own fields, and its kind."""
    fields = _mapping(section, "image_tokenizer")
    if fields is None:
        return None
    try:
        return {"model_type": fields.get("model_type"), **own_keys(fields)}
    except FieldError as error:
        raise FieldError(f"image_tokenizer.{error}") from None


AutoConfig.register(UniMMConfig.model_type, UniMMConfig)

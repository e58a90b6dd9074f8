"""The parts of a model as its configuration describes them: each a typed section with a `kind`.

views -> encoder -> reducer -> connector -> fusion is the way of an image to understand; `positions` are those of the
decoder's stream; `generation` is the way of an image to generate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field

from unimm.models.encoders import check_architecture, check_encoder_options
from unimm.models.image_tokenizers.sizes import Side
from unimm.sections import FieldError, Positive, near, read_dataclass, show

Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=2**6)]
Grey = Annotated[int, Field(ge=0, le=255)]
Mean = Annotated[tuple[float, float, float], Field(strict=False)]
Deviation = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]],
    Field(strict=False),
]
Stride = Annotated[int, Field(gt=0, le=2**10)]
Merge = Annotated[int, Field(gt=0, le=2**6)]
FeatureCount = Annotated[int, Field(gt=0, le=2**20)]
EncoderKwargs = Annotated[dict[str, Any], AfterValidator(check_encoder_options)]
EncoderName = Annotated[str, AfterValidator(check_architecture)]
PadValue = Grey | Annotated[tuple[Grey, Grey, Grey], Field(strict=False)]
_HALF = (0.5, 0.5, 0.5)


# --- images to understand -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SquareViewsConfig:
    """One square an image: its long side brought to `image_size`, the rest filled up (Janus).

    Attributes:
        image_size: pixels a side.
        pad_value: grey level (0..255), or one for each channel, of the filling.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
    """

    image_size: Side
    pad_value: PadValue = 127
    mean: Mean = _HALF
    std: Deviation = _HALF
    kind: Literal["square"] = "square"


@dataclasses.dataclass(frozen=True)
class AreaViewsConfig:
    """An image at its own ratio, within an area (Emu3).

    Attributes:
        least: pixels of the smallest area.
        most: pixels of the largest.
        stride: pixels that both sides are multiples of.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
    """

    least: Positive
    most: Positive
    stride: Stride
    mean: Mean = _HALF
    std: Deviation = _HALF
    kind: Literal["area"] = "area"


@dataclasses.dataclass(frozen=True)
class TimmEncoderConfig:
    """A vision transformer of timm.

    Attributes:
        name: architecture, as timm names it.
        tokens: features of a view (the square of the patches a side).
        width: channels of a feature.
        kwargs: what `unimm.models.vision.create_encoder` takes besides the name (image size, width, depth, ...).
    """

    name: EncoderName
    tokens: FeatureCount
    width: Width
    kwargs: EncoderKwargs = dataclasses.field(default_factory=dict)
    kind: Literal["timm"] = "timm"

    @property
    def side(self) -> int:
        """Features a side."""
        return math.isqrt(self.tokens)


@dataclasses.dataclass(frozen=True)
class CodesEncoderConfig:
    """The image tokenizer: an image is understood by its codes, which are tokens of the text vocabulary (Emu3)."""

    kind: Literal["codes"] = "codes"


@dataclasses.dataclass(frozen=True)
class JoinReducerConfig:
    """Neighbouring features joined into one, channel after channel.

    Attributes:
        side: features a side; 1 leaves them as they are, 2 leaves a quarter of them (Qwen2-VL).
    """

    side: Merge = 1
    kind: Literal["join"] = "join"


@dataclasses.dataclass(frozen=True)
class MlpConnectorConfig:
    """Linear layers with a GELU between.

    Attributes:
        depth: how many.
    """

    depth: Depth = 2
    kind: Literal["mlp"] = "mlp"


@dataclasses.dataclass(frozen=True)
class StreamFusionConfig:
    """Features stand in the stream, in the place of placeholders."""

    kind: Literal["stream"] = "stream"


@dataclasses.dataclass(frozen=True)
class CountedPositionsConfig:
    """Positions count the tokens of the stream that are attended to."""

    kind: Literal["counted"] = "counted"


# --- images to generate -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageGenerationConfig:
    """The code side: its vocabulary and the layers that join it to the decoder.

    Attributes:
        codes: size of the code vocabulary (the image tokenizer's codebook).
        dim: dimension of a code embedding before its connector.
        image_size: pixels a side of a drawing.
        stride: pixels a side that one code stands for.
        places: whether there are learned positions of codes in the grid (Janus leaves positions to the decoder).
        depth: linear layers of the code connector; None: as many as the connector has.
        head_width: width between the two layers of the code head; None: the decoder's.
        shared: whether codes are tokens of the text vocabulary (Emu3); there are then no layers of their own.
    """

    codes: Annotated[int, Field(gt=0, le=2**20)]
    dim: Annotated[int, Field(ge=0, le=2**12)]
    image_size: Side
    stride: Stride
    places: bool = False
    depth: Depth | None = None
    head_width: Width | None = None
    shared: bool = False
    kind: Literal["codes"] = "codes"

    @property
    def grid(self) -> int:
        """Codes a side of a drawing."""
        return self.image_size // self.stride


ViewsConfig: TypeAlias = SquareViewsConfig | AreaViewsConfig
EncoderConfig: TypeAlias = TimmEncoderConfig | CodesEncoderConfig
PART_KINDS: dict[str, tuple[type, ...]] = {
    "views": (SquareViewsConfig, AreaViewsConfig),
    "encoder": (TimmEncoderConfig, CodesEncoderConfig),
    "reducer": (JoinReducerConfig,),
    "connector": (MlpConnectorConfig,),
    "fusion": (StreamFusionConfig,),
    "positions": (CountedPositionsConfig,),
    "generation": (ImageGenerationConfig,),
}
"""Part -> the kinds that there are; the first is what a description without a kind means."""


def read_part(part: str, fields: Mapping[str, Any]) -> Any:
    """Return the typed description of a part, by its `kind`.

    Raises:
        FieldError: there is no such kind, or a field is wrong.
    """
    kinds = {str(described.kind): described for described in PART_KINDS[part]}  # type: ignore[attr-defined]
    kind = fields.get("kind", next(iter(kinds)))
    if not isinstance(kind, str) or kind not in kinds:
        raise FieldError(
            f"{part}.kind: expected one of {', '.join(kinds)}, got {show(kind)}{near(kind, kinds)}"
        )
    return read_dataclass(kinds[kind], dict(fields), "", part)


def part_fields(described: Any) -> dict[str, Any]:
    """Return a part's description as plain values, the kind first, what is as by default left out."""
    plain = {
        field.name: value
        for field in dataclasses.fields(described)
        if (value := getattr(described, field.name)) != _default(field) and field.name != "kind"
    }
    return {"kind": described.kind, **plain}


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


# --- a square view through a timm encoder -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """An encoder of timm with its square view and the features that are joined: what a SigLIP run exports.

    Attributes:
        name: see `TimmEncoderConfig`.
        image_size: see `SquareViewsConfig`.
        tokens: see `TimmEncoderConfig`.
        width: see `TimmEncoderConfig`.
        kwargs: see `TimmEncoderConfig`.
        merge: `side` of `JoinReducerConfig`.
        pad_value: see `SquareViewsConfig`.
        mean: see `SquareViewsConfig`.
        std: see `SquareViewsConfig`.
    """

    name: EncoderName
    image_size: Side
    tokens: FeatureCount
    width: Width
    kwargs: EncoderKwargs = dataclasses.field(default_factory=dict)
    merge: Merge = 1
    pad_value: PadValue = 127
    mean: Mean = _HALF
    std: Deviation = _HALF

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return the views, encoder and reducer of a `UniMMConfig`."""
        views = SquareViewsConfig(self.image_size, self.pad_value, self.mean, self.std)
        encoder = TimmEncoderConfig(self.name, self.tokens, self.width, self.kwargs)
        described = {"views": views, "encoder": encoder, "reducer": JoinReducerConfig(self.merge)}
        return {name: part_fields(part) for name, part in described.items()}


def former_parts(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's sections with those that they had before each part had a kind in today's terms.

    These are `vision` and `connector_depth`, `area`, `mean` and `std` of `generation`, and `features` of `layout`.

    Raises:
        FieldError: one of them is wrong.
    """
    found = dict(sections)
    if (vision := found.pop("vision", None)) is not None:
        found |= read_dataclass(VisionConfig, vision, "", "vision").parts()
    if (depth := found.pop("connector_depth", None)) is not None:
        found["connector"] = part_fields(
            read_dataclass(MlpConnectorConfig, {"depth": depth}, "", "connector")
        )
    generation = found.get("generation")
    if isinstance(generation, dict) and {"area", "mean", "std"} & generation.keys():
        own = {name: value for name, value in generation.items() if name not in ("area", "mean", "std")}
        found["generation"] = own
        area = generation.get("area")
        if area is not None and "encoder" not in found:
            found |= _area_parts(generation, area)
    if isinstance(layout := found.get("layout"), dict):
        found["layout"] = {name: value for name, value in layout.items() if name != "features"}
    return found


def _area_parts(generation: Mapping[str, Any], area: Any) -> dict[str, Any]:
    if not isinstance(area, list | tuple) or len(area) != 2:
        raise FieldError(f"generation.area: expected the least and the most pixels, got {show(area)}")
    own = {name: generation[name] for name in ("stride", "mean", "std") if name in generation}
    views = read_dataclass(AreaViewsConfig, {"least": area[0], "most": area[1], **own}, "", "views")
    return {"views": part_fields(views), "encoder": part_fields(CodesEncoderConfig())}

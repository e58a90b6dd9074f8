"""The parts of a model as its configuration describes them: each a typed section with a `kind`.

views -> encoder -> reducer -> connector -> fusion is the way of an image to understand; `positions` are those of the
decoder's stream; `generation` is the way of an image to generate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from unimm.models.configs import Activation
from unimm.models.encoder_parts import CodesEncoderConfig as CodesEncoderConfig
from unimm.models.encoder_parts import LinearEncoderConfig as LinearEncoderConfig
from unimm.models.encoder_parts import NaflexEncoderConfig as NaflexEncoderConfig
from unimm.models.encoder_parts import TiledEncoderConfig as TiledEncoderConfig
from unimm.models.encoder_parts import TimmEncoderConfig as TimmEncoderConfig
from unimm.models.encoder_parts import TransformersEncoderConfig as TransformersEncoderConfig
from unimm.models.fusion_parts import BothFusionConfig, CrossFusionConfig, StreamFusionConfig
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import (
    DEFAULT_COLOURS,
    Depth,
    Deviation,
    Epsilon,
    HeadCount,
    Mean,
    Merge,
    PadValue,
    QueryCount,
    Resample,
    Stride,
    WholeNumber,
    Width,
)
from unimm.sections import FieldError, Positive, near, read_dataclass, show

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
    mean: Mean = DEFAULT_COLOURS
    std: Deviation = DEFAULT_COLOURS
    kind: Literal["square"] = "square"


@dataclasses.dataclass(frozen=True)
class AreaViewsConfig:
    """An image at its own ratio, within an area (Emu3, Qwen2-VL).

    Attributes:
        least: pixels of the smallest area.
        most: pixels of the largest.
        stride: pixels that both sides are multiples of.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
        frame_least: pixels of the smallest area of a frame of a video; None: as of an image.
        frame_most: of the largest.
    """

    least: Positive
    most: Positive
    stride: Stride
    mean: Mean = DEFAULT_COLOURS
    std: Deviation = DEFAULT_COLOURS
    frame_least: Positive | None = None
    frame_most: Positive | None = None
    kind: Literal["area"] = "area"


@dataclasses.dataclass(frozen=True)
class FitViewsConfig:
    """An image at its own ratio, within a rectangle, its sides brought to multiples of a unit (Pixtral, Fuyu, Aria).

    Attributes:
        bounds: most pixels of height and width.
        unit: pixels that both sides are multiples of.
        fill: how they become so: "stretch" the image to the next multiple (Pixtral), "pad" it to the next multiple
            (Fuyu), or bring every image to the bounds and pad it to the "whole" of them (Aria).
        least: pixels that the short side has at least.
        pad_value: grey level (0..255), or one for each channel, of the padding.
        resample: how pixels are interpolated.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
    """

    bounds: Annotated[tuple[Side, Side], Field(strict=False)]
    unit: Stride
    fill: Literal["stretch", "pad", "whole"] = "stretch"
    least: WholeNumber = 0
    pad_value: PadValue = 0
    resample: Resample = "bicubic"
    mean: Mean = DEFAULT_COLOURS
    std: Deviation = DEFAULT_COLOURS
    kind: Literal["fit"] = "fit"


@dataclasses.dataclass(frozen=True)
class CanvasViewsConfig:
    """An image cut into square tiles, and the whole of it beside them (NVLM, Molmo, Llama 3.2, MM1.5, Baichuan-Omni).

    Attributes:
        tile: pixels a side of a tile.
        most: tiles of an image, the whole not counted.
        least: of these the fewest.
        choose: which arrangement of tiles is taken: the one whose "ratio" of width to height is nearest (NVLM), the
            one that enlarges least (Molmo, Llama 3.2, Baichuan-Omni: "scale"), or that pads and shrinks least (MM1.5:
            "pad").
        place: how the image fills the arrangement: "stretch" to all of it, in the "centre" with padding around, or in
            the upper left "corner", enlarged to the side of a tile at most (Llama 3.2).
        whole: where the whole image stands: "first", "last", or nowhere.
        whole_place: as `place`, of the whole.
        alone: whether an image of one tile is shown as the whole alone.
        overlap: pixels at each side of a tile that its neighbours show too (Molmo).
        pad_value: grey level (0..255), or one for each channel, of the padding.
        resample: how pixels are interpolated.
        precise: whether pixels stay float32 numbers between resizing and normalising, and sizes are computed in float32
            (Molmo), where else they are rounded to 256 levels.
        mean: what is taken from each colour channel in [0, 1], and
        std: what it is then divided by; the defaults give [-1, 1].
    """

    tile: Side
    most: Annotated[int, Field(gt=0, le=64)]
    least: Annotated[int, Field(gt=0, le=64)] = 1
    choose: Literal["ratio", "scale", "pad"] = "ratio"
    place: Literal["stretch", "centre", "corner"] = "stretch"
    whole: Literal["first", "last", "none"] = "last"
    whole_place: Literal["stretch", "centre"] = "stretch"
    alone: bool = False
    overlap: WholeNumber = 0
    pad_value: PadValue = 0
    resample: Resample = "bicubic"
    precise: bool = False
    mean: Mean = DEFAULT_COLOURS
    std: Deviation = DEFAULT_COLOURS
    kind: Literal["canvas"] = "canvas"

    def __post_init__(self) -> None:
        if self.precise and self.place == "corner":
            raise FieldError("precise: expected false where place is corner, got true")

    def views(self, rows: int, columns: int) -> int:
        """Views of an image of so many rows and columns of tiles, the whole among them."""
        tiles = rows * columns
        return 1 if tiles == 1 and self.alone else tiles + (self.whole != "none")


@dataclasses.dataclass(frozen=True)
class JoinReducerConfig:
    """Neighbouring features joined into one, channel after channel.

    Attributes:
        side: features a side; 1 leaves them as they are, 2 leaves a quarter of them (Qwen2-VL).
    """

    side: Merge = 1
    kind: Literal["join"] = "join"


@dataclasses.dataclass(frozen=True)
class MeanReducerConfig:
    """The mean of neighbouring features; an odd row at the end is left out, an odd column is a token (Baichuan-Omni).

    Attributes:
        side: features a side.
    """

    side: Merge = 2
    kind: Literal["mean"] = "mean"


@dataclasses.dataclass(frozen=True)
class AttendReducerConfig:
    """Attention from the mean of neighbouring features to each of them (Molmo).

    Attributes:
        side: features a side.
        width: of what comes out.
        heads: attention heads.
        padding: whether features of padding get a learned vector, one where all is padding, one where some is; which
            views they are sought in, `unimm.processing.canvas` says.
    """

    width: Width
    heads: HeadCount
    side: Merge = 2
    padding: bool = False
    kind: Literal["attend"] = "attend"


@dataclasses.dataclass(frozen=True)
class ResampleReducerConfig:
    """Learned queries that look at all features of a view (Aria).

    Attributes:
        heads: attention heads.
        queries: features of a padded view: how many of the queries, the first ones, look at one of so many.
    """

    heads: HeadCount
    queries: Annotated[tuple[QueryCount, ...], Field(strict=False, min_length=1)]
    kind: Literal["resample"] = "resample"


@dataclasses.dataclass(frozen=True)
class AbstractReducerConfig:
    """Convolutions, an adaptive mean and convolutions again (the C-Abstractor of MM1.5).

    Attributes:
        side: features a side of every view afterwards.
        width: of the convolutions.
        depth: blocks before, and after, the mean.
        positions: whether a learned position is added to each feature first.
    """

    side: Annotated[int, Field(gt=0, le=2**8)]
    width: Width
    depth: Depth = 3
    positions: bool = False
    kind: Literal["abstract"] = "abstract"


@dataclasses.dataclass(frozen=True)
class MlpConnectorConfig:
    """Linear layers with an activation between.

    Attributes:
        depth: how many.
        width: of what is between them; None: the decoder's.
        bias: whether they have biases.
        act: the activation.
        norm: what comes before them.
        norm_at: whether that is of each "feature", or of each "token" that several were joined to.
        eps: of the norm.
        gated: whether there are three, as in Llama's MLP; `depth` does not count then.
    """

    depth: Depth = 2
    width: Width | None = None
    bias: bool = True
    act: Activation = "gelu"
    norm: Literal["none", "layer", "rms"] = "none"
    norm_at: Literal["feature", "token"] = "token"
    eps: Epsilon = 1e-6
    gated: bool = False
    kind: Literal["mlp"] = "mlp"


@dataclasses.dataclass(frozen=True)
class NoConnectorConfig:
    """Nothing: features have the decoder's width (Fuyu)."""

    kind: Literal["none"] = "none"


@dataclasses.dataclass(frozen=True)
class CountedPositionsConfig:
    """Positions count the tokens of the stream that are attended to."""

    kind: Literal["counted"] = "counted"


@dataclasses.dataclass(frozen=True)
class MropePositionsConfig:
    """Rotary positions of time, row and column: an image's features and codes lie where they are (Qwen2-VL's M-RoPE).

    Attributes:
        sections: how many of the decoder's rotary frequencies turn with each.
    """

    sections: Annotated[tuple[WholeNumber, WholeNumber, WholeNumber], Field(strict=False)]
    kind: Literal["mrope"] = "mrope"


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


ViewsConfig: TypeAlias = SquareViewsConfig | AreaViewsConfig | FitViewsConfig | CanvasViewsConfig
NativeEncoderConfig: TypeAlias = NaflexEncoderConfig | TransformersEncoderConfig | LinearEncoderConfig
EncoderConfig: TypeAlias = TimmEncoderConfig | CodesEncoderConfig | TiledEncoderConfig | NativeEncoderConfig
ReducerConfig: TypeAlias = (
    JoinReducerConfig
    | MeanReducerConfig
    | AttendReducerConfig
    | ResampleReducerConfig
    | AbstractReducerConfig
)
ConnectorConfig: TypeAlias = MlpConnectorConfig | NoConnectorConfig
FusionConfig: TypeAlias = StreamFusionConfig | CrossFusionConfig | BothFusionConfig
PositionsConfig: TypeAlias = CountedPositionsConfig | MropePositionsConfig
PART_KINDS: dict[str, tuple[type, ...]] = {
    "views": (SquareViewsConfig, AreaViewsConfig, FitViewsConfig, CanvasViewsConfig),
    "encoder": (
        TimmEncoderConfig,
        CodesEncoderConfig,
        NaflexEncoderConfig,
        TransformersEncoderConfig,
        LinearEncoderConfig,
        TiledEncoderConfig,
    ),
    "reducer": (
        JoinReducerConfig,
        MeanReducerConfig,
        AttendReducerConfig,
        ResampleReducerConfig,
        AbstractReducerConfig,
    ),
    "connector": (MlpConnectorConfig, NoConnectorConfig),
    "fusion": (StreamFusionConfig, CrossFusionConfig, BothFusionConfig),
    "positions": (CountedPositionsConfig, MropePositionsConfig),
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

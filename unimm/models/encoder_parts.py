"""Understanding encoders as a configuration describes them; `unimm.models.parts` names them among the other parts."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from unimm.models.encoders import check_conv_stem, check_foreign_encoder
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import (
    EncoderKwargs,
    EncoderName,
    Epsilon,
    FeatureCount,
    HeadCount,
    Stride,
    WholeNumber,
    Width,
)


@dataclasses.dataclass(frozen=True)
class TimmEncoderConfig:
    """A vision transformer of timm.

    Attributes:
        name: architecture, as timm names it.
        tokens: features of a view (the square of the patches a side).
        width: channels of a feature.
        kwargs: what `unimm.models.vision.create_encoder` takes besides the name (image size, width, depth, ...).
        layers: blocks whose states are joined to a feature, counted from 0; empty: the last, after the final norm.
    """

    name: EncoderName
    tokens: FeatureCount
    width: Width
    kwargs: EncoderKwargs = dataclasses.field(default_factory=dict)
    layers: Annotated[tuple[WholeNumber, ...], Field(strict=False)] = ()
    kind: Literal["timm"] = "timm"

    @property
    def side(self) -> int:
        """Features a side."""
        return math.isqrt(self.tokens)


@dataclasses.dataclass(frozen=True)
class NaflexEncoderConfig:
    """A vision transformer of timm for images of any size, with rotary positions of rows and columns (Qwen2-VL).

    Attributes:
        width: channels of a feature.
        depth: blocks.
        heads: attention heads.
        patch: pixels a side of a feature.
        frames: frames of a video that a patch spans; an image is repeated so often.
        mlp_ratio: width of a block's MLP, in widths.
        act: its activation.
        stem: what a patch is embedded by: one linear layer, or convolutions that each halve the image, with which a
            small encoder learns from fewer images: "conv" normalises at each pixel (`unimm.models.stems.conv_stem`),
            "scaled_conv" normalises weights alone and learns shapes such as letters from fewer still
            (`unimm.models.stems.scaled_conv_stem`).
        side: features a side of every view; 0: views keep their own sizes.
    """

    width: Width
    depth: Annotated[int, Field(gt=0, le=2**10)]
    heads: HeadCount
    patch: Stride
    frames: Annotated[int, Field(gt=0, le=16)] = 1
    mlp_ratio: Annotated[float, Field(gt=0, le=2**8)] = 4.0
    act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    stem: Literal["patch", "conv", "scaled_conv"] = "patch"
    side: WholeNumber = 0
    kind: Literal["naflex"] = "naflex"

    def __post_init__(self) -> None:
        if self.stem != "patch":
            check_conv_stem(self.patch, self.width)


@dataclasses.dataclass(frozen=True)
class TransformersEncoderConfig:
    """An encoder of transformers.

    Attributes:
        name: its `model_type`, one of `unimm.models.encoders.FOREIGN_ENCODERS`.
        width: channels of a feature.
        patch: pixels a side of a feature.
        side: features a side of every view; 0: views keep their own sizes.
        kwargs: fields of its config.
    """

    name: str
    width: Width
    patch: Stride
    side: WholeNumber = 0
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: Literal["transformers"] = "transformers"

    def __post_init__(self) -> None:
        check_foreign_encoder(self.name, self.kwargs)


@dataclasses.dataclass(frozen=True)
class TiledEncoderConfig:
    """A vision transformer that looks at all tiles of an image at once (Llama 3.2).

    Attributes:
        image_size: pixels a side of a tile.
        patch: pixels a side of a feature.
        hidden: channels of a state.
        depth: blocks.
        global_depth: gated blocks behind them.
        heads: attention heads.
        mlp_width: width of a block's MLP.
        tiles: most tiles of an image.
        layers: blocks, counted from 0, whose entering states are joined to what comes out.
        eps: of the norms.
    """

    image_size: Side
    patch: Stride
    hidden: Width
    depth: Annotated[int, Field(gt=0, le=2**10)]
    global_depth: Annotated[int, Field(gt=0, le=2**10)]
    heads: HeadCount
    mlp_width: Annotated[int, Field(gt=0, le=2**18)]
    tiles: Annotated[int, Field(gt=0, le=64)] = 4
    layers: Annotated[tuple[WholeNumber, ...], Field(strict=False)] = ()
    eps: Epsilon = 1e-5
    kind: Literal["tiled"] = "tiled"

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.hidden * (1 + len(self.layers))

    @property
    def tokens(self) -> int:
        """Features of a tile, the first of no patch."""
        return (self.image_size // self.patch) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class LinearEncoderConfig:
    """No encoder but a projection of the pixels of each patch (Fuyu).

    Attributes:
        width: channels of a feature.
        patch: pixels a side of a feature.
    """

    width: Width
    patch: Stride
    kind: Literal["linear"] = "linear"


@dataclasses.dataclass(frozen=True)
class CodesEncoderConfig:
    """The image tokenizer: an image is understood by its codes, which are tokens of the text vocabulary (Emu3)."""

    kind: Literal["codes"] = "codes"

"""Types of the fields that describe parts: numbers and names with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from unimm.models.encoders import check_architecture, check_encoder_options

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
QueryCount = Annotated[tuple[FeatureCount, FeatureCount], Field(strict=False)]
WholeNumber = Annotated[int, Field(ge=0, le=2**20)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
HeadCount = Annotated[int, Field(gt=0, le=2**10)]
Resample = Literal["bilinear", "bicubic"]
DEFAULT_COLOURS = (0.5, 0.5, 0.5)

"""Sections that hold several parts: what a SigLIP run exports, and what configurations had before parts had kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import (
    DEFAULT_COLOURS,
    Deviation,
    EncoderKwargs,
    EncoderName,
    FeatureCount,
    Mean,
    Merge,
    PadValue,
    Width,
)
from unimm.models.parts import (
    AreaViewsConfig,
    CodesEncoderConfig,
    JoinReducerConfig,
    MlpConnectorConfig,
    SquareViewsConfig,
    TimmEncoderConfig,
    part_fields,
)
from unimm.sections import FieldError, read_dataclass, show


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
    mean: Mean = DEFAULT_COLOURS
    std: Deviation = DEFAULT_COLOURS

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

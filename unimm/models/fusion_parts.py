"""How what an encoder saw reaches the decoder, as a configuration describes it: kinds of the part `fusion`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from unimm.models.layout import TokenId
from unimm.models.part_types import Epsilon, HeadCount, WholeNumber, Width

Sight = Literal["image", "tile", "sample"]


@dataclasses.dataclass(frozen=True)
class StreamFusionConfig:
    """Features stand in the stream, in the place of placeholders."""

    kind: Literal["stream"] = "stream"


@dataclasses.dataclass(frozen=True)
class CrossFusionConfig:
    """Features are a memory, seen by gated blocks before some of the decoder's layers (Llama 3.2, NVLM-X).

    Attributes:
        layers: decoder layers before which a block stands, counted from 0.
        heads: attention heads of a block.
        kv_heads: of its keys and values.
        width: of its MLP.
        qk_norm: whether queries and keys are normalised, head by head.
        eps: of its norms.
        sees: what a token sees of the images before it in its sample. "image": the last one; of images whose marks
            touch, all (Llama 3.2). "tile": a mark sees its own tile, what comes behind an image all of it (NVLM-X).
            "sample": all.
    """

    layers: Annotated[tuple[WholeNumber, ...], Field(strict=False, min_length=1)]
    heads: HeadCount
    kv_heads: HeadCount
    width: Width
    qk_norm: bool = True
    eps: Epsilon = 1e-5
    sees: Sight = "image"
    kind: Literal["cross"] = "cross"


@dataclasses.dataclass(frozen=True)
class BothFusionConfig:
    """The whole image stands in the stream, its tiles are a memory as in `CrossFusionConfig` (NVLM-H).

    All that comes behind the first feature of an image in its sample sees its tiles.

    Attributes:
        layers: see `CrossFusionConfig`, as are `heads`, `kv_heads`, `width`, `qk_norm` and `eps`.
        tags: tokens whose embeddings stand in the memory before each tile, by the tile's number; empty: none.
    """

    layers: Annotated[tuple[WholeNumber, ...], Field(strict=False, min_length=1)]
    heads: HeadCount
    kv_heads: HeadCount
    width: Width
    qk_norm: bool = True
    eps: Epsilon = 1e-5
    tags: Annotated[tuple[Annotated[tuple[TokenId, ...], Field(strict=False)], ...], Field(strict=False)] = ()
    kind: Literal["both"] = "both"

    @property
    def sees(self) -> Sight:
        """See `CrossFusionConfig`."""
        return "sample"

"""What the small files of Molmo's checkpoints may say, those without experts and MolmoE's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from unimm.families.documents import OwnCode
from unimm.models.configs import Published
from unimm.models.image_tokenizers.sizes import Side
from unimm.models.part_types import HeadCount, Width

Eps = Annotated[float, Field(gt=0, lt=1)]
_Count = Annotated[int, Field(gt=0, le=2**10)]
_BlockNumber = Annotated[int, Field(ge=-(2**10), le=2**10)]
Square = Annotated[tuple[Side, Side], Field(strict=False)]


class Tower(Published):
    """The vision tower, CLIP's ViT-L/14 at 336 pixels without its last block where nothing is said."""

    image_default_input_size: Square = (336, 336)
    image_patch_size: _Count = 14
    image_emb_dim: Width = 1024
    image_num_heads: HeadCount = 16
    image_num_layers: _Count = 23
    image_mlp_dim: Annotated[int, Field(gt=0, le=2**18)] = 4096
    image_mlp_activations: Literal["quick_gelu"] = "quick_gelu"
    image_norm_eps: Annotated[float, Field(ge=1e-5, le=1e-5)] = 1e-5  # what timm has


class Document(OwnCode):
    """`config.json` of the models without experts."""

    hidden_size: Width
    intermediate_size: Annotated[int, Field(gt=1, le=2**20, multiple_of=2)]  # of both halves
    num_hidden_layers: _Count
    num_attention_heads: HeadCount
    num_key_value_heads: HeadCount | None = None
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**24)]
    embedding_size: Annotated[int, Field(gt=0, le=2**22)] | None = None
    vocab_size: Annotated[int, Field(gt=0, le=2**22)]
    rope_theta: Annotated[float, Field(ge=1, le=1e12)]
    layer_norm_eps: Eps = 1e-5
    qkv_bias: bool = False
    norm_after: bool = False
    attention_layer_norm: bool = False
    clip_qkv: None = None
    layer_norm_type: Literal["rms"] = "rms"
    weight_tying: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    vision_backbone: Tower = Field(default_factory=Tower)
    vit_layers: Annotated[tuple[_BlockNumber, ...], Field(strict=False, min_length=1, max_length=8)] = (
        -2,
        -9,
    )


class Crops(OwnCode):
    """`preprocessor_config.json`, besides colours."""

    base_image_input_size: Square | None = None
    image_patch_size: _Count | None = None
    max_crops: Annotated[int, Field(gt=0, le=64)] = 12
    overlap_margins: Annotated[tuple[_Count, _Count], Field(strict=False)] = (4, 4)
    image_padding_mask: Literal[True] = True


class ExpertDocument(OwnCode):
    """`config.json` of MolmoE, whose fields have the names of the training configuration."""

    d_model: Width
    n_layers: _Count
    n_heads: HeadCount
    n_kv_heads: HeadCount | None = None
    mlp_ratio: Annotated[int, Field(gt=0, le=64)] = 1
    mlp_hidden_size: Annotated[int, Field(gt=1, le=2**20, multiple_of=2)] | None = None
    moe_num_experts: Annotated[int, Field(gt=1, le=2**10)]
    moe_top_k: _Count
    max_sequence_length: Annotated[int, Field(gt=0, le=2**24)] = 4096
    max_position_embeddings: Annotated[int, Field(gt=0, le=2**24)] | None = None
    embedding_size: Annotated[int, Field(gt=0, le=2**22)] | None = None
    vocab_size: Annotated[int, Field(gt=0, le=2**22)]
    rope: Literal[True]
    rope_impl: Literal["llama"]
    rope_theta: Annotated[float, Field(ge=1, le=1e12)]
    layer_norm_eps: Eps = 1e-5
    attention_layer_norm: Literal[True]
    norm_after: Literal[False] = False
    qkv_bias: Literal[False] = False
    include_bias: Literal[False] = False
    clip_qkv: None = None
    layer_norm_type: Literal["rms"] = "rms"
    activation_type: Literal["swiglu"] = "swiglu"
    weight_tying: Literal[False] = False
    moe_shared_expert: Literal[False] | None = None
    moe_interleave: Literal[False] | None = None
    image_padding_embed: Literal["pad_and_partial_pad"]
    image_pooling_2d: Literal["attention-meanq"]
    image_projector: Literal["mlp"]
    use_cls_feature: Literal[False] = False
    vision_backbone: Tower = Field(default_factory=Tower)
    vit_layers: Annotated[tuple[_BlockNumber, ...], Field(strict=False, min_length=1, max_length=8)] = (
        -2,
        -9,
    )

    @property
    def intermediate_size(self) -> int:
        """Of both halves of an expert, and of the connector."""
        return self.mlp_hidden_size or self.mlp_ratio * self.d_model


def has_experts(document: Mapping[str, Any]) -> bool:
    """Whether a `config.json` of Molmo's is MolmoE's."""
    return bool(document.get("moe_num_experts"))

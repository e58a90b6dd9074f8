"""MM1.5: sub-images by the least padding, a C-Abstractor, and decoders that are dense or of experts.

Source: Zhang et al. 2024 (arXiv 2409.20566), with McKinzie et al. 2024 (MM1, arXiv 2403.09611).

Neither weights nor code were published, so no checkpoint is read here: `parts` gives a model of one of the sizes as
fields of `UniMMConfig`. Published are CLIP's ViT-H/14 at 672 pixels, its positions interpolated; 144 tokens a
sub-image from a C-Abstractor; 4 to 9 sub-images in training (16 at inference) and the whole image behind them; and of
the models of experts, 64 experts in every second layer, two for a token. Not published, and stood in for:

- **The decoder's shapes.** Those of open models of Llama's kind with as many parameters (`SHAPES`).
- **The C-Abstractor's shapes.** Those of Honeybee, from which MM1 has it: three blocks on each side of the mean, 1,024
  channels, a learned position at each feature, two linear layers with SiLU.
- **Which state of the encoder is taken.** The last, behind its final norm.
- **Marks of sub-images.** None stand between them; the paper compares several and needs none.
- **Norms of queries and keys in the models of experts.** transformers' decoder with experts in every second layer has
  them (`qwen3_moe`). Its balance loss has the published weight, .01; it has no z-loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.errors import UserError
from unimm.families.common import CLIP_MEAN, CLIP_STD, UNDRAWN

TILE_SIDE, PATCH = 672, 14  # pixels of a sub-image, and of a feature
CELLS = 12  # tokens a side of a sub-image
LEAST, MOST, MOST_AT_INFERENCE = 4, 9, 16  # sub-images
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "30B": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
            "num_key_value_heads": 52},
}  # fmt: skip
"""Stand-ins for the dense decoders."""
EXPERTS = {"1B-MoE": "1B", "3B-MoE": "3B"}
"""Models of experts, and the dense ones whose feed-forward layers each expert starts as."""
SIZES = (*SHAPES, *EXPERTS)


def parts(size: str, vocabulary: int, feature: int, most: int = MOST) -> dict[str, Any]:
    """Return a model of a published size as fields of `UniMMConfig`.

    Args:
        size: one of `SIZES`.
        vocabulary: tokens of the text tokenizer.
        feature: the token of it that stands where a feature goes.
        most: sub-images of an image; 9 as in training, or 16 as the paper has it at inference.

    Raises:
        UserError: there is no such size.
    """
    return {
        "decoder": decoder(size, vocabulary),
        "views": views(most),
        "encoder": encoder(),
        "reducer": {"kind": "abstract", "side": CELLS, "width": 1024, "depth": 3, "positions": True},
        "connector": {"kind": "mlp", "depth": 2, "act": "silu"},
        "layout": layout(vocabulary, feature),
        "tie_word_embeddings": True,
    }


def decoder(size: str, vocabulary: int) -> dict[str, Any]:
    """Return the stand-in for a decoder; arguments and errors are those of `parts`."""
    if size not in SIZES:
        raise UserError(f"size: {size!r}; one of {', '.join(SIZES)}")
    shape = SHAPES[EXPERTS.get(size, size)]
    common = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **shape,
    }
    if size not in EXPERTS:
        return {"model_type": "llama", **common}
    return {
        "model_type": "qwen3_moe",
        **common,
        "moe_intermediate_size": shape["intermediate_size"],
        "num_experts": 64,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }


def views(most: int = MOST) -> dict[str, Any]:
    """Return how an image is cut: the paper's equation 1, each sub-image and the whole at its own ratio."""
    return {
        "kind": "canvas",
        "tile": TILE_SIDE,
        "most": most,
        "least": LEAST,
        "choose": "pad",
        "place": "centre",
        "whole": "last",
        "whole_place": "centre",
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }


def encoder() -> dict[str, Any]:
    """Return CLIP's ViT-H/14 at 672 pixels; weights at 378 fit once their positions are `interpolated`."""
    return {
        "kind": "timm",
        "name": "vit_huge_patch14_clip_quickgelu_378",
        "tokens": (TILE_SIDE // PATCH) ** 2,
        "width": 1280,
        "kwargs": {
            "img_size": TILE_SIDE,
            "patch_size": PATCH,
            "embed_dim": 1280,
            "depth": 32,
            "num_heads": 16,
        },
    }


def layout(vocabulary: int, feature: int, cells: int = CELLS) -> dict[str, Any]:
    """Return the grammar of an image: the features of each sub-image, then of the whole, and nothing between them."""
    picture = {"tile": (cells, cells), "whole_at": "last"}
    return {
        "begin": None,
        "end": None,
        "feature": feature,
        "code": vocabulary,
        "grid": UNDRAWN,
        "picture": picture,
    }


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Return CLIP's learned positions for another size of image, bicubic as transformers has them.

    Args:
        positions: [1 + n², C], the first of no patch.
        side: patches a side of the other size.

    Returns:
        [1 + side², C].
    """
    first, table = positions[:1], positions[1:]
    before = round(len(table) ** 0.5)
    if before == side:
        return positions
    raster = table.unflatten(0, (before, before)).permute(2, 0, 1)[None].to(torch.float32)
    resized = F.interpolate(raster, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, resized[0].flatten(1).T.to(table.dtype)])

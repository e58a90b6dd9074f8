"""Baichuan-Omni's image side: version 1.0 on a canvas of tiles, and 1.5, which sees as Qwen2-VL does.

Sources: Li et al. 2024 (arXiv 2410.08565) for 1.0; for 1.5 the model code and `config.json` of
baichuan-inc/Baichuan-Omni-1.5 (`visual_modeling_omni.py`, `processor_omni.py`, `modeling_omni.py`).

No weights or code of 1.0 were published, so no checkpoint of it is read here: `parts` gives the model as fields of
`UniMMConfig`. Published are SigLIP-so400m at 384 pixels, tiles and the whole image as in LLaVA's AnyRes, and 182 tokens
a tile from a mean of two by two features and two linear layers. Not published, and stood in for:

- **The decoder.** Its shapes are those of Baichuan 2 7B, the authors' earlier model, as a decoder of Llama's kind.
- **How 27 x 27 features become 182 tokens.** Rows in pairs, the odd one left out, and columns in pairs, the odd one a
  token of its own: 13 x 14.
- **How many tiles there are at most, and what stands around them.** Nine; one token before an image, one after it.

1.5 has Qwen2-VL's encoder and merger, positions that are counted, and Qwen2.5's decoder. Audio and video are left out.
"""

from __future__ import annotations

from typing import Any

from unimm.families.common import CLIP_MEAN, CLIP_STD, UNDRAWN

TILE_SIDE, FEATURES = 384, 27  # pixels a side of a tile, and features
CELLS = (13, 14)  # rows and columns of tokens
MOST = 9  # tiles
TURNS_15 = {"user": "<C_Q>", "assistant": "<C_A>", "end": "<|endoftext|>", "bos": "never"}
"""The turns of 1.5, as fields of `Turns`; a system's message stands behind `<B_SYS>`."""


def parts(vocabulary: int, begin: int, end: int, feature: int) -> dict[str, Any]:
    """Return version 1.0 as fields of `UniMMConfig`.

    Args:
        vocabulary: tokens of the text tokenizer.
        begin: the token of it that opens an image.
        end: the one that closes it.
        feature: the one that stands where a feature goes.
    """
    return {
        "decoder": {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
        },
        "views": {
            "kind": "canvas",
            "tile": TILE_SIDE,
            "most": MOST,
            "choose": "scale",
            "place": "centre",
            "whole": "first",
        },
        "encoder": {
            "kind": "timm",
            "name": "vit_so400m_patch14_siglip_384",
            "tokens": FEATURES**2,
            "width": 1152,
            "kwargs": {
                "img_size": TILE_SIDE,
                "patch_size": 14,
                "embed_dim": 1152,
                "depth": 27,
                "num_heads": 16,
            },
        },
        "reducer": {"kind": "mean", "side": 2},
        "connector": {"kind": "mlp", "depth": 2},
        "layout": layout(vocabulary, begin, end, feature),
    }


def layout(
    vocabulary: int, begin: int, end: int, feature: int, cells: tuple[int, int] = CELLS
) -> dict[str, Any]:
    """Return the grammar of an image of 1.0: the whole, then its tiles, between two tokens."""
    return {
        "begin": begin,
        "end": end,
        "feature": feature,
        "code": vocabulary,
        "grid": UNDRAWN,
        "picture": {"tile": cells, "whole_at": "first"},
    }


def parts_15() -> dict[str, Any]:
    """Return version 1.5 without audio and video as fields of `UniMMConfig`, as its `config.json` has them."""
    patch, merge, width = 14, 2, 1280
    return {
        "decoder": {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
        "views": {
            "kind": "area",
            "stride": patch * merge,
            "least": 3136,
            "most": 3211264,
            "mean": CLIP_MEAN,
            "std": CLIP_STD,
        },
        "encoder": {
            "kind": "naflex",
            "width": width,
            "depth": 32,
            "heads": 16,
            "patch": patch,
            "frames": 2,
            "mlp_ratio": 4.0,
        },
        "reducer": {"kind": "join", "side": merge},
        "connector": {
            "kind": "mlp",
            "depth": 2,
            "width": width * merge**2,
            "norm": "layer",
            "norm_at": "feature",
        },
        "layout": {"begin": 151679, "end": 151680, "feature": 151681, "code": 152064, "grid": UNDRAWN},
        "conversation": TURNS_15,
    }

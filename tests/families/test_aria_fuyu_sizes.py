"""The published sizes of Aria and Fuyu, read from their configs and built without memory, hold as many weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests.families.aria_checkpoints import text_tokenizer as aria_tokenizer
from tests.families.fuyu_checkpoints import text_tokenizer as fuyu_tokenizer
from unimm.families.source import Checkpoint
from unimm.models.experts import idle_weights
from unimm.models.modeling import UniMMModel

# as published in rhymes-ai/Aria's config.json, the first release
ARIA: dict[str, Any] = {
    "architectures": ["AriaForConditionalGeneration"],
    "auto_map": {"AutoConfig": "modeling_aria.AriaConfig"},
    "image_token_index": 9,
    "model_type": "aria",
    "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 13568, "max_position_embeddings": 65536, "model_type": "aria_moe_lm",
        "moe_intermediate_size": 1664, "moe_num_experts": 64, "moe_topk": 6, "num_attention_heads": 20,
        "num_hidden_layers": 28, "num_key_value_heads": 20, "rope_theta": 5000000, "vocab_size": 100352,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "aria_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip

# as published in adept/fuyu-8b's config.json
FUYU: dict[str, Any] = {
    "architectures": ["FuyuForCausalLM"], "model_type": "fuyu", "hidden_act": "relu2", "hidden_size": 4096,
    "image_size": 300, "intermediate_size": 16384, "layer_norm_eps": 1e-5, "max_position_embeddings": 16384,
    "num_attention_heads": 64, "num_channels": 3, "num_hidden_layers": 36, "patch_size": 30, "qk_layernorm": True,
    "rope_scaling": None, "rope_theta": 25000.0, "tie_word_embeddings": False, "vocab_size": 262144,
}  # fmt: skip


def skeleton(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> UniMMModel:
    """The model of a config and a text tokenizer, without weights."""
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    described = Checkpoint(folder).config
    with torch.device("meta"):
        return UniMMModel(described)


def test_aria(tmp_path: Path) -> None:
    model = skeleton(tmp_path, ARIA, aria_tokenizer())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    after = 2 * 1152  # the norm behind the encoder, which transformers builds and nothing reads
    assert sizes["vision"] + after == 417_792_240
    assert sizes["connector"] == 20_427_136
    assert sum(sizes.values()) + after == 25_307_311_216
    body = model.decoder.get_decoder()
    # 3.5 billion are published as those of a token; the tables of both ends are beside that
    layer = 4 * 2560**2 + (6 + 2) * 3 * 2560 * 1664 + 64 * 2560 + 2 * 2560
    assert sizes["decoder"] - 2 * 100_352 * 2560 - idle_weights(body) == 28 * layer + 2560 == 3_601_349_120
    assert model.seeing.tokens(980, 980) == model.seeing.tokens(336, 980) == (1, 256)


def test_fuyu(tmp_path: Path) -> None:
    model = skeleton(tmp_path, FUYU, fuyu_tokenizer())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    assert sizes["vision"] == 11_063_296 and sizes["connector"] == 0
    assert sum(sizes.values()) == 9_408_238_592
    assert model.seeing.tokens(1080, 1920) == (36, 64)
    assert model.decoder.config.rope_parameters["partial_rotary_factor"] == 0.5

"""The configurations of published sizes, as the hub's `config.json` says them, and what is known of each model.

What transformers writes into every config and nothing reads (samplers, labels, versions) is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class PublishedSize:
    """A published size of a system.

    Attributes:
        name: as the hub has it.
        file: the name of the file that describes it.
        document: what stands in it.
        total: parameters, each counted once.
        vision: of these, of the encoder and what brings its features to the decoder's width.
        tokens: the special tokens that its text tokenizer has for images, and their ids.
        preprocessor: what stands in `preprocessor_config.json`, as far as it matters.
        stored: parameters that its files have and the model does not have here.
    """

    name: str
    document: Mapping[str, Any]
    total: int
    vision: int
    tokens: Mapping[str, int]
    file: str = "config.json"
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stored: int = 0

    def text_tokenizer(self) -> PreTrainedTokenizerFast:
        """Its special tokens at their ids, and a word beside them."""
        backend = Tokenizer(models.WordLevel({"word": 0, **self.tokens}, unk_token="word"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="word", eos_token="word")
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        return tokenizer


_PIXTRAL_TOKENS = {"[IMG]": 10, "[IMG_BREAK]": 12, "[IMG_END]": 13}
PIXTRAL_12B = PublishedSize(
    "mistral-community/pixtral-12b",
    {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
        "image_seq_length": 1, "image_token_index": 10, "projector_hidden_act": "gelu",
        "text_config": {
            "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 1024000,
            "model_type": "mistral", "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
        },
        "vision_config": {
            "head_dim": 64, "hidden_act": "silu", "image_size": 1024, "model_type": "pixtral", "patch_size": 16,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "torch_dtype": "bfloat16",
    },
    total=12_682_739_712,
    vision=403_489_792 + 31_467_520,
    tokens=_PIXTRAL_TOKENS,
)  # fmt: skip
PIXTRAL_12B_ORIGINAL = PublishedSize(
    "mistralai/Pixtral-12B-2409",
    {
        "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
        "norm_eps": 1e-5, "rope_theta": 1e9, "vocab_size": 131072,
        "vision_encoder": {
            "hidden_size": 1024, "num_channels": 3, "image_size": 1024, "patch_size": 16, "rope_theta": 10000.0,
            "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_token_id": 10,
        },
    },
    total=12_682_739_712,
    vision=403_489_792 + 31_467_520,
    tokens=_PIXTRAL_TOKENS,
    file="params.json",
)  # fmt: skip


def _qwen2_vl(tied: bool, width: int, **sizes: int) -> dict[str, Any]:
    """One of the three, which differ in sizes alone."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
        "video_token_id": 151656, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768,
        "use_sliding_window": False, "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "hidden_size": width,
        **sizes,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": width,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip


_QWEN2_VL: dict[str, Any] = {
    "tokens": {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
               "<|image_pad|>": 151655},
    "preprocessor": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
}  # fmt: skip
QWEN2_VL_2B = PublishedSize(
    "Qwen/Qwen2-VL-2B-Instruct",
    _qwen2_vl(True, 1536, intermediate_size=8960, num_hidden_layers=28, max_window_layers=28,
              num_attention_heads=12, num_key_value_heads=2, vocab_size=151936),
    total=2_208_985_600, vision=665_271_296, **_QWEN2_VL,
)  # fmt: skip
QWEN2_VL_7B = PublishedSize(
    "Qwen/Qwen2-VL-7B-Instruct",
    _qwen2_vl(False, 3584, intermediate_size=18944, num_hidden_layers=28, max_window_layers=28,
              num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
    total=8_291_375_616, vision=675_759_104, **_QWEN2_VL,
)  # fmt: skip
QWEN2_VL_72B = PublishedSize(
    "Qwen/Qwen2-VL-72B-Instruct",
    _qwen2_vl(False, 8192, intermediate_size=29568, num_hidden_layers=80, max_window_layers=80,
              num_attention_heads=64, num_key_value_heads=8, vocab_size=152064),
    total=73_405_560_320, vision=699_356_672, **_QWEN2_VL,
)  # fmt: skip
NVLM_D_72B = PublishedSize(
    "nvidia/NVLM-D-72B",
    {
        "architectures": ["NVLM_D"], "model_type": "NVLM_D",
        "auto_map": {
            "AutoConfig": "configuration_nvlm_d.NVLM_D_Config", "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
            "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
        },
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448, "max_dynamic_patch": 6,
        "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1, "template": "chatml",
        "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0, "use_thumbnail": True,
        "llm_config": {
            "_name_or_path": "Qwen/Qwen2-72B-Instruct", "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 29568,
            "max_position_embeddings": 32768, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 64,
            "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
            "rope_scaling": {"factor": 3.0, "type": "dynamic"}, "rope_theta": 1000000.0,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 152064,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0, "dropout": 0.0,
            "hidden_act": "gelu", "hidden_size": 3200, "image_size": 448, "initializer_factor": 0.1,
            "initializer_range": 1e-10, "intermediate_size": 12800, "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b", "norm_type": "rms_norm", "num_attention_heads": 25, "num_channels": 3,
            "num_hidden_layers": 45, "patch_size": 14, "qk_normalization": True, "qkv_bias": False,
            "torch_dtype": "bfloat16", "use_flash_attn": True,
        },
    },
    total=78_863_416_704,
    vision=5_536_496_000 + 620_717_056,
    tokens={"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_pad|>": 151654},
    # seven heads that give nothing: of query, key, value and output, and of the norms of query and key
    stored=45 * (4 * 3200 + 2) * 7 * 128,
)  # fmt: skip
_MOLMO_TOWER = (
    23 * (12 * 1024**2 + 13 * 1024) + (14 * 14 * 3 + 577 + 3) * 1024  # blocks; patches, positions, class and norm
    + 2 * 2048 + 3 * (2048 + 1) * 1024 + (1024 + 1) * 1024  # padding and pooling
)  # fmt: skip


def _molmo(name: str, total: int, first: int, **sizes: Any) -> PublishedSize:
    """One of those with a dense decoder; `first`: the id of the first special token of images."""
    document = {
        "architectures": ["MolmoForCausalLM"], "model_type": "molmo",
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig", "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "attention_layer_norm": False, "clip_qkv": None, "initializer_range": 0.02, "layer_norm_type": "rms",
        "max_position_embeddings": 4096, "norm_after": False, "qkv_bias": True, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True, "use_position_ids": True,
        "weight_tying": False, "vocab_size": first, **sizes,
    }  # fmt: skip
    return PublishedSize(
        name,
        document,
        total,
        _MOLMO_TOWER + sizes["intermediate_size"] // 2 * (2 * 1024 + sizes["hidden_size"]),
        {name: first + i for i, name in enumerate(("<im_start>", "<im_end>", "<im_patch>", "<im_col>"))},
        preprocessor={"base_image_input_size": [336, 336], "image_patch_size": 14, "max_crops": 12,
                      "overlap_margins": [4, 4], "image_padding_mask": True},
    )  # fmt: skip


MOLMO_7B_D = _molmo(
    "allenai/Molmo-7B-D-0924", 8_021_025_280, 152064, embedding_size=152064, hidden_size=3584,
    intermediate_size=37888, layer_norm_eps=1e-6, num_attention_heads=28, num_hidden_layers=28,
    num_key_value_heads=4,
)  # fmt: skip
MOLMO_72B = _molmo(
    "allenai/Molmo-72B-0924", 73_308_285_952, 152064, embedding_size=152064, hidden_size=8192,
    intermediate_size=59136, layer_norm_eps=1e-5, num_attention_heads=64, num_hidden_layers=80,
    num_key_value_heads=8,
)  # fmt: skip
MOLMO_7B_O = _molmo(
    "allenai/Molmo-7B-O-0924", 7_665_032_192, 100278, embedding_size=100352, hidden_size=4096,
    intermediate_size=22016, layer_norm_eps=1e-6, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=None, attention_layer_norm=True, norm_after=True, qkv_bias=False, rope_theta=500000.0,
)  # fmt: skip
_LLAMA_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def _llama_vision(name: str, total: int, vision: int, side: int, **sizes: Any) -> PublishedSize:
    """One of those that differ in the side of a tile and the sizes of the decoder."""
    return PublishedSize(
        name,
        {
            "architectures": ["MllamaForConditionalGeneration"], "image_token_index": 128256, "model_type": "mllama",
            "text_config": {
                "bos_token_id": 128000, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "dropout": 0,
                "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
                "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
                "model_type": "mllama_text_model", "num_attention_heads": 32, "num_hidden_layers": 40,
                "num_key_value_heads": 8, "pad_token_id": 128004, "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA_ROPE,
                "rope_theta": 500000.0, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256, **sizes,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {
                "attention_heads": 16, "hidden_act": "gelu", "hidden_size": 1280, "image_size": side,
                "intermediate_layers_indices": [3, 7, 15, 23, 30], "intermediate_size": 5120, "max_num_tiles": 4,
                "model_type": "mllama_vision_model", "norm_eps": 1e-5, "num_channels": 3, "num_global_layers": 8,
                "num_hidden_layers": 32, "patch_size": 14,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
                "torch_dtype": "bfloat16", "vision_output_dim": 7680,
            },
        },
        total,
        vision + 7681 * sizes.get("hidden_size", 4096),
        {"<|image|>": 128256},
        preprocessor={"max_image_tiles": 4, "size": {"height": side, "width": side}, "do_pad": True, "resample": 2},
    )  # fmt: skip


LLAMA_11B = _llama_vision("meta-llama/Llama-3.2-11B-Vision-Instruct", 10_670_220_835, 863_567_379, 560)
LLAMA_11B_BASE = _llama_vision("meta-llama/Llama-3.2-11B-Vision", 10_642_941_475, 836_288_019, 448)
LLAMA_90B = _llama_vision(
    "meta-llama/Llama-3.2-90B-Vision-Instruct", 88_593_355_323, 863_567_379, 560, hidden_size=8192,
    intermediate_size=28672, num_hidden_layers=100, num_attention_heads=64,
    cross_attention_layers=list(range(3, 100, 5)),
)  # fmt: skip
LLAMA_11B_ORIGINAL = PublishedSize(
    "meta-llama/Llama-3.2-11B-Vision-Instruct/original",
    {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
        "vision_chunk_size": 560, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8,
    },
    total=LLAMA_11B.total,
    vision=LLAMA_11B.vision,
    tokens=LLAMA_11B.tokens,
    file="params.json",
    # tables of 4 x 4 cells, where here there are 9 arrangements of 4 tiles
    stored=(4 * 4 - 9 * 4) * (1601 + 1 + 1) * 1280,
)  # fmt: skip
PUBLISHED = (
    PIXTRAL_12B, PIXTRAL_12B_ORIGINAL, QWEN2_VL_2B, QWEN2_VL_7B, QWEN2_VL_72B, NVLM_D_72B, MOLMO_7B_D, MOLMO_72B,
    MOLMO_7B_O, LLAMA_11B, LLAMA_11B_BASE, LLAMA_90B, LLAMA_11B_ORIGINAL,
)  # fmt: skip

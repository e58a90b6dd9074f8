"""Small Qwen2-VL checkpoints with unusual shapes: as transformers saves them, and with the published config.

The published folders have the decoder's settings at the top of `config.json`, and bounds on pixels where transformers
has a size; their weights have the names that transformers still writes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.families.survey import Oracle, Reference, byte_tokenizer, odd_vocabulary, randomise

PATCH = 10  # pixels; two by two patches make a token, so sides are multiples of 20
BOUNDS = (40 * 40, 20 * 20 * 30)  # pixels of an image: at least 4 tokens, at most 30
SECTIONS = [1, 3, 2]  # frequencies turned by time, row and column
# as published: ChatML, a system's message of its own where there is none, images counted if asked for
TEMPLATE = """
{%- set images = namespace(seen=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set images.seen = images.seen + 1 -%}
{%- if add_vision_id is defined and add_vision_id -%}{{- 'Picture ' + images.seen | string + ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
LAST = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


class Qwen2VLOracle(Oracle):
    """The class keeps how far positions run behind tokens from one call to the next: cleared here."""

    def reset(self) -> None:
        self.model.model.rope_deltas = None


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen2-VL's special tokens at its last ids; it has no begin token."""
    return byte_tokenizer((), LAST, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def make(tied: bool = False) -> Oracle:
    """Odd depths, grouped queries, a tower of another width than the decoder; tied: as the 2B is."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": odd_vocabulary(tokenizer), "hidden_size": 72, "intermediate_size": 88,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e5, "mrope_section": SECTIONS},
        },
        vision_config={
            "depth": 3, "embed_dim": 48, "num_heads": 3, "hidden_size": 72, "mlp_ratio": 3, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    randomise(model)
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=TEMPLATE
    )
    return Qwen2VLOracle(
        model, processor, placeholders=(ids["<|image_pad|>"],), eos_token_id=ids["<|im_end|>"]
    )


def hub(oracle: Oracle, folder: Path) -> None:
    """Write the published form: the decoder's settings at the top of the config, and the template twice."""
    text, vision = oracle.model.config.text_config, oracle.model.config.vision_config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "use_sliding_window",
        "bos_token_id", "eos_token_id",
    )  # fmt: skip
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{name: getattr(text, name) for name in names},
        **{name: getattr(oracle.model.config, name) for name in marks},
        "vision_token_id": oracle.tokenizer.get_vocab()["<|vision_pad|>"],
        "max_window_layers": text.num_hidden_layers,
        "sliding_window": 32768,
        "tie_word_embeddings": text.tie_word_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS},
        "torch_dtype": "float32",
        "vision_config": {
            "depth": vision.depth, "embed_dim": vision.embed_dim, "mlp_ratio": vision.mlp_ratio,
            "num_heads": vision.num_heads, "in_chans": 3, "hidden_size": vision.hidden_size,
            "patch_size": PATCH, "spatial_merge_size": 2, "spatial_patch_size": PATCH, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    images = {
        "min_pixels": BOUNDS[0], "max_pixels": BOUNDS[1], "patch_size": PATCH,
        "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip
    oracle.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    ends = [oracle.eos_token_id, oracle.tokenizer.pad_token_id]
    generation = {"pad_token_id": oracle.tokenizer.pad_token_id, "eos_token_id": ends, "do_sample": True,
                  "top_k": 1, "top_p": 0.001, "temperature": 0.01}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _weights(oracle, folder / "model.safetensors")


def _weights(oracle: Oracle, file: Path) -> None:
    weights = {}
    for name, tensor in oracle.model.state_dict().items():
        if name == "lm_head.weight" and oracle.model.config.text_config.tie_word_embeddings:
            continue
        name = name.removeprefix("model.").replace("language_model.", "model.", 1)
        weights[name] = tensor.clone()
    save_file(weights, file, metadata={"format": "pt"})


TRAINED = (
    "model.visual.patch_embed.proj.weight",
    "model.visual.blocks.1.attn.qkv.weight",
    "model.visual.merger.ln_q.weight",
    "model.language_model.layers.2.self_attn.k_proj.bias",
    "model.language_model.embed_tokens.weight",
)
LAYOUTS = {"transformers": Oracle.save, "hub": hub}
QWEN2_VL = Reference("qwen2_vl", make, LAYOUTS, (*TRAINED, "lm_head.weight"))
QWEN2_VL_TIED = Reference("qwen2_vl_tied", partial(make, tied=True), LAYOUTS, TRAINED)

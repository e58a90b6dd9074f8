"""Small NVLM-D checkpoints with unusual shapes, in the published layout, written by hand, key by key.

transformers has no class of NVLM-D. InternVL's is one with two differences, mended here: between the layers of its
projector it is as wide as the decoder's states, where NVLM-D's is as wide as the decoder's feed-forward and has no
biases; and its processor knows no tile tags. The published tower has seven more heads than its config says, so that
eight devices can share them: they give nothing, and neither they nor their number are in the oracle or the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.families.survey import (
    Inputs,
    Oracle,
    Pictures,
    Reference,
    byte_tokenizer,
    odd_vocabulary,
    randomise,
)

TILE, PATCH = 30, 5  # pixels: 6 x 6 patches, two by two of which make one of 9 tokens
TOKENS = 9  # of a tile
MOST = 6  # tiles of an image, the whole one not counted
DUMMY = 7  # heads that the published attention has beyond its own
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# ChatML; as the published code has it, an image is a word and a line break before the question
TEMPLATE = """
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}
{%- else -%}{{- part['text'] -}}
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


class NvlmOracle(Oracle):
    """Writes an image as the published code does: each tile behind its tag, the whole image last."""

    def inputs_of(self, texts: Sequence[str], images: Sequence[Pictures]) -> Inputs:
        flat = [image for own in images for image in own]
        seen = self.pixels(flat) if flat else {}
        counts = iter(seen.pop("num_patches").tolist() if flat else [])
        written = [re.sub("<image>", lambda _: image_words(next(counts)), text) for text in texts]
        assert next(counts, None) is None
        rows = self.tokenizer(written, padding=True, padding_side="left", return_tensors="pt")
        return {name: rows[name] for name in ("input_ids", "attention_mask")} | seen


def image_words(views: int) -> str:
    """An image of so many views, the whole one being the last, in the words of the published code."""
    tags = [f"<tile_{number}>" for number in range(1, views)] + ["<tile_global_thumbnail>"]
    return "<Image>" + "".join(tag + "<|vision_pad|>" * TOKENS for tag in tags) + "</Image>"


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen2.5's special tokens at its last ids; the tags of tiles are words to it."""
    return byte_tokenizer(
        (),
        LAST,
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<|vision_pad|>",
            "video_token": "<|video_pad|>",
        },
    )


def make() -> Oracle:
    """Odd depths, grouped queries, an odd number of heads."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = InternVLConfig(
        vision_config={
            "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 56,
            "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "norm_type": "rms_norm",
            "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": True, "layer_norm_eps": 1e-6,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": odd_vocabulary(tokenizer), "hidden_size": 72,
            "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 2e5},
        },
        image_token_id=ids["<|vision_pad|>"], image_seq_length=TOKENS, downsample_ratio=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    projector.linear_1 = nn.Linear(4 * 48, 88, bias=False)
    projector.linear_2 = nn.Linear(88, 72, bias=False)
    randomise(model, std=0.15)
    images = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=MOST,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=TOKENS, chat_template=TEMPLATE
    )
    return NvlmOracle(model, processor, placeholders=(ids["<|vision_pad|>"],), eos_token_id=ids["<|im_end|>"])


def hub(oracle: Oracle, folder: Path) -> dict[str, Tensor]:
    """Write the published folder, its weights in two files; returns them."""
    weights = hub_weights(oracle.model.state_dict(), oracle.model.config.vision_config)
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, chosen in shards.items():
        save_file({name: weights[name] for name in chosen}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, chosen in shards.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(oracle)))
    plain = PreTrainedTokenizerFast(
        tokenizer_object=oracle.tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    plain.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return weights


def hub_weights(state: dict[str, Tensor], vision: Any) -> dict[str, Tensor]:
    """All weights under their published names, the dummy heads added."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            parts = [widened(state[name.replace("q_proj", f"{part}_proj")], vision, 0) for part in "qkv"]
            tensor = torch.cat(parts)
        elif re.search(r"\.attention\.[qk]_norm\.", name):
            tensor = widened(tensor, vision, 0)
        elif name.endswith(".attention.projection_layer.weight"):
            tensor = widened(tensor, vision, 1)
        weights[_name(name)] = tensor.contiguous().clone()
    return weights


def widened(tensor: Tensor, vision: Any, axis: int) -> Tensor:
    """A tensor of all heads with the dummy ones behind them: zeros."""
    more = list(tensor.shape)
    more[axis] = DUMMY * (vision.hidden_size // vision.num_attention_heads)
    return torch.cat([tensor, torch.zeros(more)], dim=axis)


def _name(name: str) -> str:
    """The published name of one of transformers'."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    projector = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    if found := re.fullmatch(r"multi_modal_projector\.(\w+)\.(\w+)", name):
        return f"mlp1.{projector[found[1]]}.{found[2]}"
    embeddings = {"cls_token": "class_embedding", "position_embeddings": "position_embedding",
                  "patch_embeddings.projection": "patch_embedding"}  # fmt: skip
    layers = {"attention.q_proj": "attn.qkv", "attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm",
              "attention.projection_layer": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
              "lambda_1": "ls1", "lambda_2": "ls2"}  # fmt: skip
    name = name.replace("vision_tower.encoder.layer.", "vision_model.encoder.layers.")
    name = name.replace("vision_tower.embeddings.", "vision_model.embeddings.")
    for theirs, ours in (embeddings if ".embeddings." in name else layers).items():
        name = name.replace(f".{theirs}", f".{ours}")
    return name


def _config(oracle: Oracle) -> dict[str, Any]:
    """As published: the decoder says it is llama's, though its class is Qwen2's; no word of dummy heads."""
    text, vision = oracle.model.config.text_config, oracle.model.config.vision_config
    names = (
        "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    return {
        "architectures": ["NVLM_D"],
        "auto_map": {
            "AutoConfig": "configuration_nvlm_d.NVLM_D_Config",
            "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
            "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
        },
        "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": TILE,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"], "attention_bias": True, "model_type": "llama",
            **{name: getattr(text, name) for name in names}, "pad_token_id": None,
            "rope_scaling": {"factor": 3.0, "type": "dynamic"}, "rope_theta": text.rope_parameters["rope_theta"],
            "tie_word_embeddings": False, "torch_dtype": "float32",
        },
        "max_dynamic_patch": MOST, "min_dynamic_patch": 1, "model_type": "NVLM_D", "ps_version": "v2",
        "select_layer": -1, "template": "chatml", "torch_dtype": "float32", "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"], "hidden_act": "gelu", "hidden_size": vision.hidden_size,
            "image_size": TILE, "intermediate_size": vision.intermediate_size, "layer_norm_eps": 1e-6,
            "initializer_factor": 0.1, "model_type": "intern_vit_6b", "norm_type": "rms_norm", "num_channels": 3,
            "num_attention_heads": vision.num_attention_heads, "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": PATCH, "qk_normalization": True, "qkv_bias": False, "torch_dtype": "float32",
        },
    }  # fmt: skip


NVLM = Reference(
    "nvlm",
    make,
    {"hub": hub},
    trained=(
        "model.vision_tower.embeddings.patch_embeddings.projection.weight",
        "model.vision_tower.encoder.layer.1.attention.q_norm.weight",
        "model.vision_tower.encoder.layer.2.lambda_1",
        "model.multi_modal_projector.linear_1.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.2.self_attn.k_proj.bias",
    ),
)

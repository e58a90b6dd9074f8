"""Small Janus checkpoints with unusual shapes: by transformers' own classes, and in the original layout.

The original layout is written here by hand, key by key, so that it shares nothing with the map under test.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from unimm.data.text_tokenizer import train_text_tokenizer

SIDE = 32  # pixels
# as published: an image is followed by a line break, and all but the first come after one too
TEMPLATE = """
{%- for message in messages -%}
{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}{{ ('' if loop.first else '\\n') + '<image_placeholder>' + ('' if loop.last else '\\n') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt or not loop.last -%}{{ '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}
"""


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of Janus's."""
    texts = ["a red apple on a blue background", "what is this? it is: a You are a helpful assistant.\n\n"]
    trained = train_text_tokenizer(texts, 320)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        bos_token=trained.bos_token,
        eos_token=trained.eos_token,
        pad_token=trained.pad_token,
        extra_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|User|>", "<|Assistant|>"]})
    return tokenizer


def janus(folder: Path, tied: bool = False) -> JanusForConditionalGeneration:
    """Write a checkpoint of transformers' layout: grouped queries, odd depths, three VQ levels."""
    torch.manual_seed(0)
    tokenizer = text_tokenizer()
    vocabulary = tokenizer.get_vocab()
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer) + 3, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
        ),
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIDE,
            "patch_size": 8, "mlp_ratio": 3.0, "projection_dim": 48, "num_image_tokens": 16, "depth": 3,
            "initializer_range": 0.2,
        },
        vq_config={
            "embed_dim": 5, "num_embeddings": 70, "latent_channels": 12, "base_channels": 32,
            "channel_multiplier": [1, 2, 3, 3], "num_res_blocks": 1, "projection_dim": 48, "num_hidden_layers": 2,
            "image_token_embed_dim": 48,
        },
        image_token_id=vocabulary["<image_placeholder>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a swapped one would not be seen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": vocabulary["<begin_of_image>"]},
        max_length=256,
    )
    images = JanusImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5, 0.5, 0.5], image_std=[0.4, 0.5, 0.6]
    )
    processor = JanusProcessor(
        images, tokenizer, chat_template=TEMPLATE, use_default_system_prompt=True, num_image_tokens=16
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return model


def original(folder: Path, model: JanusForConditionalGeneration, binary: bool = False) -> dict[str, Tensor]:
    """Write the same weights in the layout of the original repository; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (".self_attn.k_proj." in name and "vision_model" in name) or (
            ".self_attn.v_proj." in name and "vision_model" in name
        ):
            continue
        weights |= _original(name, tensor, state)
    weights["gen_vision_model.quantize.codebook_used"] = torch.arange(65536.0)
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        _sharded(folder, weights)
    _original_files(folder, model)
    return weights


def _original(name: str, tensor: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor under its original name."""
    if name == "lm_head.weight":
        return {"language_model.lm_head.weight": tensor}
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return {name.replace("language_model.", "language_model.model.", 1): tensor}
    if name.startswith("vision_model."):
        return _original_vision(name, tensor, state)
    if name.startswith("vqmodel."):
        return _original_codes(name, tensor)
    if found := re.fullmatch(r"(aligner|generation_aligner)\.(fc1|hidden_layers\.(\d+))\.(\w+)", name):
        prefix = "aligner" if found[1] == "aligner" else "gen_aligner"
        number = 0 if found[2] == "fc1" else 2 * int(found[3]) + 2
        return {f"{prefix}.layers.{number}.{found[4]}": tensor}
    name = name.replace("generation_embeddings", "gen_embed")
    name = name.replace("generation_head.proj_out", "gen_head.output_mlp_projector")
    return {name.replace("generation_head.vision_head", "gen_head.vision_head"): tensor}


def _original_vision(name: str, tensor: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    tower = "vision_model.vision_tower."
    name = name.removeprefix("vision_model.")
    if name == "embeddings.position_embedding.weight":
        return {f"{tower}pos_embed": tensor.unsqueeze(0)}
    name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("post_layernorm", "norm")
    name = name.replace("encoder.layers", "blocks").replace("layer_norm", "norm")
    if ".q_proj." in name:
        full = f"model.vision_model.{name}".replace("blocks", "encoder.layers")
        stacked = torch.cat([state[full.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        return {tower + name.replace("self_attn.q_proj", "attn.qkv"): stacked}
    return {tower + name.replace("self_attn.projection_layer", "attn.proj"): tensor}


def _original_codes(name: str, tensor: Tensor) -> dict[str, Tensor]:
    name = name.removeprefix("vqmodel.")
    for block, number in (("block_1", "0"), ("attn_1", "1"), ("block_2", "2")):
        name = name.replace(f"mid.{block}", f"mid.{number}")
    name = re.sub(r"(encoder\.down|decoder\.up)\.(\d+)\.block\.", r"\1.\2.res.", name)
    name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(
        "decoder.up.", "decoder.conv_blocks."
    )
    return {f"gen_vision_model.{name}": tensor}


def _sharded(folder: Path, weights: dict[str, Tensor]) -> None:
    names = list(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in halves.items():
        save_file({name: weights[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in halves.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _original_files(folder: Path, model: JanusForConditionalGeneration) -> None:
    text, vision, codes = model.config.text_config, model.config.vision_config, model.config.vq_config
    language = {
        key: getattr(text, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        )
    }  # fmt: skip
    config: dict[str, Any] = {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": {"model_type": "llama", **language},
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {
                "image_size": SIDE,
                "model_name": "siglip_tiny",
                "num_heads": vision.num_attention_heads,
            },
        },
        "aligner_config": {"cls": "MlpProjector", "params": {"depth": vision.depth, "n_embed": 48}},
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "params": {"depth": codes.num_hidden_layers, "n_embed": 48},
        },
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 70, "n_embed": 5}},
        "gen_head_config": {
            "cls": "vision_head",
            "params": {"image_token_embed": 48, "image_token_size": 70},
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps({"sft_format": "deepseek"}))
    preprocessor = {"image_size": SIDE, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    text_tokenizer().save_pretrained(folder)

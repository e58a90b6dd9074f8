"""Small Pixtral checkpoints with unusual shapes: by transformers' own classes, and in Mistral's original layout.

The original layout is written here by hand, key by key. Its rotary embedding turns neighbouring pairs of channels
where transformers turns halves, so the rows of the query and key projections stand in another order.
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.families.survey import Oracle, Reference, byte_tokenizer, odd_vocabulary, randomise

LONGEST = 96  # pixels
PATCH = 8  # pixels
# as published: the system's words stand in the last question, and an end token behind each answer
TEMPLATE = """
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- if messages[0]['content'] is string -%}{%- set system = messages[0]['content'] -%}
{%- else -%}{%- set system = messages[0]['content'][0]['text'] -%}{%- endif -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- '[INST]' -}}
{%- if loop.last and system is defined -%}{{- system + '\\n\\n' -}}{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '[IMG]' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '[/INST]' -}}
{%- else -%}
{%- if message['content'] is string -%}{{- message['content'] + eos_token -}}
{%- else -%}{{- message['content'][0]['text'] + eos_token -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
FIRST = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG_BREAK]", "[IMG]", "[IMG_END]")


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Pixtral's special tokens at its first ids, and `<s>` before every text."""
    usual = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = byte_tokenizer(FIRST, (), usual)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def make() -> Oracle:
    """Odd depths, grouped queries, heads of the decoder that are together wider than its states."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = LlavaConfig(
        vision_config={
            "model_type": "pixtral", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": LONGEST, "patch_size": PATCH,
            "hidden_act": "silu",  # as published; the class's own default is another
            "rope_parameters": {"rope_type": "axial", "rope_theta": 5e3},
        },
        text_config={
            "model_type": "mistral", "vocab_size": odd_vocabulary(tokenizer), "hidden_size": 40,
            "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 12, "max_position_embeddings": 1024, "sliding_window": None, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e5},
            "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"],
        },
        image_token_index=ids["[IMG]"], vision_feature_layer=-1, vision_feature_select_strategy="full",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    randomise(model)
    images = PixtralImageProcessorPil(
        size={"longest_edge": LONGEST}, patch_size={"height": PATCH, "width": PATCH}
    )
    processor = PixtralProcessor(images, tokenizer, patch_size=PATCH, chat_template=TEMPLATE)
    return Oracle(model, processor, placeholders=(ids["[IMG]"],), eos_token_id=ids["</s>"])


def original(oracle: Oracle, folder: Path) -> dict[str, Tensor]:
    """Write `consolidated.safetensors`, `params.json` and `tokenizer.json`; returns the weights."""
    config = oracle.model.config
    heads = {"vision": config.vision_config.num_attention_heads, "q": config.text_config.num_attention_heads,
             "k": config.text_config.num_key_value_heads}  # fmt: skip
    state = oracle.model.state_dict()
    weights = {_name(name): _rows(name, tensor, heads) for name, tensor in state.items()}
    assert len(weights) == len(state)
    save_file(weights, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(_params(oracle)))
    oracle.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return weights


def _rows(name: str, tensor: Tensor, heads: dict[str, int]) -> Tensor:
    """The rows of query and key projections as neighbouring pairs: channel i, then channel i + half, of a head."""
    found = re.search(r"\.([qk])_proj\.weight$", name)
    if found is None:
        return tensor.clone()
    count = heads["vision"] if "vision_tower" in name else heads[found[1]]
    low, high = tensor.unflatten(0, (count, 2, -1)).unbind(1)  # each [heads, half, width]
    return torch.stack([low, high], dim=2).flatten(0, 2).contiguous()


def _name(name: str) -> str:
    """The original name of one of transformers'."""
    layer = r"(?:transformer\.)?layers\.(\d+)\."
    if name.startswith("model.vision_tower."):
        name = name.removeprefix("model.vision_tower.")
        if found := re.fullmatch(layer + r"(attention|feed_forward|attention_norm|ffn_norm)\.(.+)", name):
            name = f"transformer.layers.{found[1]}.{found[2]}.{_short(found[3])}"
        return f"vision_encoder.{name}"
    if name.startswith("model.multi_modal_projector."):
        name = name.removeprefix("model.multi_modal_projector.")
        return "vision_language_adapter." + name.replace("linear_1", "w_in").replace("linear_2", "w_out")
    plain = {"lm_head.weight": "output.weight", "model.language_model.norm.weight": "norm.weight",
             "model.language_model.embed_tokens.weight": "tok_embeddings.weight"}  # fmt: skip
    if name in plain:
        return plain[name]
    parts = {"self_attn": "attention", "mlp": "feed_forward", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    found = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.(\w+)\.(.+)", name)
    assert found is not None, name
    return f"layers.{found[1]}.{parts[found[2]]}.{_short(found[3])}"


def _short(name: str) -> str:
    """The last part of a name within a layer: `q_proj.weight` -> `wq.weight`."""
    short = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
             "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # fmt: skip
    module, _, rest = name.partition(".")
    return f"{short[module]}.{rest}" if module in short else name


def _params(oracle: Oracle) -> dict[str, Any]:
    vision, text = oracle.model.config.vision_config, oracle.model.config.text_config
    ids = oracle.tokenizer.get_vocab()
    return {
        "dim": text.hidden_size, "n_layers": text.num_hidden_layers, "head_dim": text.head_dim,
        "hidden_dim": text.intermediate_size, "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads, "norm_eps": text.rms_norm_eps, "vocab_size": text.vocab_size,
        "rope_theta": text.rope_parameters["rope_theta"],
        "vision_encoder": {
            "hidden_size": vision.hidden_size, "num_channels": 3, "max_image_size": LONGEST,
            "patch_size": PATCH, "rope_theta": vision.rope_parameters["rope_theta"],
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads, "adapter_bias": True,
            "image_token_id": ids["[IMG]"], "image_break_token_id": ids["[IMG_BREAK]"],
            "image_end_token_id": ids["[IMG_END]"],
        },
    }  # fmt: skip


PIXTRAL = Reference(
    "pixtral",
    make,
    {"transformers": Oracle.save, "original": original},
    trained=(
        "model.vision_tower.patch_conv.weight",
        "model.vision_tower.transformer.layers.1.attention.q_proj.weight",
        "model.multi_modal_projector.linear_1.bias",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.2.self_attn.k_proj.weight",
        "lm_head.weight",
    ),
)

"""Small Aria checkpoints with unusual shapes: by transformers' own classes, and in the original repository's layout.

The tower has patches of 70 pixels, so that the two published sides, 490 and 980, make 7 x 7 and 14 x 14 of them. The
processor takes the side from each call and never from its folder; `sized` makes an oracle of the other side. Images
are not split into crops here, since the processor counts those of the batch's largest for every image.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AriaConfig, AriaForConditionalGeneration, AriaProcessor, PreTrainedTokenizerFast
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from tests.families.survey import Oracle, Reference, byte_tokenizer, odd_vocabulary, randomise

PATCH = 70  # pixels
TOKENS = {490: 5, 980: 11}  # of an image, by its side in pixels
# as published: ChatML without a system's message of its own
TEMPLATE = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<fim_prefix><|img|><fim_suffix>' -}}
{%- else -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
FIRST = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>",
    "<pad>", "<|img|>",
)  # fmt: skip


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Aria's special tokens at its first ids."""
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>",
             "image_token": "<|img|>"}  # fmt: skip
    return byte_tokenizer(FIRST, (), names)


def make() -> Oracle:
    """Odd depths, grouped queries, seven experts of which three are asked, at a side of 980."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = AriaConfig(
        vision_config={
            "model_type": "idefics3_vision", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": 980, "patch_size": PATCH,
        },
        text_config={
            "model_type": "aria_text", "vocab_size": odd_vocabulary(tokenizer), "hidden_size": 72,
            "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "moe_num_experts": 7, "moe_topk": 3, "moe_num_shared_experts": 2, "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 2e5},
            "bos_token_id": ids["<s>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"],
        },
        image_token_index=ids["<|img|>"], vision_feature_layer=-1,
        projector_patch_to_query_dict={(side // PATCH) ** 2: tokens for side, tokens in TOKENS.items()},
    )  # fmt: skip
    model = AriaForConditionalGeneration(config)
    randomise(model)
    images = AriaImageProcessorPil(max_image_size=980)
    options: dict[str, Any] = {"tokenizer": tokenizer, "size_conversion": TOKENS}
    processor = AriaProcessor(images, chat_template=TEMPLATE, **options)
    return Oracle(
        model, processor, placeholders=(ids["<|img|>"],), eos_token_id=ids["<|im_end|>"],
        drops=("token_type_ids", "num_crops"), image_options={"max_image_size": 980},
    )  # fmt: skip


def sized(oracle: Oracle, side: int) -> Oracle:
    """The same oracle, whose images have a side of 490 or 980 pixels."""
    return dataclasses.replace(oracle, image_options={"max_image_size": side})


def original(oracle: Oracle, folder: Path) -> dict[str, Tensor]:
    """Write the layout of rhymes-ai/Aria; returns the weights. Its tower has no norm behind the last layer."""
    state = oracle.model.state_dict()
    weights = {
        _name(name): tensor.clone() for name, tensor in state.items() if ".post_layernorm." not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(oracle)))
    images = {
        "auto_map": {"AutoImageProcessor": "vision_processor.AriaVisionProcessor",
                     "AutoProcessor": "processing_aria.AriaProcessor"},
        "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "AriaVisionProcessor", "image_std": [0.5, 0.5, 0.5],
        "max_image_size": 980, "min_image_size": 336, "processor_class": "AriaProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    plain = PreTrainedTokenizerFast(
        tokenizer_object=oracle.tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    plain.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return weights


def _name(name: str) -> str:
    """The original name of one of transformers'."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        name = name.replace("mlp.experts.gate_up_proj", "mlp.experts.fc1.weight")
        name = name.replace("mlp.experts.down_proj", "mlp.experts.fc2.weight")
        return name.replace("language_model.", "language_model.model.", 1)
    name = name.replace("layer_norm_kv", "ln_kv").replace("feed_forward.", "ffn.")
    return name.replace("multi_modal_projector.layer_norm.", "multi_modal_projector.ln_ffn.")


def _config(oracle: Oracle) -> dict[str, Any]:
    whole = oracle.model.config
    text, vision = whole.text_config, whole.vision_config
    names = (
        "hidden_act", "hidden_size", "max_position_embeddings", "moe_num_experts", "moe_num_shared_experts",
        "moe_topk", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    seen = (
        "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size",
    )  # fmt: skip
    return {
        "architectures": ["AriaForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "modeling_aria.AriaConfig",
            "AutoModelForCausalLM": "modeling_aria.AriaForConditionalGeneration",
        },
        "ignore_index": -100,
        "image_token_index": whole.image_token_index,
        "model_type": "aria",
        "projector_patch_to_query_dict": {
            str(patches): tokens for patches, tokens in whole.projector_patch_to_query_dict.items()
        },
        "text_config": {
            "model_type": "aria_moe_lm",
            **{name: getattr(text, name) for name in names},
            "intermediate_size": 10 * text.intermediate_size,  # of no layer: all have experts
            "moe_intermediate_size": text.intermediate_size,
            "rope_theta": text.rope_parameters["rope_theta"],
        },
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "aria_vision_model",
            **{name: getattr(vision, name) for name in seen},
        },
    }


ARIA = Reference(
    "aria",
    make,
    {"transformers": Oracle.save, "original": original},
    trained=(
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",
        "model.multi_modal_projector.query",
        "model.multi_modal_projector.cross_attn.multihead_attn.in_proj_weight",
        "model.language_model.layers.1.mlp.router.weight",
        "model.language_model.layers.2.mlp.experts.gate_up_proj",
        "lm_head.weight",
    ),
)

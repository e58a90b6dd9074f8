"""Small Llama 3.2 Vision checkpoints with unusual shapes: by transformers' own classes, and in Meta's original layout.

transformers 5.24 differs from Meta's code in two places, mended here: it joins the states that leave layers of the
encoder, not those that enter them; and attention of text that sees no image is not taken away, so that what stands
before an image depends on it. The original layout is written by hand, key by key, cut for two devices.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.families.survey import Inputs, Oracle, Pictures, Reference, byte_tokenizer, randomise

TILE, PATCH = 28, 4  # pixels: 7 x 7 patches and one of no patch, filled up to 56
TILES = 4
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
CROSSING = (1, 5)  # layers of transformers' count that are blocks: before layers 1 and 4 of the decoder
ENTERING = (1, 2, 3)
HIDDEN, HEADS, KV_HEADS, MLP = 48, 6, 2, 80
ENCODER = {"patch_size": PATCH, "width": 36, "layers": 4, "heads": 3, "mlp_ratio": 2.0, "n_global_layers": 2,
           "max_num_tiles": TILES, "return_intermediate": list(ENTERING)}  # fmt: skip
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
SPECIAL = (*NAMED, *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)))
# as published: a system's words with the date where no image is shown, and else none
TEMPLATE = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set system_words = "" %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_words = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- set shown = namespace(any=false) %}
{%- for message in turns %}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}{%- set shown.any = true %}{%- endif %}
    {%- endfor %}
{%- endfor %}
{%- if shown.any and system_words != "" %}
    {{- raise_exception("Images do not go with a system's words.") }}
{%- endif %}
{%- if not shown.any %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {{- "Cutting Knowledge Date: December 2023\\n" }}
    {{- "Today Date: " + date_string + "\\n\\n" }}
    {{- system_words }}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in turns %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# what Meta's own code writes
PLAIN_TEMPLATE = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- for part in message['content'] %}
        {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


class LlamaVisionOracle(Oracle):
    """Joins the states that enter layers, and takes attention away where nothing is seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model: Any = self.model
        vision = model.model.vision_model
        vision.intermediate_layers_indices = [layer - 1 for layer in ENTERING]
        for number in CROSSING:
            _mend(model.model.language_model.layers[number])

    def inputs_of(self, texts: Sequence[str], images: Sequence[Pictures]) -> Inputs:
        """Like the base's, with the images of each sample apart; none of any are none."""
        got = self.processor(
            text=list(texts),
            images=[list(own) for own in images] if any(images) else None,
            text_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
            return_tensors="pt",
        )
        return dict(got)


def _mend(block: Any) -> None:
    """Take away what attention gives to text that sees nothing, as the MLP's is."""
    if hasattr(block, "seen"):
        return

    def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        layer.seen = kwargs["full_text_row_masked_out_mask"]

    def after(attention: Any, args: Any, output: Any) -> Any:
        return output if block.seen is None else (output[0] * block.seen[:, 0], *output[1:])

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.cross_attn.register_forward_hook(after)
    block.seen = None


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Llama 3's special tokens at its last ids, and `<|begin_of_text|>` before every text."""
    usual = {"bos_token": SPECIAL[0], "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    tokenizer = byte_tokenizer((), SPECIAL, usual)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|image|>", special=True, normalized=False)])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], tokenizer.bos_token_id)]
    )
    return tokenizer


def make() -> Oracle:
    """Odd depths, grouped queries, a block before the last layer, tables as they are made of Meta's."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = MllamaConfig(
        vision_config={
            "hidden_size": ENCODER["width"], "intermediate_size": 72, "num_hidden_layers": ENCODER["layers"],
            "num_global_layers": ENCODER["n_global_layers"], "attention_heads": ENCODER["heads"],
            "image_size": TILE, "patch_size": PATCH, "max_num_tiles": TILES, "vision_output_dim": 36 * 4,
            "intermediate_layers_indices": list(ENTERING),
        },
        text_config={
            "vocab_size": ids["<|image|>"], "hidden_size": HIDDEN, "intermediate_size": MLP,
            "num_hidden_layers": 7, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "cross_attention_layers": list(CROSSING), "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 2e4, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "bos_token_id": ids[SPECIAL[0]], "eos_token_id": ids["<|eot_id|>"],
            "pad_token_id": ids["<|finetune_right_pad_id|>"],
        },
        image_token_index=ids["<|image|>"],
    )  # fmt: skip
    model = MllamaForConditionalGeneration(config)
    randomise(model)
    vision: Any = model.model.vision_model
    with torch.no_grad():
        for name, table in cells().items():
            vision.get_parameter(name).copy_(by_ratio(table))
    images = MllamaImageProcessorPil(
        size={"height": TILE, "width": TILE}, max_image_tiles=TILES, image_mean=MEAN, image_std=STD
    )
    processor = MllamaProcessor(images, tokenizer, chat_template=TEMPLATE)
    return LlamaVisionOracle(
        model, processor, placeholders=(ids["<|image|>"],), eos_token_id=ids["<|eot_id|>"]
    )


# --- Meta's layout ------------------------------------------------------------------------------------------

TABLES = {
    "pre_tile_positional_embedding.embedding.weight": ("pre_tile_pos_embed.embedding", 1),
    "post_tile_positional_embedding.embedding.weight": ("post_tile_pos_embed.embedding", 1),
    "gated_positional_embedding.tile_embedding.weight": ("gated_positional_embedding", 50),
}
"""Those of tiles, by their names in transformers: Meta's name, and the vectors of a tile."""


def cells() -> dict[str, Tensor]:
    """Meta's tables, by transformers' names: [rows, columns, vectors, width], also of cells that nothing reads."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.3 * torch.randn(TILES, TILES, count, 36, generator=generator)
        for name, (_, count) in TABLES.items()
    }


def by_ratio(table: Tensor) -> Tensor:
    """A table of Meta's as transformers has it: a row for each arrangement, row 0 for none, tiles side by side."""
    rows = torch.zeros(len(RATIOS) + 1, TILES, *table.shape[2:])
    for number, (height, width) in enumerate(RATIOS, start=1):
        rows[number, : height * width] = table[:height, :width].reshape(-1, *table.shape[2:])
    return rows.flatten(1)


def original(oracle: Oracle, folder: Path, devices: int = 2) -> dict[str, Tensor]:
    """Write `consolidated.NN.pth`, `params.json` and `tokenizer.model`; returns the weights, whole.

    The layout has no template: from here on the oracle writes turns as Meta's code does.
    """
    oracle.processor.chat_template = PLAIN_TEMPLATE
    weights = {f"vision_model.vision_encoder.{TABLES[name][0]}": table for name, table in cells().items()}
    for name, tensor in oracle.model.state_dict().items():
        weights |= _renamed(name, tensor)
    for number in range(devices):
        own = {}
        for name, tensor in weights.items():
            axis = cut(name)
            own[name] = (tensor if axis is None else tensor.chunk(devices, axis)[number]).clone()
        torch.save(own, folder / (f"consolidated.{number:02d}.pth" if devices > 1 else "consolidated.pth"))
    text: Any = oracle.model.config.text_config
    params = {
        "dim": HIDDEN, "n_layers": 5, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": text.vocab_size,
        "ffn_dim_multiplier": 0.6, "multiple_of": 20, "norm_eps": 1e-5,
        "rope_theta": text.rope_parameters["rope_theta"], "use_scaled_rope": True, "vision_chunk_size": TILE,
        "vision_max_num_chunks": TILES, "vision_num_cross_attention_layers": 2, "vision_encoder": ENCODER,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    _write_ranks(oracle.tokenizer, folder / "tokenizer.model")
    return weights


def cut(name: str) -> int | None:
    """Along which axis devices share a tensor; None: each has all of it."""
    if name.endswith(("wo.weight", "w2.weight", "c_proj.weight")):
        return 1
    whole = ("norm", "ln_", "gate", "embedding", "c_proj.bias", "pos_embed")
    first = ("tok_embeddings", "learnable_embedding")
    return None if any(part in name for part in whole) and not any(part in name for part in first) else 0


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of transformers' tensors as Meta's, as many as that are; those of tiles apart."""
    name = name.removeprefix("model.")
    if name.startswith("vision_model."):
        own = _vision_name(name.removeprefix("vision_model."))
        tensor = tensor.flatten(1) if own == "conv1._linear.weight" else tensor
        return {f"vision_model.vision_encoder.{own}": tensor} if own else {}
    if name.startswith("multi_modal_projector."):
        return {f"vision_model.vision_projection.{name.rpartition('.')[2]}": tensor}
    if name == "language_model.embed_tokens.weight":
        parts = zip(
            ("tok_embeddings", "learnable_embedding"), tensor.split([len(tensor) - 8, 8]), strict=True
        )
        return {f"text_model.{part}.weight": rows for part, rows in parts}
    plain = {"lm_head.weight": "output.weight", "language_model.norm.weight": "norm.weight"}
    if name in plain:
        return {f"text_model.{plain[name]}": tensor}
    found = re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)", name)
    assert found is not None, name
    number, crosses = int(found[1]), int(found[1]) in CROSSING
    place = CROSSING.index(number) if crosses else number - sum(cross < number for cross in CROSSING)
    layer = f"{'cross_attention_layers' if crosses else 'layers'}.{place}"
    heads = {"q": HEADS, "k": KV_HEADS}
    if not crosses and (turned := re.search(r"\.([qk])_proj", name)):  # halves of each head to pairs
        low, high = tensor.unflatten(0, (heads[turned[1]], 2, -1)).unbind(1)
        tensor = torch.stack([low, high], dim=2).flatten(0, 2)
    short = {
        r"(self|cross)_attn\.([qkvo])_proj": r"attention.w\2", r"cross_attn\.([qk])_norm": r"attention.\1_norm",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "cross_attn_attn_gate": "gate_attn", "cross_attn_mlp_gate": "gate_ffwd",
    }  # fmt: skip
    return {f"text_model.{layer}.{_replaced(found[2], short)}": tensor}


def _vision_name(name: str) -> str | None:
    """Meta's name of a tensor of the encoder; None: it is of tiles."""
    if name in TABLES:
        return None
    short = {
        r"^patch_embedding": "conv1._linear", "^gated_positional_embedding.embedding": "positional_embedding",
        "^gated_positional_embedding.gate": "gated_positional_embedding_gate",
        r"^(pre|post)_tile_positional_embedding": r"\1_tile_pos_embed", r"^layernorm_(pre|post)": r"ln_\1",
        r"transformer\.layers": "transformer.resblocks", r"self_attn\.([qkvo])_proj": r"attn.w\1",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }  # fmt: skip
    return _replaced(name, short)


def _replaced(name: str, short: dict[str, str]) -> str:
    for pattern, value in short.items():
        name = re.sub(pattern, value, name)
    return name


def _write_ranks(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """The words in the order of their ids, as tiktoken has them."""
    byte = {character: number for number, character in bytes_to_unicode().items()}
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[: tokenizer.bos_token_id]
    lines = (
        f"{base64.b64encode(bytes(byte[character] for character in word)).decode()} {rank}\n"
        for word, rank in words
    )
    path.write_text("".join(lines))


LLAMA_VISION = Reference(
    "llama_vision",
    make,
    {"transformers": Oracle.save, "original": original},
    trained=(
        "model.vision_model.patch_embedding.weight",
        "model.vision_model.transformer.layers.2.self_attn.k_proj.weight",
        "model.vision_model.global_transformer.layers.1.gate_attn",
        "model.multi_modal_projector.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.5.cross_attn.v_proj.weight",
        "model.language_model.layers.4.self_attn.o_proj.weight",
    ),
)

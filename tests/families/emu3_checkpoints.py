"""Small Emu3 checkpoints with unusual shapes: by transformers' own classes, and in the original layout.

The original layout is written here by hand, so that it shares nothing with the map under test.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CODES = 60
# as published: the images first, then the words with a space after them
TEMPLATE = """
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] + ' ' }}{%- endfor -%}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt else '' }}
"""


PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
FIRST = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
IMAGES = (
    "<|image token|>", "<|image start|>", "<|image end|>",
    *(f"<|visual token {code:06d}|>" for code in range(CODES)),
)  # fmt: skip


def bpe() -> Tokenizer:
    """Words alone, as tiktoken numbers them: bytes, then pairs in the order in which they are joined."""
    texts = [
        "a red apple on a blue background",
        "You are a helpful assistant. USER: what? ASSISTANT: it is. 4*7",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of transformers' Emu3, which calls an unused one `<image>`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe(),
        padding_side="left",
    )
    named = ["<image>" if token == "<|extra_0|>" else token for token in FIRST]
    tokenizer.add_special_tokens({"additional_special_tokens": [*named, *IMAGES]})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    )


def tiktoken_files(folder: Path) -> None:
    """Write the same text tokenizer as the original repository has it."""
    byte = {character: number for number, character in bytes_to_unicode().items()}
    ranks = sorted(bpe().get_vocab().items(), key=lambda item: item[1])
    lines = (f"{base64.b64encode(bytes(byte[c] for c in token)).decode()} {rank}\n" for token, rank in ranks)
    (folder / "emu3.tiktoken").write_text("".join(lines))
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(IMAGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Emu3Tokenizer"}))


def emu3(folder: Path) -> Emu3ForConditionalGeneration:
    """Write a checkpoint of transformers' layout: grouped queries, odd depth, three levels of the tokenizer."""
    torch.manual_seed(0)
    tokenizer = text_tokenizer()
    config = Emu3Config(
        text_config={
            "vocab_size": len(tokenizer) + 5, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "initializer_range": 0.2, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vq_config={
            "codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1,
            "attn_resolutions": [2], "hidden_size": 64,
        },
        vocabulary_map=tokenizer.get_vocab(),
    )  # fmt: skip
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms and statistics start at 0 and 1, where a swapped one would not be seen
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(torch.rand_like(tensor) * 0.2)
            elif "quantize" in name:
                tensor.normal_()
    images = Emu3ImageProcessor(
        min_pixels=16 * 16,
        max_pixels=32 * 32,
        spatial_factor=4,
        image_mean=[0.5, 0.4, 0.5],
        image_std=[0.5, 0.5, 0.6],
    )
    processor = Emu3Processor(images, tokenizer, chat_template=TEMPLATE)
    processor.downsample_ratio = 4
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def original_tokenizer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision tokenizer's weights as the original repository names them."""
    renamed = {}
    for name, tensor in state.items():
        new = (
            name.replace("down_block.down", "down")
            .replace("up_block.up", "up")
            .replace("middle_block", "mid")
        )
        new = re.sub(r"attn_norms\.(\d+)", r"attn.\1.norm", new).replace("mid.attn_norm", "mid.attn_1.norm")
        if found := re.search(r"(attn(?:_1|\.\d+))\.(q|k|v|out)_proj\.(weight|bias)$", new):
            part = "proj_out" if found[2] == "out" else found[2]
            new = f"{new[: found.start()]}{found[1]}.{part}.{found[3]}"
            tensor = tensor[:, :, None, None] if found[3] == "weight" else tensor
        renamed[new] = tensor.contiguous().clone()
    return renamed


def original(folder: Path, model: Emu3ForConditionalGeneration) -> None:
    """Write the same weights in the layout of the original repository: two folders."""
    beside = folder / "Emu3-VisionTokenizer"
    beside.mkdir(parents=True)
    state = model.state_dict()
    text = {
        re.sub(r"^model\.text_model\.", "model.", name): tensor.clone()
        for name, tensor in state.items()
        if "vqmodel" not in name
    }
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    prefix = "model.vqmodel."
    images = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    save_file(original_tokenizer(images), beside / "model.safetensors", metadata={"format": "pt"})
    config = model.config.text_config.to_dict() | {"model_type": "Emu3", "rope_theta": 1000000.0}
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    vq = model.config.vq_config
    sizes = {
        "model_type": "Emu3VisionVQ", "ch": vq.base_channels, "ch_mult": list(vq.channel_multiplier), "z_channels": 4,
        "embed_dim": 4, "codebook_size": CODES, "num_res_blocks": vq.num_res_blocks, "double_z": False,
        "attn_resolutions": list(vq.attn_resolutions), "temporal_downsample_factor": 4, "dropout": 0.0,
    }  # fmt: skip
    (beside / "config.json").write_text(json.dumps(sizes))
    limits = {
        "min_pixels": 256,
        "max_pixels": 1024,
        "image_mean": [0.5, 0.4, 0.5],
        "image_std": [0.5, 0.5, 0.6],
    }
    (beside / "preprocessor_config.json").write_text(json.dumps(limits))
    tiktoken_files(folder)


def inner(folder: Path, source: Path) -> None:
    """Write a checkpoint of transformers' layout with the names that its modules have, not those that it writes."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {_inner_name(name): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def _inner_name(name: str) -> str:
    """In its first release the decoder was a causal language model of its own, with the head in it."""
    if name == "text_model.lm_head.weight":
        return "lm_head.weight"
    return f"model.{name.replace('text_model.model.', 'text_model.', 1)}"

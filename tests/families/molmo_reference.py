"""What the authors' code gives for small Molmo models, recorded, and the checkpoints that it was given.

transformers has no class for Molmo 1, so its numbers stand in `fixtures/molmo.safetensors`; `fixtures/molmo.json`
says how they were made. The weights are not stored: they follow from a seed. `write` rebuilds the folder as it is on
the hub (`model.transformer.*` and `model.vision_backbone.*`, a preprocessor_config.json, a tokenizer with the image's
special tokens behind the text's), and `recorded` gives what a model read from it has to give.

Three decoders: "qwen" (as 7B-D and 72B: biased query, key and value, grouped queries), "olmo" (as 7B-O: norms after
each branch and over all query and key channels) and "experts" (as MolmoE-1B). The published config.json of the first
two says nothing of the vision tower, whose shapes are constants of the authors' code; here it has two keys more,
`vision_backbone` and `vit_layers`, under the names of their training configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.families.survey import WORDS

FIXTURE = Path(__file__).parent / "fixtures" / "molmo.safetensors"
KINDS = ("qwen", "olmo", "experts")

# sides in patches differ from each other and from what the margins leave: 10 and 6, five and three tokens
CROP = 40  # pixels, of the side of a crop and of the whole image as the tower sees it
PATCH = 4  # pixels
MARGIN = 2  # patches at each side of a crop that its neighbours own
POOL = 2  # patches at each side of the window that makes a token
MAX_CROPS = 6
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

TOWER = {
    "image_default_input_size": [CROP, CROP], "image_patch_size": PATCH, "image_pos_patch_size": PATCH,
    "image_emb_dim": 36, "image_num_heads": 3, "image_num_key_value_heads": 3, "image_head_dim": 12,
    "image_num_layers": 5, "image_mlp_dim": 56, "image_mlp_activations": "quick_gelu",
    "image_num_pos": (CROP // PATCH) ** 2 + 1, "image_norm_eps": 1e-5,
}  # fmt: skip
NEW_ROWS = 128  # of the embedding, behind those that the head has too
SHARED = {
    "architectures": ["MolmoForCausalLM"],
    "auto_map": {
        "AutoConfig": "config_molmo.MolmoConfig",
        "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
    },
    "clip_qkv": None, "embedding_size": 304, "initializer_range": 0.02, "layer_norm_type": "rms",
    "max_position_embeddings": 1024, "model_type": "molmo", "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.43.3", "use_cache": True, "use_position_ids": True,
    "weight_tying": False, "vision_backbone": TOWER, "vit_layers": [-2, -4],
}  # fmt: skip
# `intermediate_size` counts the two halves of the decoder's fused projection, as published
CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen": SHARED | {
        "attention_layer_norm": False, "norm_after": False, "qkv_bias": True, "vocab_size": 304,
        "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "layer_norm_eps": 1e-6, "rope_theta": 5e4,
    },
    # fewer words than rows, as published, so that the image's first special tokens have rows of the head too
    "olmo": SHARED | {
        "attention_layer_norm": True, "norm_after": True, "qkv_bias": False, "vocab_size": 301,
        "hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": None, "layer_norm_eps": 1e-5, "rope_theta": 2e4,
    },
    "experts": {
        "architectures": ["OLMoForCausalLM"], "model_type": "molmo", "transformers_version": "4.45.0.dev0",
        "auto_map": {
            "AutoConfig": "config_molmoe.MolmoConfig", "AutoModelForCausalLM": "modeling_molmoe.MolmoForCausalLM",
        },
        "activation_type": "swiglu", "additional_vocab_size": NEW_ROWS, "attention_layer_norm": True,
        "block_type": "moe", "clip_qkv": None, "d_model": 40, "embedding_size": 304, "image_padding_embed":
        "pad_and_partial_pad", "image_pooling_2d": "attention-meanq", "image_projector": "mlp", "include_bias": False,
        "layer_norm_eps": 1e-5, "layer_norm_type": "rms", "max_position_embeddings": 2048, "max_sequence_length": 1024,
        "mlp_hidden_size": None, "mlp_ratio": 1, "moe_interleave": False, "moe_num_experts": 6,
        "moe_shared_expert": False, "moe_top_k": 2, "n_heads": 5, "n_kv_heads": None, "n_layers": 2,
        "norm_after": False, "pad_token_id": 1, "qkv_bias": False, "residual_dropout": 0.1, "rope": True,
        "rope_full_precision": True, "rope_impl": "llama", "rope_theta": 1e4, "use_cache": True,
        "use_cls_feature": False, "use_position_ids": True, "vision_backbone": TOWER, "vit_layers": [-2, -4],
        "vocab_size": 301, "weight_tying": False,
    },
}  # fmt: skip
SEEDS = {"qwen": 5, "olmo": 20240926, "experts": 64}

IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
MERGED = ("ĠUser", "ĠAssistant", "Ġimage", "Ġred", "Ġapples", "what", "Ġthe")
# the published template, in other words: roles in turn, capitalised, a space between messages
TEMPLATE = """
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant have to take turns') -}}
{%- endif -%}
{{- message['role'] | capitalize + ': ' + message['content'] -}}
{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' Assistant:' -}}{%- endif -%}
"""


def text_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of few merges; its image tokens begin at `vocab_size`, as published."""
    merges = list(dict.fromkeys((word[:end], word[end]) for word in MERGED for end in range(1, len(word))))
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fillers = CONFIGS[kind]["vocab_size"] - len(texts) - len(special)
    special += [f"|<EXTRA_TOKENS_{index}>|" for index in range(fillers)] + list(IMAGE_TOKENS)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[0]) == CONFIGS[kind]["vocab_size"]
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def weights(kind: str) -> dict[str, Tensor]:
    """The weights of a model, float32, under the published names.

    Whole numbers of a frozen stream over 4096, so that every machine has the same: names sorted, one draw a name.
    Projections keep the size of what passes through them, or the image would drown the embedding it is added to.
    """
    stream = np.random.RandomState(SEEDS[kind])
    made = {}
    for name, shape in sorted(shapes(CONFIGS[kind]).items()):
        drawn = torch.from_numpy(stream.randint(-4096, 4097, shape, np.int64)).float() / 4096
        scales = name.endswith("weight") and len(shape) == 1  # the weights of norms
        projects = name.endswith("weight") and len(shape) == 2
        made[name] = 1 + drawn / 8 if scales else drawn * (1.5 / shape[-1] ** 0.5 if projects else 0.375)
    return made


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every name of a checkpoint, with the shape of its tensor."""
    if "moe_num_experts" in config:
        return _expert_shapes(config)
    width, ff = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    keys = head * (config["num_key_value_heads"] or config["num_attention_heads"])
    found = {
        "transformer.wte.embedding": (config["embedding_size"], width),
        "transformer.wte.new_embedding": (NEW_ROWS, width),
        "transformer.ln_f.weight": (width,),
        "transformer.ff_out.weight": (config["embedding_size"], width),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.blocks.{layer}."
        found[block + "att_proj.weight"] = (width + 2 * keys, width)
        if config["qkv_bias"]:
            found[block + "att_proj.bias"] = (width + 2 * keys,)
        if config["attention_layer_norm"]:
            found[block + "q_norm.weight"] = (width,)
            found[block + "k_norm.weight"] = (keys,)
        found[block + "attn_out.weight"] = (width, width)
        found[block + "ff_proj.weight"] = (ff, width)
        found[block + "ff_out.weight"] = (width, ff // 2)
        found[block + "attn_norm.weight"] = found[block + "ff_norm.weight"] = (width,)
    found |= {f"vision_backbone.{name}": shape for name, shape in _vision_shapes(config, width, ff).items()}
    return {f"model.{name}": shape for name, shape in found.items()}


def _expert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names of a checkpoint with experts, each with matrices of its own."""
    width = config["d_model"]
    ff = width * config["mlp_ratio"]
    found = {
        "transformer.wte.embedding": (config["embedding_size"], width),
        "transformer.wte.new_embedding": (NEW_ROWS, width),
        "transformer.ln_f.weight": (width,),
    }
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}."
        found[block + "attn.att_proj.weight"] = (3 * width, width)
        found[block + "attn.attn_out.weight"] = (width, width)
        for norm in ("attn.q_norm", "attn.k_norm", "attn.attn_norm", "mlp.ff_norm"):
            found[f"{block}{norm}.weight"] = (width,)
        found[block + "mlp.gate.weight"] = (config["moe_num_experts"], width)
        for expert in range(config["moe_num_experts"]):
            own = f"{block}mlp.experts.{expert}."
            found[own + "gate_proj.weight"] = found[own + "up_proj.weight"] = (ff // 2, width)
            found[own + "down_proj.weight"] = (width, ff // 2)
    found |= {f"vision_backbone.{name}": shape for name, shape in _vision_shapes(config, width, ff).items()}
    made: dict[str, tuple[int, ...]] = {f"model.{name}": shape for name, shape in found.items()}
    return made | {"lm_head.weight": (config["embedding_size"], width)}


def _vision_shapes(config: Mapping[str, Any], width: int, both: int) -> dict[str, tuple[int, ...]]:
    """The names below `vision_backbone`: tower, padding, pooling and projector, which has half of `both`."""
    tower, ff = config["vision_backbone"], both // 2
    own, inner = tower["image_emb_dim"], tower["image_mlp_dim"]
    joined = own * len(config["vit_layers"])
    found: dict[str, tuple[int, ...]] = {
        "pad_embed": (2, joined),
        "image_projector.w1.weight": (ff, own),
        "image_projector.w2.weight": (width, ff),
        "image_projector.w3.weight": (ff, own),
        "image_vit.class_embedding": (own,),
        "image_vit.positional_embedding": (tower["image_num_pos"], own),
        "image_vit.patch_embedding.weight": (own, tower["image_patch_size"] ** 2 * 3),
        "image_vit.pre_ln.weight": (own,),
        "image_vit.pre_ln.bias": (own,),
    }
    pairs = {f"image_pooling_2d.w{letter}": (own, own if letter == "o" else joined) for letter in "qkvo"}
    for layer in range(tower["image_num_layers"]):
        block = f"image_vit.transformer.resblocks.{layer}."
        pairs |= {f"{block}attention.w{letter}": (own, own) for letter in "qkvo"}
        pairs |= {block + "feed_forward.w1": (inner, own), block + "feed_forward.w2": (own, inner)}
        for norm in ("attention_norm", "ffn_norm"):
            found[f"{block}{norm}.weight"] = found[f"{block}{norm}.bias"] = (own,)
    for name, shape in pairs.items():
        found[name + ".weight"], found[name + ".bias"] = shape, shape[:1]
    return found


def write(folder: Path, kind: str = "qwen") -> None:
    """Write a checkpoint as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(kind), folder / "model.safetensors", metadata={"format": "pt"})
    text_tokenizer(kind).save_pretrained(folder)
    own = {
        "image_processor_type": "MolmoImageProcessor", "processor_class": "MolmoProcessor",
        "base_image_input_size": [CROP, CROP], "image_patch_size": PATCH, "max_crops": MAX_CROPS,
        "overlap_margins": [MARGIN, MARGIN], "do_normalize": True, "image_padding_mask": True,
        "image_mean": list(MEAN), "image_std": list(STD),
        "image_token_length_h": CROP // PATCH // POOL, "image_token_length_w": CROP // PATCH // POOL,
        "auto_map": {
            "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor",
            "AutoProcessor": "preprocessing_molmo.MolmoProcessor",
        },
    }  # fmt: skip
    files = {
        "config.json": CONFIGS[kind],
        "generation_config.json": {"_from_model_config": True, "transformers_version": "4.43.3"},
        "preprocessor_config.json": own,
        "processor_config.json": {"auto_map": own["auto_map"], "processor_class": "MolmoProcessor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def recorded(prefix: str = "") -> dict[str, Tensor]:
    """The tensors of the fixture whose names begin with `prefix` and a dot, without it; all of them for none."""
    tensors = load_file(FIXTURE)
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def description() -> dict[str, Any]:
    """The fixture's other half: how it was made, the sizes of its images and its prompts."""
    content: dict[str, Any] = json.loads(FIXTURE.with_suffix(".json").read_text())
    return content


def windows(grid: Sequence[int], side: int, margin: int, pool: int = POOL) -> np.ndarray:
    """The patches that make each token of an image, in the order of the stream: int64 [tokens, pool²].

    Patches are counted through the views (whole image, then the crops by rows), `side`² a view, each by rows. A crop
    gives the tokens of its inner patches; at the border of the image also those of its margin.
    """

    def owners(count: int) -> list[tuple[int, int]]:
        """Along one axis: crop, and its first patch of a window, for each token."""
        return [
            (crop, patch)
            for crop in range(count)
            for patch in range(margin if crop else 0, side - margin if crop < count - 1 else side, pool)
        ]

    def window(view: int, top: int, left: int) -> list[int]:
        first = (view * side + top) * side + left
        return [first + down * side + right for down in range(pool) for right in range(pool)]

    rows, columns = grid
    whole = [window(0, top, left) for top in range(0, side, pool) for left in range(0, side, pool)]
    tiled = [
        window(1 + row * columns + column, top, left)
        for row, top in owners(rows)
        for column, left in owners(columns)
    ]
    return np.array(whole + tiled)

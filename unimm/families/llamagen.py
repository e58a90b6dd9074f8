"""LlamaGen's image tokenizers (VQ-8, VQ-16), which are Janus's too: key maps onto `ImageTokenizer`.

Source: FoundationVision/LlamaGen `tokenizer/tokenizer_image/vq_model.py`; transformers `JanusVQVAE` is the same
network under other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unimm.errors import UserError
from unimm.families.keymap import LEAD, SAME, SQUEEZE, KeyMap, Op, Rule

GROUPS = 32  # of every group normalisation, fixed in the original code
KEPT = ("quantize.codebook_used",)  # a record of training
# what moves a codebook in training; not published, so it starts as for codes that were each used once
CONSTANTS = {"quantize._codebook.initted": 1.0, "quantize._codebook.cluster_size": 1.0}
DERIVED = (Rule("quantize._codebook.embed_avg", "quantize.embedding.weight", LEAD),)
VQ_16: dict[str, Any] = {
    "patch_size": 1,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "attention_levels": [4],
    "mid_attention": True,
    "norm_num_groups": GROUPS,
    "latent_channels": 256,
    "codebook_size": 16384,
    "codebook_dim": 8,
}


def _residual(ours: str, theirs: str) -> list[Rule]:
    """A residual block; the shortcut is there where the number of channels changes."""
    names = ("norm1", "conv1", "norm2", "conv2")
    rules = [Rule(f"{ours}.{name}.{{end}}", f"{theirs}.{name}.{{end}}") for name in names]
    return [*rules, Rule(f"{ours}.conv_shortcut.{{end}}", f"{theirs}.nin_shortcut.{{end}}")]


def _attention(ours: str, theirs: str) -> list[Rule]:
    """Self-attention, by 1x1 convolutions there and linear layers here."""
    rules = [Rule(f"{ours}.group_norm.{{end}}", f"{theirs}.norm.{{end}}")]
    for name, other in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        pairs: list[tuple[str, Op]] = [("weight", SQUEEZE), ("bias", SAME)]
        rules += [Rule(f"{ours}.{name}.{end}", f"{theirs}.{other}.{end}", op) for end, op in pairs]
    return rules


def _network(side: str, level: str, residual: str, attention: str, mid: tuple[str, str, str]) -> list[Rule]:
    """Encoder or decoder: `level` names a level there, the others what is in it."""
    blocks, sampler = ("down_blocks", "downsampl") if side == "encoder" else ("up_blocks", "upsampl")
    first, middle, last = mid
    return [
        *_residual(f"{side}.{blocks}.{{i}}.resnets.{{j}}", f"{side}.{level}.{{i}}.{residual}.{{j}}"),
        *_attention(f"{side}.{blocks}.{{i}}.attentions.{{j}}", f"{side}.{level}.{{i}}.{attention}.{{j}}"),
        Rule(
            f"{side}.{blocks}.{{i}}.{sampler}ers.0.conv.{{end}}",
            f"{side}.{level}.{{i}}.{sampler}e.conv.{{end}}",
        ),
        *_residual(f"{side}.mid_block.resnets.0", f"{side}.{first}"),
        *_attention(f"{side}.mid_block.attentions.0", f"{side}.{middle}"),
        *_residual(f"{side}.mid_block.resnets.1", f"{side}.{last}"),
        Rule(f"{side}.conv_norm_out.{{end}}", f"{side}.norm_out.{{end}}"),
        Rule(f"{side}.conv_in.{{end}}", f"{side}.conv_in.{{end}}"),
        Rule(f"{side}.conv_out.{{end}}", f"{side}.conv_out.{{end}}"),
    ]


SHARED = [
    Rule("quant_conv.{end}", "quant_conv.{end}"),
    Rule("post_quant_conv.{end}", "post_quant_conv.{end}"),
    Rule("quantize._codebook.embed", "quantize.embedding.weight", LEAD),
]
ORIGINAL = [
    *_network("encoder", "conv_blocks", "res", "attn", ("mid.0", "mid.1", "mid.2")),
    *_network("decoder", "conv_blocks", "res", "attn", ("mid.0", "mid.1", "mid.2")),
    *SHARED,
]
KEY_MAP = KeyMap(rules=tuple(ORIGINAL), kept=KEPT, constants=CONSTANTS, derived=DERIVED)
"""Of a tokenizer alone, as LlamaGen publishes it."""
TRANSFORMERS = [
    *_network("encoder", "down", "block", "attn", ("mid.block_1", "mid.attn_1", "mid.block_2")),
    *_network("decoder", "up", "block", "attn", ("mid.block_1", "mid.attn_1", "mid.block_2")),
    *SHARED,
]


def tokenizer_options(shapes: Mapping[str, Tensor], levels: str, residual: str, where: str) -> dict[str, Any]:
    """Read the sizes of a tokenizer off its tensors.

    Args:
        shapes: names (without prefix) and shapes of its tensors.
        levels: how the layout names a level of the encoder.
        residual: how it names a residual block in it.
        where: the checkpoint's path, for errors.

    Returns:
        Fields of `ImageTokenizerConfig`, the image's size apart.

    Raises:
        UserError: it is no tokenizer of this family.
    """
    channels: list[int] = []
    blocks = 0
    try:
        while (first := f"encoder.{levels}.{len(channels)}.{residual}.0.conv2.weight") in shapes:
            channels.append(int(shapes[first].shape[0]))
        while f"encoder.{levels}.0.{residual}.{blocks}.conv1.weight" in shapes:
            blocks += 1
        dim, latent = map(int, shapes["quant_conv.weight"].shape[:2])
        codes = int(shapes["quantize.embedding.weight"].shape[0])
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing; this is no whole image tokenizer") from None
    if not channels:
        raise UserError(f"{where}: no levels named encoder.{levels}; this is no LlamaGen tokenizer")
    return {
        "patch_size": 1,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "attention_levels": [len(channels) - 1],
        "mid_attention": True,
        "norm_num_groups": GROUPS,
        "latent_channels": latent,
        "codebook_size": codes,
        "codebook_dim": dim,
    }

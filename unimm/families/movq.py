"""Emu3's vision tokenizer, as the original repository and transformers have it: key maps onto `MoVQTokenizer`.

Source: baaivision/Emu3 `emu3/tokenizer/modeling_emu3visionvq.py`; transformers `Emu3VQVAE` is the same network under
other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimm.errors import UserError
from unimm.families.documents import EMU3_CODES, Emu3OriginalCodes
from unimm.families.keymap import SAME, SQUEEZE, KeyMap, Op, Rule
from unimm.sections import validate

MODEL_TYPE = "Emu3VisionVQ"  # of the original's `config.json`


def _residual(ours: str, theirs: str) -> list[Rule]:
    """A residual block; what a norm is made of differs between the sides, and is named alike."""
    return [
        Rule(f"{ours}.norm{{n}}.{{rest}}", f"{theirs}.norm{{n}}.{{rest}}"),
        Rule(f"{ours}.conv{{n}}.{{end}}", f"{theirs}.conv{{n}}.{{end}}"),
        Rule(f"{ours}.conv_shortcut.{{end}}", f"{theirs}.nin_shortcut.{{end}}"),
    ]


def _attention(ours: str, theirs: str, norm: str, layout: str) -> list[Rule]:
    """Self-attention: 1x1 convolutions with their norm inside (original), or linear layers with it beside."""
    original = layout == "original"
    names = ("q", "k", "v", "proj_out") if original else ("q_proj", "k_proj", "v_proj", "out_proj")
    inner = f"{theirs}.norm" if original else norm
    rules = [
        Rule(f"{ours}.group_norm.{{end}}", f"{inner}.{{end}}"),
        Rule(f"{ours}.spatial_norm.{{rest}}", f"{inner}.{{rest}}"),
    ]
    for name, other in zip(("to_q", "to_k", "to_v", "to_out.0"), names, strict=True):
        ops: list[tuple[str, Op]] = [("weight", SQUEEZE if original else SAME), ("bias", SAME)]
        rules += [Rule(f"{ours}.{name}.{end}", f"{theirs}.{other}.{end}", op) for end, op in ops]
    return rules


def _side(side: str, levels: int, layout: str) -> list[Rule]:
    """Encoder or decoder. The decoder's levels are counted from the coarsest here, from the finest there."""
    original, down = layout == "original", side == "encoder"
    stack = f"{side}.{'down' if down else 'up'}"
    if not original:
        stack = f"{side}.{'down_block.down' if down else 'up_block.up'}"
    mid = f"{side}.{'mid' if original else 'middle_block'}"
    sampler = "downsampl" if down else "upsampl"
    rules: list[Rule] = []
    for level in range(levels):
        ours = f"{side}.down_blocks.{level}" if down else f"{side}.up_blocks.{levels - 1 - level}"
        theirs = f"{stack}.{level}"
        rules += _residual(f"{ours}.resnets.{{j}}", f"{theirs}.block.{{j}}")
        rules += _attention(
            f"{ours}.attentions.{{j}}", f"{theirs}.attn.{{j}}", f"{theirs}.attn_norms.{{j}}", layout
        )
        rules.append(Rule(f"{ours}.{sampler}ers.0.conv.{{end}}", f"{theirs}.{sampler}e.conv.{{end}}"))
    return [
        *rules,
        *_residual(f"{side}.mid_block.resnets.0", f"{mid}.block_1"),
        *_attention(f"{side}.mid_block.attentions.0", f"{mid}.attn_1", f"{mid}.attn_norm", layout),
        *_residual(f"{side}.mid_block.resnets.1", f"{mid}.block_2"),
        Rule(f"{side}.conv_norm_out.{{rest}}", f"{side}.norm_out.{{rest}}"),
        Rule(f"{side}.conv_in.{{end}}", f"{side}.conv_in.{{end}}"),
        Rule(f"{side}.conv_out.{{end}}", f"{side}.conv_out.{{end}}"),
        Rule(f"{side}_time.convs.{{i}}.{{rest}}", f"{side}.time_conv.{{i}}.{{rest}}"),
        Rule(f"{side}_time.residuals.{{i}}.{{rest}}", f"{side}.time_res_stack.{{i}}.{{rest}}"),
    ]


def tokenizer_map(layout: str, levels: int) -> KeyMap:
    """Return the map of the vision tokenizer alone.

    Args:
        layout: `original` or `transformers`.
        levels: of its encoder, `len(config.block_out_channels)`.
    """
    return KeyMap(
        rules=(
            *_side("encoder", levels, layout),
            *_side("decoder", levels, layout),
            Rule("quant_conv.{rest}", "quant_conv.{rest}"),
            Rule("post_quant_conv.{rest}", "post_quant_conv.{rest}"),
            Rule("codebook.weight", "quantize.embedding.weight"),
        )
    )


def tokenizer_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the vision tokenizer's config, of either layout, to fields of `MoVQConfig`.

    Raises:
        UserError: a field is missing, or is of a value that no published tokenizer has.
    """
    original = "ch" in config
    section: Any = Emu3OriginalCodes if original else EMU3_CODES
    config = validate(section, dict(config), where).model_dump(exclude_unset=True)
    names = (
        ("ch", "ch_mult", "z_channels")
        if original
        else ("base_channels", "channel_multiplier", "latent_channels")
    )
    try:
        base, multiplier, latent = (config[name] for name in names)
        spans = int(config["temporal_downsample_factor"])
        wanted = {"embed_dim": latent, "double_z": False, "double_latent": False, "num_attention_heads": 1}
        for name, value in wanted.items():
            if config.get(name, value) != value:
                raise UserError(f"{where}: {name}: {config[name]!r} is not supported, only {value!r}")
        if spans & (spans - 1) or spans < 1:
            raise UserError(f"{where}: temporal_downsample_factor: {spans}, expected a power of 2")
        return {
            "block_out_channels": [base * factor for factor in multiplier],
            "layers_per_block": config["num_res_blocks"],
            "attention_levels": list(config["attn_resolutions"]),
            "latent_channels": latent,
            "codebook_size": config["codebook_size"],
            "halvings": spans.bit_length() - 1,
        }
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None

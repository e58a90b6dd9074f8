"""Which tensors of Llama 3.2 Vision's two layouts are which of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimm.families.keymap import SAME, KeyMap, Op, Rule, llama_layer, rotary_halves, share
from unimm.models.configuration import UniMMConfig
from unimm.models.encoder_parts import TiledEncoderConfig
from unimm.models.fusion_parts import CrossFusionConfig
from unimm.models.tiled import tile_ratios

_BLOCK = {
    "norm": "input_layernorm", "between": "post_attention_layernorm", "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
    **{name: f"cross_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
}  # fmt: skip
_GATES = {"attention_gate": "cross_attn_attn_gate", "mlp_gate": "cross_attn_mlp_gate"}
_ENCODER_BLOCK = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}  # fmt: skip


def _sizes(config: UniMMConfig) -> tuple[TiledEncoderConfig, CrossFusionConfig, Any]:
    encoder, fusion = config.encoder_config(), config.fusion_part()
    assert isinstance(encoder, TiledEncoderConfig) and isinstance(fusion, CrossFusionConfig)
    return encoder, fusion, config.decoder_config()


def transformers_map(config: UniMMConfig, inner: bool) -> KeyMap:
    """The map of transformers' layout, whose names its releases write with or without `model.` in front."""
    encoder, fusion, decoder = _sizes(config)
    front = "model." if inner else ""
    text = "model.language_model." if inner else "language_model.model."
    vision, places = f"{front}vision_model.", sorted(fusion.layers)
    rows = [decoder.vocab_size, config.extra_tokens]
    tables = {"before": "pre_tile_positional_embedding", "after": "post_tile_positional_embedding"}
    blocks = (("blocks", "transformer"), ("global_blocks", "global_transformer"))
    rules = [
        Rule("vision.patch_embed.weight", f"{vision}patch_embedding.weight"),
        Rule("vision.class_token", f"{vision}class_embedding"),
        Rule("vision.places.positions", f"{vision}gated_positional_embedding.embedding"),
        Rule("vision.places.gate", f"{vision}gated_positional_embedding.gate"),
        Rule("vision.places.table", f"{vision}gated_positional_embedding.tile_embedding.weight",
             unflattened(encoder.tiles, encoder.tokens, -1)),
        *(Rule(f"vision.{ours}.gate", f"{vision}{theirs}.gate") for ours, theirs in tables.items()),
        *(Rule(f"vision.{ours}.table", f"{vision}{theirs}.embedding.weight",
               unflattened(encoder.tiles, 1, -1)) for ours, theirs in tables.items()),
        *(Rule(f"vision.norm_{ours}.{{end}}", f"{vision}layernorm_{theirs}.{{end}}")
          for ours, theirs in (("before", "pre"), ("after", "post"))),
        *(Rule(f"vision.{ours}.{{i}}.{own}.{{end}}", f"{vision}{theirs}.layers.{{i}}.{other}.{{end}}")
          for ours, theirs in blocks for own, other in _ENCODER_BLOCK.items()),
        *(Rule(f"vision.global_blocks.{{i}}.{own}", f"{vision}global_transformer.layers.{{i}}.{other}")
          for own, other in (("attention_gate", "gate_attn"), ("mlp_gate", "gate_ffn"))),
        Rule("connector.layers.0.{end}", f"{front}multi_modal_projector.{{end}}"),
        Rule("decoder.model.embed_tokens.weight", f"{text}embed_tokens.weight", share(0, rows)),
        Rule("extra_embedding.weight", f"{text}embed_tokens.weight", share(1, rows)),
        Rule("decoder.model.norm.weight", f"{text}norm.weight"),
        Rule("decoder.lm_head.weight", "lm_head.weight" if inner else "language_model.lm_head.weight"),
    ]  # fmt: skip
    for layer in range(decoder.num_hidden_layers):
        number = layer + sum(place <= layer for place in places)
        rules.append(Rule(f"decoder.model.layers.{layer}.{{rest}}", f"{text}layers.{number}.{{rest}}"))
    for number, place in enumerate(places):
        ours, theirs = f"fusion.blocks.{place}.", f"{text}layers.{place + number}."
        rules += [Rule(f"{ours}{own}.weight", f"{theirs}{other}.weight") for own, other in _BLOCK.items()]
        rules += [Rule(f"{ours}{own}", f"{theirs}{other}") for own, other in _GATES.items()]
    return KeyMap(rules=tuple(rules))


def original_map(config: UniMMConfig) -> KeyMap:
    """The map of Meta's layout."""
    encoder, fusion, decoder = _sizes(config)
    vision, text = "vision_model.vision_encoder.", "text_model."
    ratios, patch = by_ratio(encoder.tiles), encoder.patch
    tables = {"before": "pre_tile_pos_embed", "after": "post_tile_pos_embed"}
    inner = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
             "q_proj": "attn.wq", "k_proj": "attn.wk", "v_proj": "attn.wv", "o_proj": "attn.wo"}  # fmt: skip
    rules = [
        Rule("vision.patch_embed.weight", f"{vision}conv1._linear.weight", unflattened(3, patch, patch)),
        Rule("vision.class_token", f"{vision}class_embedding"),
        Rule("vision.places.positions", f"{vision}positional_embedding"),
        Rule("vision.places.gate", f"{vision}gated_positional_embedding_gate"),
        Rule("vision.places.table", f"{vision}gated_positional_embedding", ratios),
        *(Rule(f"vision.{ours}.gate", f"{vision}{theirs}.gate") for ours, theirs in tables.items()),
        *(Rule(f"vision.{ours}.table", f"{vision}{theirs}.embedding", ratios) for ours, theirs in tables.items()),
        *(Rule(f"vision.norm_{ours}.{{end}}", f"{vision}ln_{theirs}.{{end}}")
          for ours, theirs in (("before", "pre"), ("after", "post"))),
        *(Rule(f"vision.{ours}.{{i}}.{own}.{{end}}", f"{vision}{theirs}.resblocks.{{i}}.{other}.{{end}}")
          for ours, theirs in (("blocks", "transformer"), ("global_blocks", "global_transformer"))
          for own, other in inner.items()),
        *(Rule(f"vision.global_blocks.{{i}}.{own}", f"{vision}global_transformer.resblocks.{{i}}.{other}")
          for own, other in (("attention_gate", "gate_attn"), ("mlp_gate", "gate_ffn"))),
        Rule("connector.layers.0.{end}", "vision_model.vision_projection.{end}"),
        Rule("decoder.model.embed_tokens.weight", f"{text}tok_embeddings.weight"),
        Rule("extra_embedding.weight", f"{text}learnable_embedding.weight"),
        Rule("decoder.model.norm.weight", f"{text}norm.weight"),
        Rule("decoder.lm_head.weight", f"{text}output.weight"),
        *llama_layer("decoder.model.layers.{i}", f"{text}layers.{{i}}",
                     ("self_attn.", "mlp", "input_layernorm", "post_attention_layernorm"),
                     rotary_halves(decoder.num_attention_heads), rotary_halves(decoder.num_key_value_heads)),
    ]  # fmt: skip
    for number, place in enumerate(sorted(fusion.layers)):
        ours, theirs = f"fusion.blocks.{place}", f"{text}cross_attention_layers.{number}"
        rules += llama_layer(ours, theirs, ("", "mlp", "norm", "between"), SAME, SAME)
        rules += [
            Rule(f"{ours}.{name}_norm.weight", f"{theirs}.attention.{name}_norm.weight") for name in "qk"
        ]
        rules += [
            Rule(f"{ours}.attention_gate", f"{theirs}.gate_attn"),
            Rule(f"{ours}.mlp_gate", f"{theirs}.gate_ffwd"),
        ]
    return KeyMap(rules=tuple(rules), kept=("text_model.rope.freqs",))


def shard_axis(name: str) -> int | None:
    """Return the axis that a tensor of Meta's is cut along, where several devices share a model."""
    if re.search(r"\.(wo|w2|c_proj)\.weight$", name):
        return 1
    cut = r"\.(wq|wk|wv|w1|w3|c_fc|_linear|vision_projection|tok_embeddings|learnable_embedding|output)\.(weight|bias)$"
    return 0 if re.search(cut, name) else None


def unflattened(*shape: int) -> Op:
    """Return what makes a tensor [O, *shape] of a matrix [O, I]; -1 is what is left."""
    return Op(lambda theirs: theirs[0].unflatten(1, shape), lambda ours, _: [ours.flatten(1)])


def by_ratio(tiles: int) -> Op:
    """Return what makes a table by arrangement of tiles, [R + 1, T, k, C], of one by row and column, [T, T, k, C].

    Row 0 is of no image; a tile that an arrangement lacks has zeros. Cells beyond every arrangement are no part of it.
    """
    ratios = tile_ratios(tiles)

    def to_ours(theirs: Sequence[Tensor]) -> Tensor:
        (table,) = theirs
        found = table.new_zeros(len(ratios) + 1, *table.shape[1:])
        for number, (rows, columns) in enumerate(ratios, start=1):
            found[number, : rows * columns] = table[:rows, :columns].flatten(0, 1)
        return found

    def put_back(ours: Tensor, theirs: Tensor) -> Tensor:
        found = theirs.clone()
        for number, (rows, columns) in enumerate(ratios, start=1):
            found[:rows, :columns] = ours[number, : rows * columns].unflatten(0, (rows, columns))
        if not torch.equal(to_ours([found]), ours):
            raise ValueError("it has more than one vector for a row and column of tiles")
        return found

    def start(ours: Tensor) -> Tensor:
        return ours.new_zeros(tiles, *ours.shape[1:])

    return Op(to_ours, lambda ours, _: [start(ours)], put_back=put_back, start=start)

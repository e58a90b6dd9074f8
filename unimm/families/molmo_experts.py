"""MolmoE's decoder, OLMoE: as fields of transformers' config, and its tensors, of which each expert has its own.

Source: the code published with MolmoE-1B-0924 (`modeling_molmoe.py`), and transformers `models/olmoe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig

from unimm.errors import UserError
from unimm.families.common import decoder_of
from unimm.families.keymap import Op, Rule, share
from unimm.families.molmo_documents import ExpertDocument


def expert_decoder(document: ExpertDocument, where: str, ends: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the decoder as fields of transformers' config.

    Args:
        document: `config.json`.
        where: what errors call it.
        ends: the special tokens.

    Raises:
        UserError: a token goes to more experts than there are.
    """
    if document.moe_top_k > document.moe_num_experts:
        raise UserError(f"{where}: moe_top_k: {document.moe_top_k} of {document.moe_num_experts} experts")
    kind: Any = OlmoeConfig
    config = kind(
        vocab_size=document.embedding_size or document.vocab_size,
        hidden_size=document.d_model,
        intermediate_size=document.intermediate_size // 2,
        num_hidden_layers=document.n_layers,
        num_attention_heads=document.n_heads,
        num_key_value_heads=document.n_kv_heads or document.n_heads,
        num_experts=document.moe_num_experts,
        num_experts_per_tok=document.moe_top_k,
        norm_topk_prob=False,
        max_position_embeddings=document.max_sequence_length,
        rms_norm_eps=document.layer_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": document.rope_theta},
        tie_word_embeddings=False,
        **ends,
    )
    return decoder_of(config, OlmoeConfig)


def expert_rules(decoder: Any) -> list[Rule]:
    """Return the rules of the decoder's tensors."""
    inner, outer = "decoder.model.layers.{i}", "model.transformer.blocks.{i}"
    head = decoder.hidden_size // decoder.num_attention_heads
    keys = head * decoder.num_key_value_heads
    names = {
        "self_attn.o_proj": "attn.attn_out", "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
        "input_layernorm": "attn.attn_norm", "post_attention_layernorm": "mlp.ff_norm", "mlp.gate": "mlp.gate",
    }  # fmt: skip
    experts = [f"{outer}.mlp.experts.{number}" for number in range(decoder.num_experts)]
    halves = tuple(f"{expert}.{half}_proj.weight" for expert in experts for half in ("gate", "up"))
    return [
        *(
            Rule(
                f"{inner}.self_attn.{name}_proj.weight",
                f"{outer}.attn.att_proj.weight",
                share(index, [decoder.hidden_size, keys, keys]),
            )
            for index, name in enumerate("qkv")
        ),
        *(Rule(f"{inner}.{ours}.weight", f"{outer}.{theirs}.weight") for ours, theirs in names.items()),
        Rule(f"{inner}.mlp.experts.gate_up_proj", halves, stacked(2)),
        Rule(
            f"{inner}.mlp.experts.down_proj",
            tuple(f"{expert}.down_proj.weight" for expert in experts),
            stacked(1),
        ),
        Rule("decoder.lm_head.weight", "lm_head.weight"),
    ]


def stacked(each: int) -> Op:
    """Return what makes a stack [E, O, I] of the matrices of the experts, `each` of which lie one above the other."""

    def to_ours(theirs: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.cat(list(theirs[at : at + each])) for at in range(0, len(theirs), each)])

    return Op(to_ours, lambda ours, _: [half for expert in ours for half in expert.chunk(each)])

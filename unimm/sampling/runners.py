"""Lean passes of decoders whose layers differ from Llama's: Persimmon's (Fuyu) and those with experts (Aria).

Shape suffixes: A rows, t new positions, P of all rows, C width, H heads, D head width, E experts, K of them that a
position is sent to, F the width of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.models.modeling import UniMMModel
from unimm.models.placing import is_spread
from unimm.sampling.cache import RowCache, RowsAt
from unimm.sampling.decoder import Layer, LlamaRunner, Runner, half_turn, is_small
from unimm.sampling.products import product

GATHERED = 32  # positions times experts up to which the weights of each are copied together


def make_runner(model: UniMMModel) -> Runner:
    """Return the fastest runner that a model's decoder allows."""
    decoder = model.decoder.get_decoder()
    lean = () if is_spread(model) else (LlamaRunner, PersimmonRunner, ExpertsRunner)
    return next((kind for kind in lean if kind.runs(decoder)), Runner)(decoder)


class PersimmonRunner(LlamaRunner):
    """Runs Persimmon's layers directly; same results as `Runner`, up to rounding."""

    kinds, activation = ("persimmon",), "relu2"

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder)
        self.turned = decoder.layers[0].self_attn.rotary_ndims  # of each head

    @staticmethod
    def prepared(layers: nn.ModuleList) -> list[Any]:
        """See `LlamaRunner`."""
        return [PersimmonLayer(layer) for layer in layers]

    @staticmethod
    def last_norm(decoder: Any) -> nn.Module:
        """See `LlamaRunner`."""
        norm: nn.Module = decoder.final_layernorm
        return norm

    def _attend(
        self,
        layer: Any,
        number: int,
        cache: RowCache,
        at: RowsAt,
        stream: Tensor,
        rotary: tuple[Tensor, Tensor],
        seen: Tensor | None,
    ) -> Tensor:
        rows, count, _ = stream.shape
        # queries, keys and values of each head lie beside each other: [A, 3, H, t, D]
        heads = layer.project(stream).view(rows, count, self.heads, 3, self.head_width).permute(0, 3, 2, 1, 4)
        both = layer.norm_heads(heads[:, :2])
        turning, still = both.split([self.turned, self.head_width - self.turned], dim=-1)
        turning = turning * rotary[0][:, None] + half_turn(turning) * rotary[1][:, None]
        queries, keys = torch.cat([turning, still], dim=-1).unbind(1)
        keys, values = cache.write(number, at, keys, heads[:, 2])
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        output: Tensor = layer.output(found.transpose(1, 2).flatten(2))
        return output


class PersimmonLayer:
    """One of Persimmon's layers: its norms and products.

    Args:
        layer: of transformers.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.first, self.output = product(attention.query_key_value), product(attention.dense)
        self.up, self.down = product(mlp.dense_h_to_4h), product(mlp.dense_4h_to_h)
        self.head_norms: tuple[Tensor, Tensor] | None = None
        if attention.qk_layernorm:
            norms = (attention.q_layernorm, attention.k_layernorm)
            self.epsilon = norms[0].eps
            scales, shifts = (
                torch.stack([getattr(norm, name) for norm in norms])[:, None, None]
                for name in ("weight", "bias")
            )  # [2, 1, 1, D]
            self.head_norms = scales, shifts

    def project(self, stream: Tensor) -> Tensor:
        """Queries, keys and values [A, t, H 3 D]."""
        return self.first(self.before(stream))

    def norm_heads(self, heads_A2HtD: Tensor) -> Tensor:
        """Queries and keys, each normalised by its own norm."""
        if self.head_norms is None:
            return heads_A2HtD
        scales, shifts = self.head_norms
        normal = F.layer_norm(heads_A2HtD, heads_A2HtD.shape[-1:], eps=self.epsilon)
        return torch.addcmul(shifts, normal, scales)

    def transform(self, stream: Tensor) -> Tensor:
        """What the norm and the MLP make of a stream [A, t, C]."""
        return self.down(F.relu(self.up(self.between(stream))).square())


class ExpertsRunner(LlamaRunner):
    """Runs Llama's layers with experts directly; same results as `Runner`, up to rounding."""

    kinds = ("aria_text",)

    @staticmethod
    def prepared(layers: nn.ModuleList) -> list[Any]:
        """See `LlamaRunner`."""
        joined = is_small(layers)
        return [ExpertsLayer(layer, joined) for layer in layers]


class ExpertsLayer(Layer):
    """One of Llama's layers whose MLP is one for all and some of several experts beside it.

    Args:
        layer: of transformers.
        joined: see `Layer`; also whether the experts of a few positions are gathered.
    """

    def __init__(self, layer: Any, joined: bool) -> None:
        super().__init__(layer, joined)
        router, experts = layer.mlp.router, layer.mlp.experts
        self.router, self.chosen, self.experts = router.weight, router.top_k, experts
        self.gathers = joined and isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter)

    @staticmethod
    def gated_mlp(layer: Any) -> Any:
        """See `Layer`."""
        return layer.mlp.shared_experts

    def gated(self, stream: Tensor) -> Tensor:
        """What all and the chosen experts give together [A, t, C]."""
        rows = stream.flatten(0, 1)
        logits, chosen = F.linear(rows, self.router).topk(self.chosen, dim=-1)
        weights = logits.softmax(-1)
        few = self.gathers and chosen.numel() <= GATHERED
        found = self._gathered(rows, chosen, weights) if few else self.experts(rows, chosen, weights)
        return super().gated(stream) + found.view_as(stream)

    def _gathered(self, rows_PC: Tensor, chosen_PK: Tensor, weights_PK: Tensor) -> Tensor:
        """The experts' results [P, C], by one product of all: calls of each cost more than copies of small weights."""
        which = chosen_PK.flatten()
        each = rows_PC.repeat_interleave(self.chosen, 0)[:, None]
        gate, up = torch.bmm(each, self.experts.gate_up_proj[which]).chunk(2, dim=-1)
        inner = F.silu(gate) * up * weights_PK.view(-1, 1, 1)  # [P K, 1, F]
        down = self.experts.down_proj[which].view(len(rows_PC), -1, rows_PC.shape[1])
        return torch.bmm(inner.view(len(rows_PC), 1, -1), down)[:, 0]

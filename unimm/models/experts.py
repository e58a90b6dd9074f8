"""Mixtures of experts in decoders: how many a token runs through, the losses of their routers, and small weights.

transformers keeps the experts of a layer as two stacks, `gate_up_proj` and `down_proj`, each [E, O, I] (Aria's
[E, I, O]), which are no linear layers. Shape suffixes: P positions, E experts, K of them that a position is sent to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unimm.models.inputs import Rows
from unimm.models.quantization import MakeSmall

_COUNTS = ("moe_num_experts", "num_local_experts", "num_experts")  # as the configs of decoders name it
_CHOSEN = ("moe_topk", "num_experts_per_tok")


class Routing(NamedTuple):
    """How positions are sent to experts.

    Attributes:
        experts: of a layer, those that every position is sent to not counted.
        chosen: how many of them a position is sent to.
    """

    experts: int
    chosen: int


def routing(config: PreTrainedConfig) -> Routing | None:
    """Return how a decoder sends positions to experts; None where it has none."""
    experts, chosen = (
        next((int(value) for name in names if (value := getattr(config, name, None))), 0)
        for names in (_COUNTS, _CHOSEN)
    )
    return Routing(experts, chosen) if experts and chosen else None


def stacked_experts(decoder: nn.Module) -> Iterator[Any]:
    """Give the module of each layer that holds its experts."""
    for module in decoder.modules():
        stack = getattr(module, "gate_up_proj", None)
        if isinstance(stack, nn.Parameter) and stack.ndim == 3:
            yield module


def idle_weights(decoder: Any) -> int:
    """Return how many weights of a decoder a position does not run through: those of the experts not chosen."""
    routed = routing(decoder.config)
    if routed is None:
        return 0
    weights: list[int] = [p.numel() for module in stacked_experts(decoder) for p in module.parameters()]
    return sum(weights) // routed.experts * (routed.experts - routed.chosen)


class RouterLosses(NamedTuple):
    """What is added to the loss of a decoder with experts, each a scalar.

    Attributes:
        balance: K where experts get equally many positions, more where some get more.
        z: mean square of the log of the sum of a router's exponents, which keeps its logits small.
    """

    balance: Tensor
    z: Tensor


def router_losses(logits: Sequence[Tensor], chosen: int, real: Tensor | None = None) -> RouterLosses:
    """Return the losses of routers, over all layers together, as transformers has the first.

    Sources: Fedus et al. 2021 (arXiv 2101.03961), equation 4; Zoph et al. 2022 (arXiv 2202.08906), equation 5.

    Args:
        logits: [P, E] of each layer.
        chosen: how many experts a position is sent to.
        real: bool [P], which positions are no padding; None: all.
    """
    layers = [layer.float() if real is None else layer.float()[real] for layer in logits]
    probabilities = torch.stack([layer.softmax(-1).sum(0) for layer in layers]).sum(0)
    sent = torch.stack([_sent(layer, chosen) for layer in layers]).sum(0)
    squares = torch.stack([layer.logsumexp(-1).square().sum() for layer in layers]).sum()
    rows = max(sum(len(layer) for layer in layers), 1)
    balance = layers[0].shape[1] * (probabilities / rows * (sent / rows)).sum()
    return RouterLosses(balance, squares / rows)


def losses_of_routers(
    output: Any, config: PreTrainedConfig, attention_mask: Tensor | None, rows: Rows | None
) -> RouterLosses | None:
    """Return the losses of a decoder's routers; None where its output has no logits of any.

    Args:
        output: of the decoder, run with `output_router_logits`.
        config: of the decoder.
        attention_mask: [B, T] with 0 at padding; None, or one of another shape: nothing is padding.
        rows: of several samples; they say then what is padding.
    """
    logits, routed = getattr(output, "router_logits", None), routing(config)
    if not logits or routed is None:
        return None
    real = attention_mask if rows is None else rows.samples >= 0
    flat = real.flatten().bool() if real is not None and real.ndim == 2 else None
    return router_losses(logits, routed.chosen, flat)


def _sent(logits_PE: Tensor, chosen: int) -> Tensor:
    """How many positions each expert gets, [E]."""
    which_PK = logits_PE.detach().topk(chosen, -1).indices
    return torch.zeros_like(logits_PE).scatter_(1, which_PK, 1.0).sum(0)


class SmallExperts(nn.Module):
    """The experts of a layer with small weights, each a pair of quantised layers.

    Which way a layer computes does not depend on how many positions an expert gets, so that a sequence gives the same
    alone and in a batch.

    Args:
        experts: those of transformers.
        make: makes a quantised layer of a linear one.
    """

    def __init__(self, experts: Any, make: MakeSmall) -> None:
        super().__init__()
        turned = bool(getattr(experts, "is_transposed", False))
        self.gate_up, self.down = (
            nn.ModuleList(
                make(_linear(weight.T.contiguous() if turned else weight)) for weight in stack.detach()
            )
            for stack in (experts.gate_up_proj, experts.down_proj)
        )
        self.act_fn = experts.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [P, C].

        Args:
            hidden_states: [P, C].
            top_k_index: int64 [P, K], the experts of each.
            top_k_weights: [P, K], what each is worth.
        """
        found = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            rows, places = torch.where(top_k_index == expert)
            gate, up = self.gate_up[expert](hidden_states[rows]).chunk(2, dim=-1)
            outputs = self.down[expert](self.act_fn(gate) * up) * top_k_weights[rows, places, None]
            found.index_add_(0, rows, outputs.to(found.dtype))
        return found


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer of a weight [O, I]."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def quantise_experts(decoder: nn.Module, make: MakeSmall) -> None:
    """Put small weights in the place of a decoder's experts, one layer after the other.

    Args:
        decoder: changed in place.
        make: makes a quantised layer of a linear one.
    """
    stacked = {id(module) for module in stacked_experts(decoder)}
    found = [
        (parent, name)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if id(child) in stacked
    ]
    for parent, name in found:
        setattr(parent, name, SmallExperts(getattr(parent, name), make))

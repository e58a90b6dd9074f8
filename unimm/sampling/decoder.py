"""The decoder, step by step, without what a general model does around each step.

A small decoder spends nearly all of a step on building masks, cache objects and module calls. Here the masks and
rotary tables of a whole drawing are made once, the cache is one tensor a layer, and small weights are joined, so
that a step is little more than its matrix products. Decoders other than Llama's run through their own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

from unimm.models.attention import positions
from unimm.models.modeling import UniMMModel
from unimm.models.quantization import Int8Linear

JOINED = 2**26  # weights up to which weights are joined: above, copies cost more than calls save
FEW = range(2, 9)  # rows for which torch multiplies slowly on the CPU, the weight second


def make_steps(model: UniMMModel, attention_mask: Tensor, length: int) -> Steps:
    """Return the fastest runner that a model's decoder allows.

    Args:
        model: the unified model.
        attention_mask: [B, T] of the prompt, with 0 at padding on the left.
        length: positions of prompt and drawing together.
    """
    mask = F.pad(attention_mask, (0, length - attention_mask.shape[1]), value=1)
    decoder = model.decoder.get_decoder()
    return (LlamaSteps if LlamaSteps.runs(decoder) else Steps)(model, decoder, mask)


class Steps:
    """Runs any transformers decoder over a static cache.

    Args:
        model: the unified model.
        decoder: its decoder without a head.
        mask: [B, L], 0 at padding, for all positions that there will be.
    """

    def __init__(self, model: UniMMModel, decoder: Any, mask: Tensor) -> None:
        self.decoder = decoder
        self.mask = mask
        self.places = positions(mask)
        self.filled = 0
        self._start(model)

    def _start(self, model: UniMMModel) -> None:
        self.cache = StaticCache(config=model.decoder.config, max_cache_len=self.mask.shape[1])

    def __call__(self, stream: Tensor) -> Tensor:
        """Return the last hidden state [B, C] after the next positions [B, t, C]."""
        end = self.filled + stream.shape[1]
        output = self.decoder(
            inputs_embeds=stream,
            attention_mask=self.mask[:, :end],
            position_ids=self.places[:, self.filled : end],
            cache=self.cache,
            use_cache=True,
        )
        self.filled = end
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


class LlamaSteps(Steps):
    """Runs Llama's layers directly; same results as `Steps`, up to rounding."""

    @staticmethod
    def runs(decoder: Any) -> bool:
        """Whether a decoder is made of exactly the layers that are run here."""
        config = decoder.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return (
            config.model_type == "llama"
            and config.hidden_act == "silu"
            and rope in ("default", "linear", "llama3")  # tables that do not depend on the length
        )

    def _start(self, model: UniMMModel) -> None:
        config = self.decoder.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim
        batch, length = self.mask.shape
        weight = self.decoder.norm.weight  # of the stream's format, whatever the linear layers hold
        cos, sin = self.decoder.rotary_emb(weight.new_empty(batch, 1), self.places)  # [B, L, D]
        self.cos, self.sin = cos.unsqueeze(1), sin.unsqueeze(1)
        shape = (2, batch, self.groups, length, self.width)
        self.caches = [weight.new_zeros(shape) for _ in self.decoder.layers]
        padded = not bool(self.mask.all())
        self.bias: Tensor | None = None  # what is added to scores: -inf where padding is
        if padded:
            self.bias = torch.zeros(batch, 1, 1, length, dtype=weight.dtype, device=weight.device)
            self.bias.masked_fill_(self.mask[:, None, None] == 0, -math.inf)
        layers = self.decoder.layers
        joined = sum(t.numel() for t in chain(layers.parameters(), layers.buffers())) <= JOINED
        self.layers = [_Layer(layer, joined) for layer in self.decoder.layers]

    def __call__(self, stream: Tensor) -> Tensor:
        """Return the last hidden state [B, C] after the next positions [B, t, C]."""
        start, end = self.filled, self.filled + stream.shape[1]
        cos, sin = self.cos[:, :, start:end], self.sin[:, :, start:end]
        bias = self._bias(start, end)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            stream = stream + self._attend(layer, stream, cache, cos, sin, bias)
            stream = stream + layer.transform(stream)
        self.filled = end
        hidden: Tensor = self.decoder.norm(stream[:, -1])
        return hidden

    def _bias(self, start: int, end: int) -> Tensor | None:
        """Return what is added to scores [B, 1, t, end], None where everything may be seen."""
        bias = None if self.bias is None else self.bias[..., :end]
        if end - start == 1:
            return bias
        later = torch.full((end - start, end), -math.inf, device=self.cos.device, dtype=self.cos.dtype)
        later = later.triu(start + 1)
        if bias is None:
            return later
        # A padded position sees itself, lest its row be of nothing but -inf.
        own = torch.eye(end - start, end, dtype=torch.bool, device=later.device).roll(start, 1)
        return (later + bias).masked_fill(own, 0.0)

    def _attend(
        self, layer: _Layer, stream: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None
    ) -> Tensor:
        batch, count, _ = stream.shape
        start, end = self.filled, self.filled + count
        heads = (
            layer.project(stream).view(batch, count, -1, self.width).transpose(1, 2)
        )  # [B, q + k + v, t, D]
        turned, values = heads.split([self.heads + self.groups, self.groups], dim=1)
        turned = turned * cos + _half_turn(turned) * sin
        queries, keys = turned.split([self.heads, self.groups], dim=1)
        cache[0, :, :, start:end], cache[1, :, :, start:end] = keys, values
        seen = F.scaled_dot_product_attention(
            queries,
            cache[0, :, :, :end],
            cache[1, :, :, :end],
            attn_mask=bias,
            enable_gqa=self.groups != self.heads,
        )
        return layer.output(seen.transpose(1, 2).flatten(2))


class _Layer:
    """One of Llama's layers: its norms and products, the small ones joined."""

    def __init__(self, layer: Any, joined: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        first = (attention.q_proj, attention.k_proj, attention.v_proj)
        second = (mlp.gate_proj, mlp.up_proj)
        self.first = _join(first) if joined and _plain(first) else _Beside(first)
        self.second = _join(second) if joined and _plain(second) else _Beside(second)
        self.output, self.down = _product(attention.o_proj), _product(mlp.down_proj)

    def project(self, stream: Tensor) -> Tensor:
        """Queries, keys and values [B, t, (q + k + v) D]."""
        return self.first(_norm(self.before, stream))

    def transform(self, stream: Tensor) -> Tensor:
        """The gated MLP [B, t, C]."""
        gate, up = self.second(_norm(self.between, stream)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class _Beside:
    """Linear layers one after the other, their results joined."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self.layers = [_product(layer) for layer in layers]

    def __call__(self, stream: Tensor) -> Tensor:
        return torch.cat([layer(stream) for layer in self.layers], dim=-1)


def _plain(layers: tuple[nn.Module, ...]) -> bool:
    """Whether weight and bias are all there is to each of several linear layers: one with an adapter is more."""
    return all(type(layer) in (nn.Linear, Int8Linear) for layer in layers)


def _join(layers: tuple[Any, ...]) -> Any:
    """One linear function in place of several."""
    if isinstance(layers[0], Int8Linear):
        return Int8Linear.join(layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return partial(_linear, weight, bias)


def _product(layer: Any) -> Callable[[Tensor], Tensor]:
    """A linear layer as a function."""
    return partial(_linear, layer.weight, layer.bias) if type(layer) is nn.Linear else layer


def _linear(weight: Tensor, bias: Tensor | None, stream: Tensor) -> Tensor:
    """Apply a linear layer; to a few rows on the CPU with the weight first, in a quarter to nine tenths of the time."""
    rows = stream.numel() // stream.shape[-1]
    if not (rows in FEW and stream.dtype == torch.float32 and stream.device.type == "cpu"):
        return F.linear(stream, weight, bias)
    result = torch.mm(weight, stream.reshape(rows, -1).t()).t().contiguous().view(*stream.shape[:-1], -1)
    return result if bias is None else result + bias


def _norm(norm: Any, stream: Tensor) -> Tensor:
    """RMS norm; transformers' own rounds in between, which only matters in 16 bits."""
    if stream.dtype == torch.float32:
        return F.rms_norm(stream, (stream.shape[-1],), norm.weight, norm.variance_epsilon)
    result: Tensor = norm(stream)
    return result


def _half_turn(heads: Tensor) -> Tensor:
    """Swap the halves of each head, the first negated (rotary embedding as Llama has it)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

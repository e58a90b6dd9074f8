"""The decoder over a cache of rows: one pass over the new positions of each row.

A small decoder spends nearly all of a pass on building masks, cache objects and module calls. Here rotary tables are
made once, a pass has one mask, and small weights are joined, so that it is little more than its matrix products. This
is done for Llama's blocks, which Mistral and Qwen2 share, and for those of `runners.py`; every other decoder runs
through its own forward, over the same cache. Shape suffixes: A rows, t new positions, C width, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.models.fusion import FUSION_KEYWORD, Looking
from unimm.models.quantization import Int4Linear, Int8Linear
from unimm.sampling.cache import RowCache, RowsAt, cache_view
from unimm.sampling.products import multiply, product

JOINED = 2**26  # weights up to which weights are joined: above, copies cost more than calls save
JOINABLE = (nn.Linear, Int8Linear, Int4Linear)
LLAMA_LIKE = ("llama", "mistral", "qwen2")
ROPES = ("default", "linear", "llama3", "yarn", "dynamic")  # rotary tables that do not depend on the length,
GROWING = "dynamic"  # and those that do beyond the length that was trained


class Runner:
    """Runs any transformers decoder with attention over a row cache.

    Args:
        decoder: without its head.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.config = decoder.config.get_text_config()
        self.layers_count: int = self.config.num_hidden_layers

    def __call__(
        self,
        cache: RowCache,
        at: RowsAt,
        stream_AtC: Tensor,
        positions: Tensor | None = None,
        looking: Looking | None = None,
    ) -> Tensor:
        """Return the hidden states [A, t, C] of new positions, and write their keys and values.

        Args:
            cache: of all rows.
            at: where the new positions lie.
            stream_AtC: what the decoder reads there.
            positions: [A, t], where they do not count the row's tokens.
            looking: what the rows look at by cross-attention; None: nothing.
        """
        output = self.decoder(
            inputs_embeds=stream_AtC,
            attention_mask=self._masks(at, stream_AtC),
            position_ids=at.positions if positions is None else positions,
            cache=cache_view(cache, at),
            use_cache=True,
            **({} if looking is None else {FUSION_KEYWORD: looking}),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _masks(self, at: RowsAt, stream: Tensor) -> Any:
        """Return what is added to scores, for each kind of layer where a decoder has several."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        if len(kinds) > 1:
            return {kind: self._mask(at, stream, window if "sliding" in kind else None) for kind in kinds}
        slides = kinds == {"sliding_attention"} or (not kinds and window is not None)
        return self._mask(at, stream, window if slides else None)

    @staticmethod
    def _mask(at: RowsAt, stream: Tensor, window: int | None) -> Tensor:
        seen = at.seen(window)
        shape = (at.count, 1, at.width, at.end)
        mask = stream.new_zeros(shape)
        return mask if seen is None else mask.masked_fill(~seen, torch.finfo(stream.dtype).min)


class LlamaRunner(Runner):
    """Runs Llama's layers directly; same results as `Runner`, up to rounding.

    Args:
        decoder: without its head.
        layers: its layers where they are not the decoder's own.
    """

    kinds: ClassVar[tuple[str, ...]] = LLAMA_LIKE
    activation: ClassVar[str] = "silu"

    def __init__(self, decoder: Any, layers: Iterable[Layer] | None = None) -> None:
        super().__init__(decoder)
        config = self.config
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.tables: tuple[Tensor, Tensor] | None = None
        # positions up to which the tables hold
        self.fixed = config.max_position_embeddings - 1 if _rope(config) == GROWING else sys.maxsize
        self.layers = self.prepared(decoder.layers) if layers is None else layers
        self.norm = self.last_norm(decoder)

    @staticmethod
    def prepared(layers: nn.ModuleList) -> list[Any]:
        """Return a decoder's layers, the products of small ones joined."""
        joined = is_small(layers)
        return [Layer(layer, joined) for layer in layers]

    @staticmethod
    def last_norm(decoder: Any) -> nn.Module:
        """Return the norm behind the last layer."""
        norm: nn.Module = decoder.norm
        return norm

    @classmethod
    def runs(cls, decoder: Any) -> bool:
        """Whether a decoder is made of exactly the layers that are run here."""
        config = decoder.config
        slides = getattr(config, "sliding_window", None) is not None and getattr(
            config, "use_sliding_window", True
        )
        return (
            config.model_type in cls.kinds
            and config.hidden_act == cls.activation
            and _rope(config) in ROPES
            and not slides
        )

    def __call__(
        self,
        cache: RowCache,
        at: RowsAt,
        stream_AtC: Tensor,
        positions: Tensor | None = None,
        looking: Looking | None = None,
    ) -> Tensor:
        """See `Runner`."""
        rotary = self._rotary(at, stream_AtC, positions)
        seen, stream = at.seen(), stream_AtC
        for number, layer in enumerate(self.layers):
            if looking is not None:
                stream = looking.before(number, stream)
            stream = stream + self._attend(layer, number, cache, at, stream, rotary, seen)
            stream = stream + layer.transform(stream)
        hidden: Tensor = self.norm(stream)
        return hidden

    def _rotary(self, at: RowsAt, stream: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [A or 1, 1, t, D]."""
        if positions is not None or at.end > self.fixed:
            if positions is None:  # a short row lets it forget how long others were
                self.decoder.rotary_emb(stream, at.positions.new_zeros(1, 1))
            cos, sin = self.decoder.rotary_emb(stream, at.positions if positions is None else positions)
            return cos[:, None], sin[:, None]
        if self.tables is None or self.tables[0].shape[0] < at.end or self.tables[0].dtype != stream.dtype:
            length = torch.arange(min(max(2 * at.end, 256), self.fixed), device=stream.device)[None]
            self.tables = tuple(table[0] for table in self.decoder.rotary_emb(stream, length))
        cos, sin = self.tables
        if at.start is not None:
            part = slice(at.start, at.start + at.width)
            return cos[None, None, part], sin[None, None, part]
        return cos[at.positions][:, None], sin[at.positions][:, None]

    def _attend(
        self,
        layer: Layer,
        number: int,
        cache: RowCache,
        at: RowsAt,
        stream: Tensor,
        rotary: tuple[Tensor, Tensor],
        seen: Tensor | None,
    ) -> Tensor:
        rows, count, _ = stream.shape
        # [A, q + k + v, t, D]
        heads = layer.project(stream).view(rows, count, -1, self.head_width).transpose(1, 2)
        turned, values = heads.split([self.heads + self.groups, self.groups], dim=1)
        turned = turned * rotary[0] + half_turn(turned) * rotary[1]
        queries, keys = turned.split([self.heads, self.groups], dim=1)
        keys, values = cache.write(number, at, keys, values)
        found = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, enable_gqa=self.groups != self.heads
        )
        return layer.output(found.transpose(1, 2).flatten(2))


class Layer:
    """One of Llama's layers: its norms and products.

    Args:
        layer: of transformers.
        joined: whether products of the same inputs are made one, by a copy of their weights.
    """

    def __init__(self, layer: Any, joined: bool) -> None:
        attention, mlp = layer.self_attn, self.gated_mlp(layer)
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        first = (attention.q_proj, attention.k_proj, attention.v_proj)
        second = (mlp.gate_proj, mlp.up_proj)
        self.first = _join(first) if joined and _plain(first) else _Beside(first)
        self.second = _join(second) if joined and _plain(second) else _Beside(second)
        self.output, self.down = product(attention.o_proj), product(mlp.down_proj)

    @staticmethod
    def gated_mlp(layer: Any) -> Any:
        """Return its MLP that every position runs through."""
        return layer.mlp

    def project(self, stream: Tensor) -> Tensor:
        """Queries, keys and values [A, t, (q + k + v) D]."""
        return self.first(rms_norm(self.before, stream))

    def transform(self, stream: Tensor) -> Tensor:
        """What the norm and the MLP make of a stream [A, t, C]."""
        return self.gated(rms_norm(self.between, stream))

    def gated(self, stream: Tensor) -> Tensor:
        """The gated MLP [A, t, C]."""
        gate, up = self.second(stream).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def is_small(layers: nn.Module) -> bool:
    """Whether weights are so few that copies of them cost less than the calls that they save."""
    return sum(t.numel() for t in chain(layers.parameters(), layers.buffers())) <= JOINED


def _rope(config: Any) -> str:
    """How a decoder's rotary table is made."""
    kind: str = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return kind


class _Beside:
    """Linear layers one after the other, their results joined."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self.layers = [product(layer) for layer in layers]

    def __call__(self, stream: Tensor) -> Tensor:
        return torch.cat([layer(stream) for layer in self.layers], dim=-1)


def _plain(layers: tuple[nn.Module, ...]) -> bool:
    """Whether weight and bias are all there is to each of several linear layers: one with an adapter is more."""
    return type(layers[0]) in JOINABLE and all(type(layer) is type(layers[0]) for layer in layers)


def _join(layers: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    """One linear function in place of several."""
    if isinstance(layers[0], Int8Linear | Int4Linear):
        return type(layers[0]).join(layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return lambda stream: multiply(weight, bias, stream)


def rms_norm(norm: Any, stream: Tensor) -> Tensor:
    """Return an RMS norm's result; transformers' own rounds in between, which only matters in 16 bits."""
    if stream.dtype in (torch.float32, torch.float64):
        return F.rms_norm(stream, (stream.shape[-1],), norm.weight.to(stream.dtype), norm.variance_epsilon)
    result: Tensor = norm(stream)
    return result


def half_turn(heads: Tensor) -> Tensor:
    """Return each head with its halves swapped, the first negated (rotary embedding as Llama has it)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

"""How what an encoder saw reaches the decoder: as rows of the stream, as a memory that it looks at, or as both.

A memory is looked at through gated blocks before some of the decoder's layers. They stand outside the decoder, so that
it keeps its own keys, and its own answers where there is no image. Sources: meta-llama/llama-models
`models/llama3/multimodal/model.py` (the block of Llama 3.2), Dai et al. 2024 (arXiv 2409.11402: NVLM-X, NVLM-H).

Shape suffixes: B rows, T positions of the stream, S rows of the memory, C decoder width, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.models.fusion_parts import BothFusionConfig, CrossFusionConfig, Sight

FUSION_KEYWORD = "fusion_memory"  # keyword by which it goes through a decoder to the blocks
Looks = Callable[[int, int], Tensor]
"""Row and position -> bool [T], which positions of the row may look there."""


class Embedded(NamedTuple):
    """What the decoder reads.

    Attributes:
        stream: [B, T, C], a row for each token.
        memory: what the decoder looks at by cross-attention; None: nothing.
        positions: [3, B, T], of time, row and column, where images have these; None: tokens are counted.
    """

    stream: Tensor
    memory: Memory | None = None
    positions: Tensor | None = None


def scatter_rows(target: Tensor, mask: Tensor, rows: Tensor, what: str, add: bool = False) -> Tensor:
    """Return `target` [B, T, C] with its masked positions filled, in order, by `rows` [N, C].

    Args:
        target: the stream.
        mask: bool [B, T].
        rows: what is put there.
        what: for errors.
        add: whether rows are added to what is there.

    Raises:
        ValueError: the number of rows is not that of the masked positions.
    """
    places = int(mask.sum())
    if places != rows.shape[0]:
        raise ValueError(
            f"{what}: {rows.shape[0]} given, but the tokens have room for {places}; was the prompt cut in an image?"
        )
    if not places:
        return target
    where, rows = mask.unsqueeze(-1), rows.to(target.dtype)
    if add:
        return target + torch.zeros_like(target).masked_scatter(where, rows)
    return target.masked_scatter(where, rows)


# --- what is looked at --------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Rows of a memory that are seen by the same tokens: an image, or a tile of one.

    Attributes:
        row: of the batch.
        mark: position from which it may be seen.
        last: position of the last mark of its image.
        size: its rows.
    """

    row: int
    mark: int
    last: int
    size: int


def visible_rows(pieces: Sequence[Piece], shape: tuple[int, int], looks: Looks, sees: Sight) -> Tensor:
    """Return which rows of a memory each token sees: bool [B, T, S], S of the row that has most.

    Args:
        pieces: in the order of the stream.
        shape: B and T.
        looks: who may look at a position, as far as the decoder's own attention goes.
        sees: see `CrossFusionConfig`.
    """
    owned = [[piece for piece in pieces if piece.row == row] for row in range(shape[0])]
    most = max(sum(piece.size for piece in own) for own in owned)
    visible = None
    for row, own in enumerate(owned):
        if not own:
            continue
        seen = _narrowed(torch.stack([looks(row, piece.mark) for piece in own], dim=1), own, sees)
        if visible is None:
            visible = torch.zeros(*shape, most, dtype=torch.bool, device=seen.device)
        counts = torch.tensor([piece.size for piece in own], device=seen.device)
        spread = seen.repeat_interleave(counts, dim=1)
        visible[row, :, : spread.shape[1]] = spread
    assert visible is not None
    return visible


def _narrowed(seen: Tensor, pieces: Sequence[Piece], sees: Sight) -> Tensor:
    """Which pieces of a row [T, K] are seen, of those that may be."""
    if sees == "sample":
        return seen
    if sees == "tile":
        time = torch.arange(len(seen), device=seen.device)[:, None]
        marks, lasts = (
            torch.tensor([getattr(piece, name) for piece in pieces], device=seen.device)
            for name in ("mark", "last")
        )
        return seen & ((time == marks) | (time > lasts))
    group, groups = -1, []
    for before, piece in zip([None, *pieces], pieces, strict=False):
        group += before is None or piece.mark != before.mark + 1
        groups.append(group)
    number = torch.tensor(groups, device=seen.device)
    latest = number.where(seen, -1).amax(1, keepdim=True)  # of those that a token sees, not of the row's
    return seen & (number == latest)


class Attended(Protocol):
    """What blocks look at in one pass."""

    def through(self, name: str, block: CrossBlock, stream: Tensor) -> Tensor:
        """Return the stream [B, T, C] behind a block."""


class Memory(NamedTuple):
    """What the rows of a batch look at.

    Attributes:
        states: [B, S, C], filled up with zeros.
        visible: bool [B, T, S].
    """

    states: Tensor
    visible: Tensor

    def through(self, name: str, block: CrossBlock, stream: Tensor) -> Tensor:
        """See `Attended`."""
        behind: Tensor = block(stream, *block.read(self.states), self.visible)
        return behind

    @classmethod
    def of(cls, pieces: Sequence[Piece], rows: Sequence[Tensor], visible: Tensor) -> Memory:
        """Return the memory of pieces with rows [size, C] each."""
        batch, _, most = visible.shape
        stacks = []
        for row in range(batch):
            own = [part for piece, part in zip(pieces, rows, strict=True) if piece.row == row]
            stack = torch.cat([rows[0][:0], *own])
            stacks.append(F.pad(stack, (0, 0, 0, most - len(stack))))
        return cls(torch.stack(stacks), visible)

    @classmethod
    def unseen(cls, stream: Tensor) -> Memory:
        """Return a memory that no position of a stream [B, T, C] sees: blocks run on it, and change nothing."""
        states = stream[:, :1]
        return cls(states, torch.zeros(*stream.shape[:2], 1, dtype=torch.bool, device=stream.device))


# --- who looks ----------------------------------------------------------------------------------------------


class GatedFeedForward(nn.Module):
    """Llama's MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Return [..., C]."""
        product: Tensor = self.down_proj(F.silu(self.gate_proj(stream)) * self.up_proj(stream))
        return product


class CrossBlock(nn.Module):
    """Gated cross-attention and a gated MLP, without positions; both add nothing at first.

    A token that sees nothing gets exactly nothing, as in Meta's code; transformers 5.24 lets the attention through.

    Args:
        config: of the fusion.
        width: of the decoder.
    """

    def __init__(self, config: CrossFusionConfig | BothFusionConfig, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        head = width // config.heads
        self.norm = nn.RMSNorm(width, config.eps)
        self.q_proj = nn.Linear(width, config.heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.heads * head, width, bias=False)
        self.q_norm = nn.RMSNorm(head, config.eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head, config.eps) if config.qk_norm else nn.Identity()
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.between = nn.RMSNorm(width, config.eps)
        self.mlp = GatedFeedForward(width, config.width)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, G, S, D] of a memory [B, S, C]."""
        keys, values = (
            layer(states).unflatten(-1, (self.kv_heads, -1)) for layer in (self.k_proj, self.v_proj)
        )
        return self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def forward(self, stream: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Return the stream [B, T, C] with what it sees added.

        Args:
            stream: [B, T, C].
            keys: [B, G, S, D].
            values: [B, G, S, D].
            visible: bool [B, T, S].
        """
        some = visible.any(-1, keepdim=True)
        queries = self.q_norm(self.q_proj(self.norm(stream)).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        found = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=(visible | ~some)[:, None],  # a row without any key would be NaN
            enable_gqa=self.kv_heads != self.heads,
        )
        seen = self.o_proj(found.transpose(1, 2).flatten(2))
        stream = stream + self.attention_gate.tanh() * seen * some
        transformed: Tensor = stream + self.mlp_gate.tanh() * self.mlp(self.between(stream)) * some
        return transformed


class Fusion(nn.Module):
    """The blocks of a decoder, by the layer before which each stands.

    Args:
        config: of the fusion.
        decoder: without its head; its layers get hooks and nothing else.

    Attributes:
        blocks: keys are numbers of layers.
    """

    def __init__(self, config: CrossFusionConfig | BothFusionConfig, decoder: Any) -> None:
        super().__init__()
        self.sees: Sight = config.sees
        width = decoder.config.get_text_config().hidden_size
        self.blocks = nn.ModuleDict({str(number): CrossBlock(config, width) for number in config.layers})
        for number, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(partial(_look, number), with_kwargs=True)

    def read(self, states: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return keys and values [B, G, S, D] of a memory [B, S, C], block by block."""
        named: Any = self.blocks.items()
        return {name: block.read(states) for name, block in named}

    def looking(self, memory: Attended | None) -> dict[str, Any]:
        """Return the keyword by which a pass through the decoder looks at a memory."""
        return {} if memory is None else {FUSION_KEYWORD: Looking(self, memory)}


class Looking(NamedTuple):
    """A memory on its way through a decoder.

    Attributes:
        fusion: whose blocks look at it.
        memory: what they look at.
    """

    fusion: Fusion
    memory: Attended

    def before(self, layer: int, stream: Tensor) -> Tensor:
        """Return the stream [B, T, C] that a layer reads."""
        name = str(layer)
        if name not in self.fusion.blocks:
            return stream
        block: Any = self.fusion.blocks[name]
        return self.memory.through(name, block, stream)


def _look(number: int, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Let a decoder's layer read what is behind its block: a hook before it.

    The memory comes as a keyword, since what is computed again in the backward pass has to find that of its own
    forward pass; and with the blocks, since a copy of the decoder has the same hooks.
    """
    looking: Looking | None = options.pop(FUSION_KEYWORD, None)
    return (args if looking is None else (looking.before(number, args[0]), *args[1:])), options

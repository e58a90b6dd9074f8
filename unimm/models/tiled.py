"""The encoder that looks at all tiles of an image at once (Llama 3.2 Vision).

Each block attends over the patches of all tiles, those of absent tiles and the filling of each tile among them: of two
such patches neither sees the other, but a real patch sees them, as the published model was trained.

Source: meta-llama/llama-models `models/llama3/multimodal/model.py` (`VisionEncoder`). Shape suffixes: V real tiles,
N images, T tiles of each, absent ones among them, n features of a tile, L = T (n + filling), C width of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unimm.models.layout import Grid
from unimm.models.parts import TiledEncoderConfig

MULTIPLE = 8  # of which the patches of a tile are filled up to a multiple


def tile_ratios(tiles: int) -> list[Grid]:
    """Return rows and columns of every arrangement of at most so many tiles, in the order of the tables' rows."""
    return [
        (rows, columns)
        for rows in range(1, tiles + 1)
        for columns in range(1, tiles + 1)
        if rows * columns <= tiles
    ]


class TileEmbedding(nn.Module):
    """What is added to all patches of a tile, by the arrangement of tiles and its place in that."""

    def __init__(self, ratios: int, tiles: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ratios + 1, tiles, 1, width) * width**-0.5)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, ratios: Tensor) -> Tensor:
        """Return states [N, T, n, C], for ratios [N] as rows of the table."""
        return states + self.table[ratios] * self.gate.tanh()


class TilePositions(nn.Module):
    """Learned positions: those of a patch in any tile, and by a gate those in its arrangement of tiles."""

    def __init__(self, ratios: int, tiles: int, tokens: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.table = nn.Parameter(torch.randn(ratios + 1, tiles, tokens, width) * width**-0.5)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, ratios: Tensor) -> Tensor:
        """Return states [N, T, n, C], for ratios [N] as rows of the table."""
        gate = self.gate.tanh()
        return states + (1 - gate) * self.positions + gate * self.table[ratios]


class TiledBlock(nn.Module):
    """Attention and an MLP, each behind a norm and, in a global block, a gate."""

    def __init__(self, config: TiledEncoderConfig, gated: bool) -> None:
        super().__init__()
        width, self.heads = config.hidden, config.heads
        self.attention_norm = nn.LayerNorm(width, eps=config.eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.mlp_norm = nn.LayerNorm(width, eps=config.eps)
        self.fc1, self.fc2 = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.attention_gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.mlp_gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """Return states [N, L, C]; `visible`, bool [N, 1, L, L], says who looks at whom."""
        normed = self.attention_norm(states)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        states = states + _gated(self.o_proj(found), self.attention_gate)
        return states + _gated(self.fc2(F.gelu(self.fc1(self.mlp_norm(states)))), self.mlp_gate)


def _gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    return branch if gate is None else gate.tanh() * branch


class TiledTower(nn.Module):
    """See the module; features of a tile are its final states, then those that enter each of `layers`.

    The latter alternate channel by channel, as published: channel 0 of each layer, channel 1 of each, and so on.
    """

    def __init__(self, config: TiledEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden
        ratios = tile_ratios(config.tiles)
        self.ratios = {grid: row for row, grid in enumerate(ratios, start=1)}  # row 0: no image
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.before = TileEmbedding(len(ratios), config.tiles, width)
        self.places = TilePositions(len(ratios), config.tiles, config.tokens, width)
        self.norm_before = nn.LayerNorm(width, eps=config.eps)
        self.blocks = nn.ModuleList(TiledBlock(config, False) for _ in range(config.depth))
        self.norm_after = nn.LayerNorm(width, eps=config.eps)
        self.after = TileEmbedding(len(ratios), config.tiles, width)
        self.global_blocks = nn.ModuleList(TiledBlock(config, True) for _ in range(config.global_depth))
        self.checkpointing = False

    def checkpoint(self, wanted: bool) -> None:
        """Whether activations are computed again in the backward pass."""
        self.checkpointing = wanted

    def forward(
        self,
        pixels: Tensor,
        sizes: Tensor | None = None,
        lockstep: bool = False,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """Return features [V, n, width] of tiles [V, 3, S, S], normalised, image by image.

        Args:
            pixels: the tiles; of an image from the upper left.
            sizes: of no meaning here, all tiles being of one size.
            lockstep: likewise: all processes run each part once.
            tiles: int64 [N, 2], rows and columns of tiles of each image; None: each is of one tile.

        Raises:
            ValueError: tiles are missing or left over, or an image has an arrangement that there is none of.
        """
        grids = (
            [(1, 1)] * len(pixels) if tiles is None else [(rows, columns) for rows, columns in tiles.tolist()]
        )
        counts = torch.tensor([rows * columns for rows, columns in grids], device=pixels.device)
        if unknown := [grid for grid in grids if grid not in self.ratios]:
            raise ValueError(
                f"images: {unknown[0][0]} x {unknown[0][1]} tiles; the encoder takes {self.config.tiles}"
            )
        if int(counts.sum()) != len(pixels):
            raise ValueError(f"images: {len(pixels)} tiles given, but their grids have {int(counts.sum())}")
        present = torch.arange(self.config.tiles, device=pixels.device) < counts[:, None]  # [N, T]
        rows = torch.tensor([self.ratios[grid] for grid in grids], device=pixels.device)
        states = self._embed(pixels, present, rows)
        entering: dict[int, Tensor] = {}
        filling = -states.shape[2] % MULTIPLE
        states = F.pad(states, (0, 0, 0, filling))
        shape, visible = states.shape[1:3], _visible(present, states.shape[2], filling)
        states = states.flatten(1, 2)
        for number, block in enumerate(self.blocks):
            if number in self.config.layers:
                entering[number] = states
            states = self._run(block, states, visible)
        states = self.after(self.norm_after(states).unflatten(1, shape), rows).flatten(1, 2)
        for block in self.global_blocks:
            states = self._run(block, states, visible)
        if self.config.layers:
            inner = torch.stack([entering[layer] for layer in self.config.layers], dim=-1)
            states = torch.cat([states, inner.flatten(2)], dim=-1)
        features: Tensor = states.unflatten(1, shape)[present]
        return features[:, : self.config.tokens]

    def _embed(self, pixels: Tensor, present: Tensor, ratios: Tensor) -> Tensor:
        """States [N, T, n, C] that enter the first block; absent tiles have pixels of 0."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        states = patches.new_zeros(*present.shape, *patches.shape[1:])
        states[present] = patches
        states = self.before(states, ratios)
        first = self.class_token.expand(*states.shape[:2], 1, -1)
        positioned: Tensor = self.norm_before(self.places(torch.cat([first, states], dim=2), ratios))
        return positioned

    def _run(self, block: nn.Module, states: Tensor, visible: Tensor) -> Tensor:
        """One block."""
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, states, visible, use_reentrant=False)
            return again
        found: Tensor = block(states, visible)
        return found


def _visible(present: Tensor, length: int, filling: int) -> Tensor:
    """Who looks at whom: bool [N, 1, L, L], False for two of which none is a patch of a real tile."""
    real = present[:, :, None] & (torch.arange(length, device=present.device) < length - filling)
    real = real.flatten(1)
    return (real[:, None, :, None]) | (real[:, None, None, :])

"""To the decoder's width: from an encoder's features, by a reducer and the connector's MLP, and from image codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from unimm.models.parts import ConnectorConfig, MlpConnectorConfig
from unimm.models.reducers import Reducer
from unimm.models.seeing import Seen


def mlp(width_in: int, width_out: int, depth: int) -> nn.Sequential:
    """Return Janus's connector: `depth` linear layers with a GELU between (Janus `mlp_gelu`)."""
    return _mlp(width_in, width_out, MlpConnectorConfig(depth))


def _mlp(width_in: int, width_out: int, config: MlpConnectorConfig) -> nn.Sequential:
    """Linear layers with an activation between."""
    widths = [width_in, *[config.width or width_out] * (config.depth - 1)]
    layers: list[nn.Module] = []
    for before, after in zip(widths, [*widths[1:], width_out], strict=True):
        layers += [nn.Linear(before, after, bias=config.bias), _activation(config.act)]
    return nn.Sequential(*layers[:-1])


def _activation(name: str) -> nn.Module:
    # the same function without the Python around it
    return nn.GELU() if name == "gelu" else ACT2FN[name]


class GatedMlp(nn.Module):
    """Llama's MLP, of one width to another (Molmo's connector).

    Args:
        width_in: channels of a token.
        width_out: the decoder's hidden size.
        config: of the connector.
    """

    def __init__(self, width_in: int, width_out: int, config: MlpConnectorConfig) -> None:
        super().__init__()
        inner = config.width or width_out
        self.gate, self.up = (nn.Linear(width_in, inner, bias=config.bias) for _ in range(2))
        self.down = nn.Linear(inner, width_out, bias=config.bias)
        self.act = _activation(config.act)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [..., width_out]."""
        found: Tensor = self.down(self.act(self.gate(tokens)) * self.up(tokens))
        return found


class Connector(nn.Module):
    """A reducer, then an MLP to the decoder's width.

    Args:
        config: of the connector.
        reducer: makes tokens of features.
        width_in: channels of a feature.
        width_out: the decoder's hidden size.

    Attributes:
        by_feature: whether the norm is of each feature, not of each token.
    """

    def __init__(self, config: ConnectorConfig, reducer: Reducer, width_in: int, width_out: int) -> None:
        super().__init__()
        self.reducer = reducer
        self.norm: nn.Module | None = None
        self.layers: nn.Module = nn.Identity()
        self.by_feature = False
        if isinstance(config, MlpConnectorConfig):
            token = reducer.width(width_in)
            self.layers = (GatedMlp if config.gated else _mlp)(token, width_out, config)
            self.by_feature = config.norm_at == "feature"
            if config.norm != "none":
                norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
                self.norm = norm(width_in if self.by_feature else token, eps=config.eps)

    def forward(self, features: Tensor, seen: Seen) -> Tensor:
        """Return tokens, [V, n, width_out] or [F, width_out].

        Args:
            features: of an encoder, [V, n, width_in] or [P, width_in].
            seen: how they lie.
        """
        if self.norm is not None and self.by_feature:
            features = self.norm(features)
        tokens = self.reducer(features, seen)
        if self.norm is not None and not self.by_feature:
            tokens = self.norm(tokens)
        projected: Tensor = self.layers(tokens)
        return projected


class CodeEmbedding(nn.Module):
    """Embeds image codes: a small table, a learned position in the grid, and a connector to the decoder's width.

    Args:
        codes: size of the code vocabulary K.
        dim: dimension of the table.
        width: the decoder's width C.
        depth: linear layers of the connector.
        learned_positions: length of the table of positions, 0 for none (Janus leaves positions to the decoder).
    """

    def __init__(self, codes: int, dim: int, width: int, depth: int, learned_positions: int) -> None:
        super().__init__()
        self.table = nn.Embedding(codes, dim)
        self.connector = mlp(dim, width, depth)
        # called `places` in the files of models, and so in their state
        self.places = nn.Embedding(learned_positions, width) if learned_positions else None

    def forward(self, codes: Tensor, start: int | Tensor = 0) -> Tensor:
        """Return [B, L, C] for codes [B, L] that begin at position `start` of their image, one for all or [B]."""
        embedded: Tensor = self.connector(self.table(codes))
        if self.places is None:
            return embedded
        if isinstance(start, int):
            return embedded + self.places.weight[start : start + codes.shape[1]]
        where = start[:, None] + torch.arange(codes.shape[1], device=codes.device)
        return embedded + self.places.weight[where]

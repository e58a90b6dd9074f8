"""The moving average of the weights that a stage trains; where weights are sharded, each rank averages its slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unimm.training import shards

if TYPE_CHECKING:
    from unimm.training.engine import Engine


class Average:
    """The average of one stage's trained weights, float32.

    Args:
        engine: whose weights to follow.
        decay: of the average at each step.
        start: whole averages by name to go on from; empty to start at the weights.
        updates: how often those had been updated.
    """

    def __init__(self, engine: Engine, decay: float, start: Mapping[str, Tensor], updates: int) -> None:
        self._weights = dict(zip(engine.names, engine.parameters, strict=True))
        self._decay = decay
        self.updates = updates
        self._parts = {
            name: shards.cut(start[name].to(engine.device), weight)
            if start
            else shards.local(weight).detach().clone().float()
            for name, weight in self._weights.items()
        }

    def update(self) -> None:
        """Move towards the weights; early on the decay is lower, so that the start is forgotten."""
        self.updates += 1
        move = get_ema_multi_avg_fn(min(self._decay, (1 + self.updates) / (10 + self.updates)))
        weights = [shards.local(weight).detach() for weight in self._weights.values()]
        move(list(self._parts.values()), weights, self.updates)

    def whole(self) -> dict[str, Tensor]:
        """The averages in the weights' shapes; all ranks call this together."""
        return {name: shards.join(part, self._weights[name]) for name, part in self._parts.items()}

"""The score of a checkpoint: the metric by which a run tells which of them is best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from unimm.sections import near
from unimm.training.logging import means_over_ranks
from unimm.training.recipe import VALIDATION, BaseRecipe

if TYPE_CHECKING:
    from unimm.training.engine import StepResult


class CheckpointMetric:
    """The metric that checkpoints are compared by: a mean over the steps since the last one, or what validation has."""

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe, self.name = recipe, recipe.checkpoint.metric
        self.by_validation = recipe.validation is not None and self.name.startswith(VALIDATION)
        self.sum: Tensor | float = 0.0  # on the device until it is asked for
        self.count = 0

    def add(self, result: StepResult) -> None:
        """Take in one step.

        Raises:
            UserError: the task has no such metric.
        """
        if self.by_validation:
            self.count = 0  # what was measured before this step is not of these weights
        else:
            self.sum, self.count = self.sum + self._of(result.values), self.count + 1

    def set(self, measured: Mapping[str, float]) -> None:
        """Take in what validation measured.

        Raises:
            UserError: it has no such metric.
        """
        if self.by_validation:
            self.sum, self.count = self._of(measured), 1

    def _of(self, values: Mapping[str, Any]) -> Any:
        if self.name not in values:
            hint = near(self.name, values) or f"; known: {', '.join(values)}"
            raise self.recipe.error("checkpoint.metric", f'nothing named "{self.name}" is logged{hint}')
        return values[self.name]

    def take(self) -> float | None:
        """The metric of a checkpoint, to begin anew; all ranks call this together."""
        value, count = self.sum, self.count
        self.sum, self.count = 0.0, 0
        if self.by_validation or not count:
            return float(value) if count else None
        return means_over_ranks({self.name: value}, count).get(self.name)

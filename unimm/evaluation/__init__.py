"""Evaluation of a unified model: naming, questions, drawing, and the independent judge of drawings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["evaluate_recipe"]


def evaluate_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Evaluate a model by a recipe; see `unimm.evaluation.run.evaluate`."""
    from unimm.evaluation.recipe import load_evaluation
    from unimm.evaluation.run import evaluate

    return evaluate(load_evaluation(path, overrides))

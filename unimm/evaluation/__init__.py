"""Evaluation of a unified model: naming, questions, drawing, and the independent judge of drawings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["evaluate_recipe", "load_evaluation", "print_report"]


def evaluate_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Evaluate a model by a recipe; see `unimm.evaluation.run.evaluate`."""
    from unimm.evaluation.recipe import load_evaluation
    from unimm.evaluation.run import evaluate

    return evaluate(load_evaluation(path, overrides))


def load_evaluation(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Read an evaluation recipe; see `unimm.evaluation.recipe.load_evaluation`."""
    from unimm.evaluation.recipe import load_evaluation as load

    return load(path, overrides)


def print_report(document: dict[str, Any]) -> None:
    """Print what `evaluate_recipe` returned as tables; see `unimm.evaluation.report.print_report`."""
    from unimm.evaluation.report import print_report as show

    show(document)

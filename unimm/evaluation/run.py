"""Run an evaluation recipe: load the model, take every figure, write the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimm.evaluation.drawing import evaluate_drawing
from unimm.evaluation.judge import Judge
from unimm.evaluation.naming import evaluate_naming
from unimm.evaluation.questions import evaluate_questions
from unimm.evaluation.recipe import EvaluationRecipe
from unimm.images import atomic_write
from unimm.pipeline import load


def evaluate(recipe: EvaluationRecipe) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        recipe: which model, which figures, how many samples, where the report goes.

    Returns:
        `naming`, `questions` and `drawing`, each by split and figure, with counts and 95 % intervals.
        It is also written to `report.json` in the recipe's output, beside sheets of drawings.

    Raises:
        UserError: the model cannot be loaded, or the packages of the judge are missing.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    um = load(recipe.model, device=recipe.device)
    report: dict[str, Any] = {"model": recipe.model or "embedded", "seed": recipe.seed}
    if recipe.naming is not None:
        report["naming"] = evaluate_naming(um, recipe.naming, recipe.seed)
    if recipe.questions is not None:
        report["questions"] = evaluate_questions(um, recipe.questions, recipe.seed)
    if recipe.drawing is not None:
        judge = Judge(recipe.judge, output / "judge.safetensors", str(um.model.device))
        report["drawing"] = evaluate_drawing(um, judge, recipe.drawing, recipe.seed, output)
    report["files"] = sorted(str(path) for path in [*output.glob("drawings-*.png"), output / "report.json"])
    with atomic_write(output / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report

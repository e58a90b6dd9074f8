"""Run an evaluation recipe: load the model, take every figure, write the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.emojiscenes.drawing import evaluate_drawing
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.emojiscenes.naming import evaluate_naming
from unimm.evaluation.emojiscenes.questions import evaluate_questions
from unimm.evaluation.recipe import EvaluationRecipe
from unimm.evaluation.tables.reading import evaluate_tables
from unimm.files import atomic_write
from unimm.loading import load
from unimm.outputs import check_output, document_has, is_image_file
from unimm.pipeline import UniMM


def evaluate(recipe: EvaluationRecipe) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        recipe: which model, which figures, how many samples, where the report goes.

    Returns:
        `naming`, `questions`, `tables` and `drawing`, each by split and figure, with counts and 95 % intervals.
        It is also written to `report.json` in the recipe's output, beside sheets of drawings.

    Raises:
        UserError: the output holds such files of something else, the model cannot be loaded or has no part for a
            figure, or the packages of the judge are missing.
    """
    output = Path(recipe.output)
    check_output(output / "report.json", "an earlier report", document_has("model", "seed"))
    for split in () if recipe.drawing is None else recipe.drawing.splits:
        check_output(output / f"drawings-{split}.png", "an image", is_image_file)
    output.mkdir(parents=True, exist_ok=True)
    um = load(recipe.model, device=recipe.device)
    _check_sides(recipe, um)
    report: dict[str, Any] = {"model": recipe.model or "embedded", "seed": recipe.seed}
    if recipe.naming is not None:
        report["naming"] = evaluate_naming(um, recipe.naming, recipe.seed)
    if recipe.questions is not None:
        report["questions"] = evaluate_questions(um, recipe.questions, recipe.seed)
    if recipe.tables is not None:
        report["tables"] = evaluate_tables(um, recipe.tables, recipe.seed)
    if recipe.drawing is not None:
        judge = Judge(recipe.judge, output / "judge.safetensors", str(um.model.device))
        report["drawing"] = evaluate_drawing(um, judge, recipe.drawing, recipe.seed, output)
    report["files"] = sorted(str(path) for path in [*output.glob("drawings-*.png"), output / "report.json"])
    with atomic_write(output / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _check_sides(recipe: EvaluationRecipe, um: UniMM) -> None:
    """Refuse figures of what a model lacks, before any is taken.

    Raises:
        UserError: naming the figure.
    """
    if um.processor.views is None:
        for name in ("naming", "questions", "tables"):
            if getattr(recipe, name) is not None:
                raise UserError(f"{name}: this model understands no images; give null")
    if recipe.drawing is not None and um.processor.drawing_size is None:
        raise UserError("drawing: this model cannot draw; give null")

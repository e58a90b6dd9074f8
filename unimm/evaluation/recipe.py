"""The evaluation recipe: a YAML file that says which model, which figures, and how many samples of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from unimm.data.tables.settings import TableSettings
from unimm.errors import UserError
from unimm.sections import NotNegative, Positive, Section, near, read_yaml, validate

EVALUATION_TASK = "evaluation"
SplitName = Literal["seen", "composed", "vendor"]
Splits = Annotated[list[SplitName], Field(min_length=1)]


class Naming(Section):
    """Captions of single objects."""

    samples: Positive = 1000
    """Images a split."""
    splits: Splits = Field(default=["seen", "composed", "vendor"])


class Questions(Section):
    """Questions of every kind."""

    samples: Positive = 1000
    """Questions a kind and split."""
    splits: Splits = Field(default=["seen", "composed", "vendor"])


class TablesSection(Section):
    """Synthetic tables, read as Markdown or LaTeX, and questions about them."""

    samples: Positive = 200
    """Tables a split."""
    questions: NotNegative = 200
    """Questions a kind and split at most, one of a table."""
    splits: Annotated[list[Literal["seen", "larger", "font"]], Field(min_length=1)] = Field(
        default=["seen", "larger", "font"]
    )
    settings: TableSettings = TableSettings()
    """Which tables, as `data.tables` of the training recipe has them."""


class DrawingSection(Section):
    """Drawings of held-out scenes from their captions, judged."""

    samples: Positive = 1000
    """Drawings a kind of scene (one object, two objects, a number of objects) and split."""
    splits: Annotated[list[Literal["seen", "composed"]], Field(min_length=1)] = Field(
        default=["seen", "composed"]
    )
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    shown: NotNegative = 24
    """Drawings of each kind and split on the sheet."""


class JudgeSection(Section):
    """The judge of drawings: a linear probe on frozen ImageNet features, fitted on real renders."""

    renders: Positive = 2000
    """Images the probe is fitted on."""
    side: Annotated[int, Field(ge=32)] = 96
    """Pixels a side that a cut-out object is brought to."""
    decay: Annotated[float, Field(gt=0)] = 1e-4
    """Weight of the squared weights in the probe's loss."""


class EvaluationRecipe(Section):
    """What to evaluate; a figure set to null is left out."""

    task: Literal["evaluation"]
    model: str | None = None
    """Folder or hub id; null or "embedded": the embedded model."""
    output: Annotated[str, Field(min_length=1)]
    seed: NotNegative = 1
    """Of the held-out scenes and of the drawings; scenes of `train` are never used."""
    device: str = "auto"
    naming: Naming | None = Naming()
    questions: Questions | None = Questions()
    tables: TablesSection | None = None
    drawing: DrawingSection | None = DrawingSection()
    judge: JudgeSection = JudgeSection()


def load_evaluation(path: str | Path, overrides: Iterable[str] = ()) -> EvaluationRecipe:
    """Read an evaluation recipe.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, as for training recipes.

    Raises:
        UserError: one line naming the file and the key.
    """
    data = read_yaml(path, overrides)
    task = data.get("task")
    if task != EVALUATION_TASK:
        raise UserError(
            f'{path}: task: expected "{EVALUATION_TASK}", got "{task}"{near(task, [EVALUATION_TASK])}'
        )
    return validate(EvaluationRecipe, data, str(path))

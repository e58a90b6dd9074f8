"""Drawings of scenes that stand in for GenEval's and MJHQ's prompts, judged by pixel rules and the judge of drawings.

It runs offline, so that the whole way from prompts to figures can be tried; its figures are of EmojiScenes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimm.data.emojiscenes.scenes import EmojiScenes, Scene
from unimm.errors import UserError
from unimm.evaluation.drawing import read_drawing
from unimm.evaluation.emojiscenes.drawing import judge_images
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.recipe import JudgeSection
from unimm.images import Pixels

if TYPE_CHECKING:
    from unimm.evaluation.benchmark import RunOptions
    from unimm.evaluation.journal import DoneItem

RENDERS = 200  # that the judge is fitted on


def scene_of(line: DoneItem) -> Scene:
    """The scene that an item's prompt describes, by what its data says: split, seed, kind and number.

    Raises:
        UserError: it says none.
    """
    said = (line["fields"].get("metadata") or line["fields"]).get("scene")
    try:
        split, seed, kind, number = said
        return EmojiScenes(split, int(seed), kinds=(kind,))[int(number)]
    except (TypeError, ValueError, IndexError):
        raise UserError(
            f"item {line['key']}: judge.kind: emojiscenes judges scenes alone, and it names none"
        ) from None


def judge_scenes(folder: Path, lines: Sequence[DoneItem], options: RunOptions) -> list[Any]:
    """A verdict for each drawing of each item: 1 where nothing is wrong.

    Raises:
        UserError: a drawing is missing, or shows no scene of EmojiScenes.
    """
    judge = Judge(JudgeSection(renders=RENDERS), options.output / "judge.safetensors")
    verdicts = []
    for line in lines:
        scene = scene_of(line)
        images = [np.asarray(read_drawing(folder, line["key"], one)) for one in line["images"]]
        found = judge_images(judge, [scene] * len(images), images)
        verdicts.append([{"score": float(one.all_right()), "said": one.line()} for one in found])
    return verdicts


def scene_features(images: Sequence[Pixels], output: Path) -> np.ndarray[Any, Any]:
    """Features [N, D] of whole images by the judge's frozen network, for a Fréchet distance of our own.

    Args:
        images: each uint8 [H, W, 3].
        output: folder in which the judge keeps its probe.
    """
    judge = Judge(JudgeSection(renders=RENDERS), output / "judge.safetensors")
    features: np.ndarray[Any, Any] = judge.features(images).cpu().numpy()
    return features

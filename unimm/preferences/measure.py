"""Is an aligned model better? Held-out prompts drawn and judged, diversity among drawings, and what words have lost.

The judge is that of `unimm.evaluation`: a probe on frozen features, and pixel rules. Before and after answer to the
same prompts with the same random streams, so that differences are of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch.nn import functional as F

from unimm.data.emojiscenes.scenes import EmojiScenes, Scene
from unimm.evaluation.emojiscenes.batches import image_size
from unimm.evaluation.emojiscenes.drawing import FIGURES, Verdict, judge_images, prompt_for
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.emojiscenes.naming import evaluate_naming
from unimm.evaluation.emojiscenes.questions import evaluate_questions
from unimm.evaluation.recipe import Naming, Questions, SplitName, Splits
from unimm.evaluation.score import Z95
from unimm.images import Pixels
from unimm.sections import NotNegative, Positive, Section

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

ALIGNMENT, CODES, DISTANCE = "alignment", "codes", "distance"
JUDGED = (ALIGNMENT, *FIGURES)
Values = list[float | None]  # one for each prompt; None where it poses no such question


class Measure(Section):
    """What is measured, before and after."""

    split: SplitName = "composed"
    """Of the scenes whose captions are drawn."""
    prompts: Positive = 600
    n: Annotated[int, Field(ge=2)] = 4
    """Drawings of each prompt; diversity is among them."""
    scene_seed: NotNegative = 1
    """Which scenes."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    words: NotNegative = 1000
    """Images to name, and questions of each kind, of each of `word_splits`."""
    word_splits: Splits = Field(default=["seen", "composed"])


@dataclass(frozen=True)
class Change:
    """A figure before and after, and the 95 % interval of the difference (normal approximation, over prompts)."""

    before: float
    after: float
    change: float
    low: float
    high: float
    prompts: int

    @classmethod
    def of(cls, before: Values, after: Values) -> Change:
        """Compare a figure of the same prompts."""
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
        was, now = np.array(pairs, float).reshape(-1, 2).T
        difference = now - was
        spread = difference.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
        middle = difference.mean()
        return cls(was.mean(), now.mean(), middle, middle - Z95 * spread, middle + Z95 * spread, len(pairs))

    def document(self) -> dict[str, float]:
        """As plain numbers, for JSON."""
        return {name: round(float(value), 4) for name, value in asdict(self).items()}


def measure_drawings(
    um: UniMM,
    judge: Judge,
    section: Measure,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Values]:
    """Draw and judge held-out prompts.

    Args:
        um: what draws.
        judge: names objects, and gives the features that diversity is measured in.
        section: how many prompts and drawings.
        seed: of the drawings.
        on_progress: called with prompts done and prompts in all.

    Returns:
        For each prompt, of its drawings: `alignment`, the share in which nothing is wrong; the shares of `Verdict`;
        `codes`, how many different codes they use; `distance`, the mean of 1 - cosine of two drawings' features.
    """
    values: dict[str, Values] = {name: [] for name in (*JUDGED, CODES, DISTANCE)}
    share = max(1, um.batch_size // section.n)
    for start in range(0, section.prompts, share):
        shown, seeds = held_out(um, section, seed, range(start, min(start + share, section.prompts)))
        images, codes = um.draw(
            [prompt_for(scene) for scene in shown],
            n=section.n,
            seed=seeds,
            guidance_scale=section.guidance_scale,
            temperature=section.temperature,
            return_codes=True,
        )
        pixels = [np.asarray(image.convert("RGB")) for image in images]
        _judge(judge, shown, pixels, section.n, values)
        values[CODES] += [float(len(part.unique())) for part in codes.split(section.n)]
        values[DISTANCE] += _distances(judge, pixels, section.n)
        if on_progress is not None:
            on_progress(start + len(shown), section.prompts)
    return values


def held_out(um: UniMM, section: Measure, seed: int, indices: range) -> tuple[list[Scene], list[int]]:
    """Some of the held-out scenes, and the seeds of all their drawings, `section.n` for each."""
    scenes = EmojiScenes(section.split, section.scene_seed, image_size(um), section.prompts)
    first = seed * 1_000_000
    return [scenes[index] for index in indices], [
        first + number for number in range(indices.start * section.n, indices.stop * section.n)
    ]


def _judge(
    judge: Judge, scenes: Sequence[Scene], images: Sequence[Pixels], n: int, values: Mapping[str, Values]
) -> None:
    """Add each scene's shares of its `n` drawings."""
    verdicts = judge_images(judge, [scene for scene in scenes for _ in range(n)], images)
    for start in range(0, len(verdicts), n):
        part = verdicts[start : start + n]
        values[ALIGNMENT].append(sum(verdict.all_right() for verdict in part) / n)
        for figure in FIGURES:
            values[figure].append(_share(part, figure))


def _share(verdicts: Sequence[Verdict], figure: str) -> float | None:
    """The share of verdicts of one scene that are right, or None where the scene does not ask."""
    given = [getattr(verdict, figure) for verdict in verdicts]
    return None if given[0] is None else sum(given) / len(given)


def _distances(judge: Judge, images: Sequence[Pixels], n: int) -> Values:
    """For each prompt the mean of 1 - cosine of the features of two of its drawings."""
    side = judge.section.side
    resized = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in images]
    features = F.normalize(judge.features(resized), dim=1).view(-1, n, judge.weight.shape[1])
    cosines = features @ features.mT  # [prompts, n, n]
    pairs = torch.triu_indices(n, n, 1)
    return [float(value) for value in 1 - cosines[:, pairs[0], pairs[1]].mean(1)]


def measure_words(um: UniMM, section: Measure) -> dict[str, dict[str, float]]:
    """For each split the shares of single objects named rightly (`naming`) and of right answers (`questions`)."""
    splits, seed = section.word_splits, section.scene_seed
    naming = evaluate_naming(um, Naming(samples=section.words, splits=splits), seed)
    questions = evaluate_questions(um, Questions(samples=section.words, splits=splits), seed)
    return {
        split: {"naming": naming[split]["both"]["rate"], "questions": questions[split]["all"]["rate"]}
        for split in splits
    }


def compare(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Compare what `measure_drawings` and `measure_words` gave before and after, in one run or in several.

    Args:
        runs: (before, after) of each seed, each `{"drawings": ..., "words": ...}`; a prompt's figures are averaged
            over seeds before they are compared, so that the interval is over prompts.

    Returns:
        `drawings`: a `Change` for each figure; `words`: for each split and figure before, after and change, means over
        seeds.
    """
    sides = [[run[side] for run in runs] for side in (0, 1)]
    drawings = {
        name: Change.of(*(_mean([one["drawings"][name] for one in side]) for side in sides)).document()
        for name in runs[0][0]["drawings"]
    }
    words: dict[str, Any] = {}
    for split, figures in runs[0][0]["words"].items():
        words[split] = {}
        for name in figures:
            was, now = (float(np.mean([one["words"][split][name] for one in side])) for side in sides)
            words[split][name] = {"before": was, "after": now, "change": round(now - was, 4)}
    return {"drawings": drawings, "words": words}


def _mean(runs: Sequence[Values]) -> Values:
    """For each prompt the mean over runs."""
    return [None if row[0] is None else sum(row) / len(row) for row in zip(*runs, strict=True)]

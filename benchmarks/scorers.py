"""How well do scorers tell good drawings of a prompt from bad ones? The judge of `unimm eval` says which are good.

    python benchmarks/scorers.py                                     # the scorers that come with the package
    python benchmarks/scorers.py self-vqa my_module.score --prompts 100

For each kind of scene it draws eight images of training captions and prints, of all pairs of a good and a bad drawing
of one prompt, the share in which a scorer gives the good one more (ties count half, 0.5 is chance; nan: no such pair).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import unimm
from unimm.console import print_table
from unimm.data.emojiscenes.scenes import SCENE_KINDS, SceneKind
from unimm.evaluation.emojiscenes.drawing import judge_images
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.recipe import JudgeSection
from unimm.pipeline import UniMM
from unimm.preferences.candidates import scene_prompts
from unimm.preferences.scorers import Candidate, image_candidates, make_scorer, score_candidates

SCENE_SEED = 11  # scenes that no recipe draws
SCORERS = ("self-vqa", "artwork", "self-vqa*artwork")


def draw_groups(um: UniMM, kind: SceneKind, prompts: int, n: int) -> list[list[Candidate]]:
    """Draw `n` candidates of each of `prompts` prompts, without guidance."""
    asked = scene_prompts("train", SCENE_SEED, prompts, math.inf, {kind: 1.0})
    seeds = list(range(prompts * n))
    codes = um.draw_codes([prompt.prompt for prompt in asked], n=n, seed=seeds, guidance_scale=1.0)
    return [
        image_candidates(um, prompt, seeds[start : start + n], codes[start : start + n])
        for prompt, start in zip(asked, range(0, len(seeds), n), strict=True)
    ]


def good_ones(judge: Judge, groups: Sequence[Sequence[Candidate]]) -> NDArray[np.bool_]:
    """Which drawings [prompts, n] the judge finds nothing wrong with."""
    flat = [candidate for group in groups for candidate in group]
    scenes = [candidate.prompt.scene.scene() for candidate in flat if candidate.prompt.scene is not None]
    verdicts = judge_images(judge, scenes, [np.asarray(candidate.image) for candidate in flat])
    return np.array([verdict.all_right() for verdict in verdicts]).reshape(len(groups), -1)


def pairs_in_order(scores: NDArray[np.float64], good: NDArray[np.bool_]) -> float:
    """Share of pairs of a good and a bad drawing in a row that are scored in that order; ties count half."""
    right = total = 0.0
    for row, wanted in zip(scores, good, strict=True):
        differences = row[wanted][:, None] - row[~wanted]
        right += (differences > 0).sum() + 0.5 * (differences == 0).sum()
        total += differences.size
    return right / total if total else math.nan


def main() -> None:
    """Draw, judge, and compare every scorer with the judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scorers", nargs="*", default=SCORERS, help="names, or dotted paths of callables")
    parser.add_argument("--model", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--prompts", type=int, default=256, help="of each kind (default: 256)")
    parser.add_argument("-n", type=int, default=8, help="drawings of each prompt (default: 8)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/scorers"))
    options = parser.parse_args()
    um = unimm.load(options.model)
    judge = Judge(JudgeSection(), options.output / "judge.safetensors", str(um.model.device))
    scorers = {name: make_scorer(name, um, options.output) for name in options.scorers}
    columns = {}
    for kind in SCENE_KINDS:
        groups = draw_groups(um, kind, options.prompts, options.n)
        good = good_ones(judge, groups)
        print(f"{kind}: {good.mean():.1%} of {good.size} drawings are good", flush=True)
        for name, scorer in scorers.items():
            scores = np.array([score_candidates(scorer, group) for group in groups])
            columns[name, kind] = f"{pairs_in_order(scores, good):.2f}"
    print_table(
        ("scorer", *SCENE_KINDS), [(name, *(columns[name, kind] for kind in SCENE_KINDS)) for name in scorers]
    )


if __name__ == "__main__":
    main()

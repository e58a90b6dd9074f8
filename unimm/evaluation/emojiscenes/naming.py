"""Naming: does the caption of a single object name that object and the background, and nothing else?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unimm.data.emojiscenes.scenes import BACKGROUNDS, CONCEPTS, EmojiScenes
from unimm.evaluation.emojiscenes.batches import MAX_TOKENS, batches, image_size, render_image
from unimm.evaluation.recipe import Naming, SplitName
from unimm.evaluation.score import Score

if TYPE_CHECKING:
    from unimm.pipeline import UniMM


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of the names as whole words, the longest first ("green apple" before "green")."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)


_CONCEPT, _BACKGROUND = _any_of(CONCEPTS), _any_of(list(BACKGROUNDS))
_SPELLING = {concept.lower(): concept for concept in CONCEPTS}


def parse_caption(text: str) -> tuple[list[str], list[str]]:
    """The concepts and the backgrounds that a text names, in order and with repeats.

    Colours that are part of a concept's name ("green apple") are not taken for backgrounds.
    """
    concepts = [_SPELLING[found.lower()] for found in _CONCEPT.findall(text)]
    backgrounds = [found.lower() for found in _BACKGROUND.findall(_CONCEPT.sub(" ", text))]
    return concepts, backgrounds


def evaluate_naming(um: UniMM, recipe: Naming, seed: int) -> dict[str, Any]:
    """Caption held-out single objects and compare what the captions name with what is shown.

    Returns:
        For each split the scores `object` and `background` (exactly the one shown is named), and `both`.
    """
    return {split: _evaluate_split(um, split, recipe.samples, seed) for split in recipe.splits}


def _evaluate_split(um: UniMM, split: SplitName, samples: int, seed: int) -> dict[str, Any]:
    scenes = EmojiScenes(split, seed, image_size(um), samples, kinds=("single",))
    objects, backgrounds = [], []
    for indices in batches(samples, f"naming, {split}"):
        shown = [scenes[index] for index in indices]
        captions = um.caption([render_image(scene) for scene in shown], MAX_TOKENS)
        for scene, caption in zip(shown, captions, strict=True):
            named, behind = parse_caption(caption)
            objects.append(named == [scene.concept])
            backgrounds.append(behind == [scene.background])
    both = [a and b for a, b in zip(objects, backgrounds, strict=True)]
    figures = {"both": both, "object": objects, "background": backgrounds}
    return {name: Score.of(verdicts).document() for name, verdicts in figures.items()}

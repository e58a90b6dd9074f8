"""Drawing: are held-out scenes, drawn from their captions, what the captions say?

The same judgement is passed on three images of every scene: the real render, the image tokenizer's
reconstruction of it, and the drawing. The first two are the ceilings of the third.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unimm.data.emojiscenes.scenes import CONCEPTS, SCENE_KINDS, EmojiScenes, Scene, SceneKind
from unimm.evaluation.emojiscenes.batches import batches, image_size
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.emojiscenes.pixels import Box, background_name, find_objects, relation
from unimm.evaluation.recipe import DrawingSection, SplitName
from unimm.evaluation.score import Score
from unimm.images import Pixels, save_image, to_tensor, to_uint8
from unimm.sheet import Card, Line, SheetSection, draw_sheet

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

SOURCES = ("drawn", "reconstructed", "rendered")


@dataclass(frozen=True)
class Verdict:
    """What is right about an image of a scene; None where the scene poses no such question.

    Attributes:
        background: the background is the right one.
        object: one object: the judge's first guess for the largest object is the right concept.
        place: two objects: just two are found, and, given that they are A and B, A stands to B as it should.
        place_named: the same, and the judge's first guess for each of them is right, out of all concepts.
        count: a number of objects: just so many are found.
    """

    background: bool
    object: bool | None = None
    place: bool | None = None
    place_named: bool | None = None
    count: bool | None = None

    def line(self) -> str:
        """The verdict in words."""
        names = ("background", "object", "place", "count")
        said = [(name, getattr(self, name)) for name in names]
        return ", ".join(f"{name} {'right' if good else 'wrong'}" for name, good in said if good is not None)

    def all_right(self) -> bool:
        """Whether nothing is wrong."""
        return all(good is not False for good in (self.background, self.object, self.place, self.count))


FIGURES = tuple(Verdict.__dataclass_fields__)


def judge_images(judge: Judge, scenes: Sequence[Scene], images: Sequence[Pixels]) -> list[Verdict]:
    """Pass judgement on images, each uint8 [H, W, 3], of scenes."""
    found = [find_objects(image) for image in images]
    looked_at: list[tuple[int, Box]] = []  # image and box of every object that the judge is asked about
    for index, (scene, boxes) in enumerate(zip(scenes, found, strict=True)):
        if scene.kind == "single":
            looked_at += [(index, box) for box in boxes[:1]]
        elif scene.kind == "pair" and len(boxes) == 2:
            looked_at += [(index, box) for box in boxes]
    scores = judge.scores([images[index] for index, _ in looked_at], [box for _, box in looked_at])
    rows: dict[int, list[torch.Tensor]] = {}
    for (index, _), row in zip(looked_at, scores, strict=True):
        rows.setdefault(index, []).append(row)
    return [
        _verdict(scene, background_name(images[index]) == scene.background, found[index], rows.get(index, []))
        for index, scene in enumerate(scenes)
    ]


def _verdict(scene: Scene, background: bool, boxes: list[Box], rows: list[torch.Tensor]) -> Verdict:
    """The verdict on one image, from its boxes and the judge's log-probabilities [concepts] for them."""
    if scene.kind == "count":
        return Verdict(background, count=len(boxes) == len(scene.objects))
    wanted = [CONCEPTS.index(placed.concept) for placed in scene.objects]
    if scene.kind == "single":
        return Verdict(background, object=bool(rows) and int(rows[0].argmax()) == wanted[0])
    if len(rows) != 2:
        return Verdict(background, place=False, place_named=False)
    first, second = wanted
    straight = rows[0][first] + rows[1][second] >= rows[0][second] + rows[1][first]
    ordered = (0, 1) if straight else (1, 0)
    place = relation(boxes[ordered[0]], boxes[ordered[1]]) == scene.relation
    named = [int(rows[index].argmax()) for index in ordered] == wanted
    return Verdict(background, place=place, place_named=place and named)


def evaluate_drawing(
    um: UniMM, judge: Judge, recipe: DrawingSection, seed: int, folder: Path
) -> dict[str, Any]:
    """Draw held-out scenes from their captions and judge the drawings.

    Returns:
        For each split and each figure of `Verdict` the scores on the drawings, the reconstructions and the
        renders, and `ratio`, drawings to reconstructions. A sheet of drawings a split goes into `folder`.
    """
    report: dict[str, Any] = {}
    for split in recipe.splits:
        verdicts: dict[str, list[Verdict]] = {source: [] for source in SOURCES}
        sections = []
        for kind in SCENE_KINDS:
            section = _evaluate_kind(um, judge, recipe, seed, split, kind, verdicts)
            sections.append(section)
        report[split] = {figure: _scores(verdicts, figure) for figure in FIGURES}
        if recipe.shown:
            sheet = draw_sheet("Drawings", f"{split} scenes, guidance {recipe.guidance_scale:g}", sections)
            save_image(sheet, folder / f"drawings-{split}.png")
    return report


def _evaluate_kind(
    um: UniMM,
    judge: Judge,
    recipe: DrawingSection,
    seed: int,
    split: SplitName,
    kind: SceneKind,
    verdicts: dict[str, list[Verdict]],
) -> SheetSection:
    """Judge one kind of scene, add to `verdicts`, and give the section of the sheet."""
    scenes = EmojiScenes(split, seed, image_size(um), recipe.samples, kinds=(kind,))
    cards: list[Card] = []
    for indices in batches(recipe.samples, f"drawing, {split}, {kind}"):
        shown = [scenes[index] for index in indices]
        prompts = [prompt_for(scene) for scene in shown]
        drawn = _draw(um, recipe, prompts, [seed * 1_000_000 + index for index in indices])
        rendered = [scene.render() for scene in shown]
        judged = judge_images(judge, shown, drawn)
        verdicts["drawn"] += judged
        verdicts["reconstructed"] += judge_images(judge, shown, reconstruct(um, rendered))
        verdicts["rendered"] += judge_images(judge, shown, rendered)
        for prompt, pixels, verdict in zip(prompts, drawn, judged, strict=True):
            if len(cards) < recipe.shown:
                style = "good" if verdict.all_right() else "bad"
                cards.append(Card([Image.fromarray(pixels)], [Line(prompt), Line(verdict.line(), style)]))
    return SheetSection(kind, cards)


def prompt_for(scene: Scene) -> str:
    """One of the scene's captions, chosen by the scene's own key."""
    captions = scene.captions()
    return captions[scene.key % len(captions)]


def reconstruct(um: UniMM, images: Sequence[Pixels]) -> list[Pixels]:
    """Images through the image tokenizer and back."""
    with torch.no_grad():
        tokenizer = um.image_tokenizer
        assert tokenizer is not None
        pixels = to_tensor(np.stack(images)).to(um.model.device)
        return list(to_uint8(tokenizer.decode(tokenizer.encode(pixels))))


def _draw(um: UniMM, recipe: DrawingSection, prompts: list[str], seeds: list[int]) -> list[Pixels]:
    images = um.draw(
        prompts,
        guidance_scale=recipe.guidance_scale,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        seed=seeds,
    )
    return [np.asarray(image.convert("RGB")) for image in images]


def _scores(verdicts: dict[str, list[Verdict]], figure: str) -> dict[str, Any]:
    """The scores of one figure on each source, and how near the drawings come to the reconstructions."""
    scores = {}
    for source, listed in verdicts.items():
        given = (getattr(verdict, figure) for verdict in listed)
        scores[source] = Score.of(good for good in given if good is not None)
    ceiling = scores["reconstructed"].rate
    ratio = round(scores["drawn"].rate / ceiling, 4) if ceiling else None
    return {"ratio": ratio, **{source: score.document() for source, score in scores.items()}}

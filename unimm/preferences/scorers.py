"""Scorers of candidates: any callable that takes a prompt's candidates and gives a number for each, higher is better.

Five come with the package, each giving shares in [0, 1]: `self-vqa`, the model's own answers about its drawings;
`rules`, pixel rules on scenes; `artwork`, a classifier of pixels on scenes; `variety`, how unlike the others a drawing
is; `probe`, the judge of `unimm.evaluation` on scenes. Judge with another than you train on: what is optimised stops
being a measure.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unimm.data.emojiscenes.scenes import Scene
from unimm.errors import UserError
from unimm.evaluation.judges import JudgeError
from unimm.images import Pixels
from unimm.models.inputs import Images
from unimm.preferences.candidates import DrawingPrompt
from unimm.preferences.judge import JudgeScorer, load_judge
from unimm.processing.messages import SHOWN, Message
from unimm.processing.processor import grids_of
from unimm.processing.rows import branch, stack_answers
from unimm.sections import near
from unimm.training.task import on_device

if TYPE_CHECKING:
    from unimm.pipeline import UniMM
    from unimm.processing.processor import UniMMProcessor


@dataclass(frozen=True)
class Candidate:
    """A drawing of a prompt, as an image and as codes [h, w]."""

    prompt: DrawingPrompt
    seed: int
    codes: Tensor
    image: Image.Image


Scorer = Callable[[Sequence[Candidate]], Sequence[float]]


class ScorerError(Exception):
    """A scorer gave no scores for a prompt."""


class ScorerContext:
    """What scorers are made of, and what the factors of a product share.

    Args:
        um: the model that drew.
        folder: where a scorer may keep what it fits.
    """

    def __init__(self, um: UniMM, folder: Path) -> None:
        self.um, self.folder = um, folder
        self._kept: list[Images] | None = None

    def needs_encoder(self, scorer: str) -> None:
        """Refuse a model that cannot see.

        Raises:
            UserError: it has no encoder.
        """
        if self.um.model.vision is None:
            raise UserError(f"{scorer}: this model has no encoder of images")

    @contextmanager
    def same_candidates(self) -> Iterator[None]:
        """Within this, `features` is always asked about the same candidates, and encodes them once."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def features(self, candidates: Sequence[Candidate]) -> Images:
        """The candidates' images as features of the model's encoder."""
        if self._kept:
            return self._kept[0]
        model = self.um.model
        images = self.um.processor.look([candidate.image for candidate in candidates])
        features: Images = model.as_features(images.to(model.device))
        if self._kept is not None:
            self._kept.append(features)
        return features


def image_candidates(
    um: UniMM, prompt: DrawingPrompt, seeds: Sequence[int], codes: Tensor
) -> list[Candidate]:
    """Return a prompt's candidates with their images.

    Args:
        um: has the image tokenizer.
        prompt: what was asked for.
        seeds: of the N candidates.
        codes: [N, h, w].
    """
    return [Candidate(prompt, *one) for one in zip(seeds, codes, to_images(um, codes), strict=True)]


def to_images(um: UniMM, codes: Tensor) -> list[Image.Image]:
    """The images of int64 codes [B, h, w]."""
    with torch.inference_mode():
        return um.decode_codes(codes.to(um.model.device))


def score_candidates(scorer: Scorer, candidates: Sequence[Candidate]) -> list[float]:
    """Return the scorer's numbers, one for each candidate.

    Raises:
        ScorerError: it raises, or gives another number of scores, or scores that are no finite numbers.
        UserError: the data lacks what the scorer needs.
    """
    try:
        scores = [float(score) for score in scorer(candidates)]
    except JudgeError as error:  # the next prompt may fare better
        raise ScorerError(str(error)) from error
    except (UserError, ScorerError):  # no candidate will have what is lacking; a part of a product has failed
        raise
    except Exception as error:  # it may be anyone's code
        raise ScorerError(f"raised {type(error).__name__}: {error}") from error
    if len(scores) != len(candidates):
        raise ScorerError(f"gave {len(scores)} scores for {len(candidates)} candidates")
    if not all(map(math.isfinite, scores)):
        raise ScorerError(f"gave scores that are no finite numbers: {scores}")
    return scores


def make_scorer(name: str, um: UniMM, folder: Path) -> Scorer:
    """Return a scorer by its name or by the dotted path of a callable, as `mymodule.score` or `mymodule:score`.

    Args:
        name: `self-vqa`, `rules`, `artwork`, `variety`, `probe`, or a path; modules of the working directory are found
            too. A YAML file with `task: judge` is a judge behind a URL (`unimm.preferences.judge`). Several with `*`
            between them, as `self-vqa*artwork`: their product, high where each of them is. A factor may have a power,
            as `rules*variety^0.5`, by which it counts more or less. Factors are at least 0.
        um: the model that drew.
        folder: where a scorer may keep what it fits.

    Raises:
        UserError: there is no such scorer.
    """
    return find_scorer(name)(ScorerContext(um, folder))


def find_scorer(name: str) -> Callable[[ScorerContext], Scorer]:
    """Return what makes a scorer; the name and errors are those of `make_scorer`."""
    if "*" in name or "^" in name:
        factors = [_factor(part) for part in name.split("*")]
        return lambda context: _product(context, [(make(context), power) for make, power in factors])
    if name in SCORERS:
        return SCORERS[name]
    if name.endswith((".yaml", ".yml")):
        settings = load_judge(name)
        return lambda context: JudgeScorer(settings)
    module_name, _, attribute = name.replace(":", ".").rpartition(".")
    if not module_name:
        known = ", ".join(SCORERS)
        raise UserError(f"scorer: {name!r}; give a dotted path, or one of {known}{near(name, SCORERS)}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"scorer: {name!r} cannot be imported ({error})") from None
    if not callable(found):
        raise UserError(f"scorer: {name!r} is {type(found).__name__}, which cannot be called")
    scorer: Scorer = found
    return lambda context: scorer


def _factor(text: str) -> tuple[Callable[[ScorerContext], Scorer], float]:
    """What makes a scorer, and its power, of `scorer` or `scorer^power`."""
    name, mark, given = text.partition("^")
    try:
        power = float(given) if mark else 1.0
    except ValueError:
        power = math.nan
    if not 0 < power < math.inf:
        raise UserError(f"scorer: {text.strip()!r}; give a power above 0 after ^, as variety^0.5")
    return find_scorer(name.strip()), power


def _product(context: ScorerContext, factors: Sequence[tuple[Scorer, float]]) -> Scorer:
    """The product of powers of what several scorers give a candidate; each is held to the contract."""

    def score(candidates: Sequence[Candidate]) -> list[float]:
        with context.same_candidates():
            given = [score_candidates(scorer, candidates) for scorer, _ in factors]
        least = min(map(min, given))
        if least < 0:  # two bad scores would make a good one
            raise ScorerError(f"a factor gave {least:g}; factors of a product give numbers from 0 up")
        powers = [power for _, power in factors]
        return [math.prod(map(pow, scores, powers)) for scores in zip(*given, strict=True)]

    return score


def self_vqa(context: ScorerContext) -> Scorer:
    """Ask the model the prompt's questions about each drawing: the mean probability that it gives the right answers.

    Answers count by the weights of their questions. The idea of scoring a generator by questions about its output is
    TIFA's (Hu et al. 2023, arXiv:2303.11897); here the model that draws answers too. The questions of a drawing are
    branches behind one reading of it.
    """
    um = context.um
    if not um.processor.sees_codes:
        context.needs_encoder("self-vqa")

    @torch.inference_mode()
    def score(candidates: Sequence[Candidate]) -> list[float]:
        images = None if um.processor.sees_codes else context.features(candidates)
        inputs, owners = question_rows(um.processor, candidates, images)
        right = um.model.score(on_device(inputs, um.model.device), len(owners)).log_probs.exp().cpu().numpy()
        weights = [asked.weight for candidate in candidates for asked in candidate.prompt.questions]
        totals = np.bincount(owners, weights=right * weights, minlength=len(candidates))
        return list(totals / np.bincount(owners, weights=weights, minlength=len(candidates)))

    return score


def question_rows(
    processor: UniMMProcessor, candidates: Sequence[Candidate], images: Images | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Rows of an image and its questions, each answer numbered, and the candidate of each answer.

    Args:
        processor: of the model that is asked.
        candidates: whose images and questions.
        images: the images as features; None: they are read as pixels.
    """
    if images is None:
        images = processor.look([candidate.image for candidate in candidates])
    grids = grids_of(images)
    rows: list[dict[str, Any]] = []
    owners: list[int] = []
    for place, (candidate, grid) in enumerate(zip(candidates, grids, strict=True)):
        questions = candidate.prompt.questions
        if not questions:
            raise UserError(f"self-vqa: the prompt {candidate.prompt.prompt!r} has no questions to ask")
        row = branch(
            [
                processor.conversation.write(
                    [Message("user", (SHOWN, asked.question)), Message("assistant", (asked.answer,))], [grid]
                )
                for asked in questions
            ]
        )
        answers = row.numbered(range(len(owners), len(owners) + len(questions)))
        rows.append({**row.arrays(), "answers": answers})
        owners += [place] * len(questions)
    return {**stack_answers(rows, processor.pad), "images": images}, owners


def rules(context: ScorerContext) -> Scorer:
    """Pixel rules on scenes: the background's colour, the number of objects, and how two of them lie to each other."""
    from unimm.evaluation.emojiscenes.pixels import background_name, find_objects, relation

    def one(scene: Scene, image: Pixels) -> float:
        boxes = find_objects(image)
        right = [background_name(image) == scene.background, len(boxes) == len(scene.objects)]
        if scene.relation is not None:
            sideways = scene.relation in ("left of", "right of")
            found = relation(boxes[0], boxes[1]) if len(boxes) == 2 else None
            right.append(found in (("left of", "right of") if sideways else ("above", "below")))
        return sum(right) / len(right)

    def score(candidates: Sequence[Candidate]) -> list[float]:
        return [one(_scene(candidate, "rules"), np.asarray(candidate.image)) for candidate in candidates]

    return score


def artwork(context: ScorerContext) -> Scorer:
    """The look of scenes: how surely the object is the right one, or two are the right way round; see `Artwork`."""
    from unimm.preferences.artwork import Artwork

    known = Artwork(context.um, context.folder / "artwork.safetensors")

    def score(candidates: Sequence[Candidate]) -> list[float]:
        scenes = [_scene(candidate, "artwork") for candidate in candidates]
        return known.scores(scenes, [np.asarray(candidate.image) for candidate in candidates])

    return score


def variety(context: ScorerContext) -> Scorer:
    """How unlike a prompt's other drawings each is, as a share of the most unlike: to be multiplied with other scores.

    The mean distance of unit features, which are means of the model's own encoder's; 1 for all where they are equal.
    To multiply quality by diversity is DARLING's way (Li et al. 2025, arXiv:2509.02534), lest what grows likelier grow
    alike.
    """
    context.needs_encoder("variety")

    @torch.inference_mode()
    def score(candidates: Sequence[Candidate]) -> list[float]:
        means = [own.float().mean(0) for own in context.features(candidates).each_feature()]
        features = F.normalize(torch.stack(means), dim=1)
        distances = torch.cdist(features, features).sum(1)
        most = distances.max()
        return list((distances / most if most > 0 else torch.ones_like(distances)).tolist())

    return score


def probe(context: ScorerContext) -> Scorer:
    """The judge of drawings on scenes: the share of background, object, place and count that is right."""
    from unimm.evaluation.emojiscenes.drawing import judge_images
    from unimm.evaluation.emojiscenes.judge import Judge
    from unimm.evaluation.recipe import JudgeSection

    judge = Judge(JudgeSection(), context.folder / "judge.safetensors", str(context.um.model.device))

    def score(candidates: Sequence[Candidate]) -> list[float]:
        scenes = [_scene(candidate, "probe") for candidate in candidates]
        verdicts = judge_images(judge, scenes, [np.asarray(candidate.image) for candidate in candidates])
        shares = []
        for verdict in verdicts:
            figures = (verdict.background, verdict.object, verdict.place_named, verdict.count)
            asked = [good for good in figures if good is not None]
            shares.append(sum(asked) / len(asked))
        return shares

    return score


SCORERS: dict[str, Callable[[ScorerContext], Scorer]] = {
    "self-vqa": self_vqa,
    "rules": rules,
    "artwork": artwork,
    "variety": variety,
    "probe": probe,
}
"""The scorers that come with the package."""


def _scene(candidate: Candidate, scorer: str) -> Scene:
    key = candidate.prompt.scene
    if key is None:
        raise UserError(f"{scorer}: the prompt {candidate.prompt.prompt!r} names no scene of EmojiScenes")
    return key.scene()

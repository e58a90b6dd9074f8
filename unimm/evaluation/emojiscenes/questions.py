"""Questions: is the answer, letter case and outer blanks aside, exactly the right one?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unimm.data.emojiscenes.scenes import EmojiScenes, Question, Scene
from unimm.evaluation.emojiscenes.batches import MAX_TOKENS, batches, image_size, render_image
from unimm.evaluation.recipe import Questions, SplitName
from unimm.evaluation.score import Score

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

QUESTION_KINDS = ("what", "count", "background", "where", "yesno", "category")


def evaluate_questions(um: UniMM, recipe: Questions, seed: int) -> dict[str, Any]:
    """Ask the same number of questions of every kind about held-out scenes.

    Returns:
        For each split the score of each kind and of `all` together, and `yes_share`, the share of yes/no
        questions whose right answer is yes.
    """
    return {split: _evaluate_split(um, split, recipe.samples, seed) for split in recipe.splits}


def collect_questions(scenes: EmojiScenes, per_kind: int) -> list[tuple[Scene, Question]]:
    """Questions from successive scenes until there are `per_kind` of every kind."""
    left = dict.fromkeys(QUESTION_KINDS, per_kind)
    chosen: list[tuple[Scene, Question]] = []
    index = 0
    while any(left.values()):
        scene = scenes[index]
        index += 1
        for question in scene.questions():
            if left[question.kind]:
                left[question.kind] -= 1
                chosen.append((scene, question))
    return chosen


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, letter case and outer blanks aside."""
    return answer.strip().lower() == expected.strip().lower()


def _evaluate_split(um: UniMM, split: SplitName, per_kind: int, seed: int) -> dict[str, Any]:
    chosen = collect_questions(EmojiScenes(split, seed, image_size(um)), per_kind)
    verdicts: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for indices in batches(len(chosen), f"questions, {split}"):
        asked = [chosen[index] for index in indices]
        images = [render_image(scene) for scene, _ in asked]
        answers = um.ask(images, [question.question for _, question in asked], MAX_TOKENS)
        for (_, question), answer in zip(asked, answers, strict=True):
            verdicts[question.kind].append(is_right(answer, question.answer))
    everything = [verdict for listed in verdicts.values() for verdict in listed]
    yes = [question.answer == "yes" for _, question in chosen if question.kind == "yesno"]
    report: dict[str, Any] = {"all": Score.of(everything).document()}
    report |= {kind: Score.of(listed).document() for kind, listed in verdicts.items()}
    return {**report, "yes_share": round(sum(yes) / len(yes), 4)}

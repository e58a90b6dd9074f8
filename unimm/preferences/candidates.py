"""Candidates: several drawings of each prompt, their codes kept; a file of JSON lines that can be resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field

from unimm.data.emojiscenes.concepts import with_article
from unimm.data.emojiscenes.scenes import SCENE_KINDS, EmojiScenes, Question, Scene, SceneKind, Split
from unimm.errors import UserError
from unimm.files import append, check_target, open_here, open_regular
from unimm.preferences.data import CodeRows, parse_lines, read_lines
from unimm.sections import NotNegative, Rate, Section, show, validate

if TYPE_CHECKING:
    from unimm.pipeline import UniMM


Emphasis: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""Weight of some questions against 1 of the others; infinity (`.inf` in YAML) leaves the others out."""


class DrawingQuestion(Section):
    """A question about a drawing, and the answer if the drawing is what was asked for."""

    question: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What the answer counts among the prompt's."""


def _some(kinds: dict[SceneKind, float]) -> dict[SceneKind, float]:
    if not any(kinds.values()):
        raise ValueError("expected a share above 0")
    return kinds


KindShares: TypeAlias = Annotated[dict[SceneKind, Rate], AfterValidator(_some)]
"""Kind of scene -> its share among scenes."""


class SceneKey(Section):
    """Which scene of EmojiScenes a prompt describes."""

    split: Split
    seed: NotNegative
    index: NotNegative
    kinds: KindShares | None = None
    """Of the scenes; null: their usual shares."""

    def scene(self) -> Scene:
        """The scene."""
        return EmojiScenes(self.split, self.seed, kinds=self.kinds or SCENE_KINDS)[self.index]


class DrawingPrompt(Section):
    """What to draw, and what scorers may know of it."""

    prompt: Annotated[str, Field(min_length=1)]
    questions: list[DrawingQuestion] = Field(default=[])
    scene: SceneKey | None = None


class SampledDrawing(Section):
    """One candidate."""

    seed: NotNegative
    codes: CodeRows


class PromptCandidates(DrawingPrompt):
    """A prompt with its candidates and how they were drawn."""

    candidates: Annotated[list[SampledDrawing], Field(min_length=1)]
    settings: dict[str, Any] = Field(default={})


def read_prompts(path: str | Path) -> list[DrawingPrompt]:
    """Read what to draw: a text file with a prompt a line, or (`.jsonl`) a `DrawingPrompt` a line.

    Raises:
        UserError: naming file, line and field; or there is no prompt.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        prompts = [validate(DrawingPrompt, value, where) for where, value in read_lines(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as text ({error})") from None
        prompts = [DrawingPrompt(prompt=line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: empty; it should hold a prompt a line")
    return prompts


def scene_prompts(
    split: Split,
    seed: int,
    count: int,
    emphasis: float = 1.0,
    kinds: dict[SceneKind, float] | None = None,
) -> list[DrawingPrompt]:
    """Return captions of scenes of EmojiScenes, with the scenes' own questions and answers.

    Args:
        split: of the scenes.
        seed: which scenes.
        count: how many.
        emphasis: weight of the questions `about` what such a scene is for; the others have 1, or are not asked where
            it is infinite.
        kinds: shares of the kinds of scene; None: their usual ones.
    """
    only = math.isinf(emphasis)
    prompts = []
    for index in range(count):
        key = SceneKey(split=split, seed=seed, index=index, kinds=kinds)
        scene = key.scene()
        captions = scene.captions()
        asked = about(scene, 1.0 if only else emphasis)
        if not only:
            known = {one.question for one in asked}
            asked += [
                DrawingQuestion(question=one.question, answer=one.answer)
                for one in scene.questions()
                if one.question not in known
            ]
        prompt = captions[scene.key % len(captions)]
        prompts.append(DrawingPrompt(prompt=prompt, questions=asked, scene=key))
    return prompts


def about(scene: Scene, weight: float = 1.0) -> list[DrawingQuestion]:
    """Questions about what only a scene of its kind shows, their weights summing up to `weight`.

    One object: whether it is there. Two: how many, and how they stand. A number of objects: how many. What is known is
    asked by yes or no: where one of two stands would be answered with the name of the other, and the probability of
    that answer would tell of the name.
    """
    count = next(one for one in scene.questions() if one.kind == "count")
    if scene.kind == "single":
        asked = [(Question("yesno", f"is there {with_article(scene.concept)}?", "yes"), 1.0)]
    elif scene.kind == "pair":
        yes, *_, no = (one for one in scene.placings() if one.kind == "yesno")
        asked = [(count, 0.5), (yes, 0.25), (no, 0.25)]
    else:
        asked = [(count, 1.0)]
    return [
        DrawingQuestion(question=one.question, answer=one.answer, weight=weight * share)
        for one, share in asked
    ]


def draw_candidates(
    um: UniMM,
    prompts: Sequence[DrawingPrompt],
    path: str | Path,
    n: int,
    seed: int,
    settings: Mapping[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw `n` candidates of every prompt and append them to a file; what it holds already is kept.

    Candidate k of every prompt has the random stream of seed `seed + k`, so that a stopped run that is started again
    writes what one left alone would have.

    Args:
        um: what draws.
        prompts: what to draw.
        path: JSON lines of `PromptCandidates`.
        n: candidates of each prompt.
        seed: of the first candidate.
        settings: `guidance_scale`, `temperature`, `top_k`, `top_p` of `UniMM.draw`, and `model`, its name.
        on_progress: called with prompts done and prompts in all.

    Returns:
        The file, its prompts, and how many of them were there before.

    Raises:
        UserError: the file holds other prompts, or candidates that were drawn in another way.
    """
    path = Path(path)
    written = {**settings, "n": n, "seed": seed}
    done = _already(path, prompts, written)
    options = {key: value for key, value in settings.items() if key != "model"}
    unlimited = {"top_k": 0, "top_p": 1.0}  # None would be the model's own
    options |= {key: value for key, value in unlimited.items() if options.get(key) is None}
    seeds = [seed + k for k in range(n)]
    share = max(1, um.batch_size // n)
    path.parent.mkdir(parents=True, exist_ok=True)
    append(path, "")  # that it can be written is known before anything is drawn
    for start in range(done, len(prompts), share):
        part = prompts[start : start + share]
        texts = [prompt.prompt for prompt in part]
        codes = um.draw_codes(texts, n=n, seed=seeds * len(part), **options)
        lines = []
        for prompt, drawn in zip(part, codes.view(len(part), n, *codes.shape[1:]).tolist(), strict=True):
            candidates = [{"seed": s, "codes": one} for s, one in zip(seeds, drawn, strict=True)]
            row = {**prompt.model_dump(), "candidates": candidates, "settings": written}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        append(path, "".join(lines))
        if on_progress is not None:
            on_progress(start + len(part), len(prompts))
    return {"candidates": str(path), "prompts": len(prompts), "drawn_before": done, "each": n}


def read_candidates(path: str | Path) -> list[PromptCandidates]:
    """Read a file of candidates.

    Raises:
        UserError: naming file, line and field; or it is empty.
    """
    rows = [validate(PromptCandidates, value, where) for where, value in read_lines(Path(path))]
    if not rows:
        raise UserError(f"{path}: empty; draw candidates first (`unimm preferences draw`)")
    return rows


def _already(path: Path, prompts: Sequence[DrawingPrompt], settings: Mapping[str, Any]) -> int:
    """How many prompts a file holds; a last line that was cut off in writing is removed, once the file is known.

    Raises:
        UserError: it is a link or no regular file, or holds something else; it is as it was.
    """
    check_target(path)
    if not path.exists():
        return 0
    with open_regular(path) as file:
        whole, newline, rest = file.read().rpartition(b"\n")
    count = _count(path, whole, prompts, settings)
    if rest:
        if count == len(prompts) or not _begins(rest, prompts[count]):
            line = whole.count(b"\n") + len(newline) + 1
            raise UserError(
                f"{path}:{line}: holds something else than candidates; give another file, or remove it"
            )
        with os.fdopen(open_here(path, os.O_WRONLY), "wb") as out:
            out.truncate(len(whole) + len(newline))
    return count


def _begins(piece: bytes, prompt: DrawingPrompt) -> bool:
    """Whether a piece of a line may be the beginning of a prompt's."""
    line = json.dumps({"prompt": prompt.prompt}, ensure_ascii=False)[:-1].encode()
    return piece[: len(line)] == line[: len(piece)]


def _count(path: Path, lines: bytes, prompts: Sequence[DrawingPrompt], settings: Mapping[str, Any]) -> int:
    """How many of the prompts whole lines hold. Raises UserError: they hold something else."""
    count = 0
    for where, value in parse_lines(path, lines):
        row = validate(PromptCandidates, value, where)
        if count >= len(prompts) or row.prompt != prompts[count].prompt:
            raise UserError(f"{where}: the prompt is not that of this run; give another file, or remove it")
        if row.questions != prompts[count].questions:
            raise UserError(
                f"{where}: the questions are not those of this run; give another file, or remove it"
            )
        for key, wanted in settings.items():
            if row.settings.get(key) != wanted:
                was = show(row.settings.get(key))
                raise UserError(
                    f"{where}: drawn with {key} {was}, now {show(wanted)}; give another file, or remove it"
                )
        count += 1
    return count

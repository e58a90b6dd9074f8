"""What `unimm demo` does: caption, ask and draw with the embedded model, on one contact sheet.

The scenes are the first ones of held-out splits, not chosen by hand: `seen` has layouts that were never
trained on, `vendor` has the artwork of two families of which no image was trained on.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from unimm.data.emojiscenes.scenes import EmojiScenes, Question, Scene
from unimm.errors import UserError
from unimm.images import save_image
from unimm.loading import load
from unimm.outputs import check_output, is_image_file
from unimm.sheet import Card, Line, SheetSection, draw_sheet

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

SEED = 2026  # of the scenes: any will do, and none of the figures in the README use it
CAPTIONED = 6  # scenes of each split
ASKED = {"seen": 4, "vendor": 2}  # scenes that questions are asked about
QUESTIONS = 4  # about each of them
DRAWN = 2  # drawings of each prompt
MAX_TOKENS = 64  # of a caption or an answer
PROMPTS = (
    "a red apple on a blue background",
    "a penguin on a pink background",
    "a rocket on a purple background",
    "a hamburger on a yellow background",
    "three strawberries on a green background",
    "two balloons on a blue background",
    "a sunflower left of a crown on a pink background",
    "a star above a turtle on a green background",
    "a birthday cake on a brown background",
)


@dataclass(frozen=True)
class Captioned:
    """A caption that the model gave; it is `right` if it is one of the scene's own."""

    split: str
    truth: str
    caption: str
    right: bool


@dataclass(frozen=True)
class Answered:
    """An answer that the model gave."""

    split: str
    scene: str
    question: str
    truth: str
    answer: str
    right: bool


@dataclass(frozen=True)
class DemoReport:
    """All that a demonstration said and where its contact sheet is."""

    captions: list[Captioned]
    answers: list[Answered]
    prompts: list[str]
    sheet: str
    seconds: float


def run(
    folder: str | os.PathLike[str],
    source: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    image_tokenizer: str | None = None,
) -> DemoReport:
    """Caption and ask about held-out scenes, draw prompts, and write `folder/unimm-demo.png`.

    Args:
        folder: where the contact sheet goes; made if it is missing.
        source: another model than the embedded one, as `unimm.load` takes it.
        device: as `unimm.load` takes it.
        dtype: as `unimm.load` takes it.
        revision: as `unimm.load` takes it.
        image_tokenizer: as `unimm.load` takes it.

    Raises:
        UserError: the folder cannot be written, or `source` is no model, or none that understands and draws.
    """
    start = time.perf_counter()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{os.fspath(folder)}: cannot be used as a folder ({error.strerror})") from None
    sheet = Path(folder) / "unimm-demo.png"
    check_output(sheet, "an image", is_image_file)
    um = load(source, device=device, dtype=dtype, revision=revision, image_tokenizer=image_tokenizer)
    if um.processor.views is None or um.processor.drawing_size is None:
        raise UserError("--model: the demo wants a model that understands images and draws")
    captions, caption_sections = _caption(um)
    answers, answer_section = _ask(um)
    drawings = um.draw(list(PROMPTS), n=DRAWN, seed=SEED)
    assert isinstance(drawings, list)
    cards = [Card(drawings[i * DRAWN : (i + 1) * DRAWN], [Line(prompt)]) for i, prompt in enumerate(PROMPTS)]
    drawing_section = SheetSection("Drawings", cards, f"{DRAWN} of each prompt, the first that came")
    right = sum(row.right for row in captions), sum(row.right for row in answers)
    subtitle = (
        f"One small model reads and draws: {right[0]} of {len(captions)} captions and {right[1]} of "
        f"{len(answers)} answers below are right; every scene is held out from training."
    )
    sections = [*caption_sections, answer_section, drawing_section]
    save_image(draw_sheet("unimm demo", subtitle, sections), sheet)
    return DemoReport(captions, answers, list(PROMPTS), str(sheet), time.perf_counter() - start)


def _caption(um: UniMM) -> tuple[list[Captioned], list[SheetSection]]:
    """Caption the first scenes of each held-out split."""
    rows: list[Captioned] = []
    sections = []
    notes = {"seen": "known artwork in layouts never trained on", "vendor": "artwork never trained on"}
    for split, note in notes.items():
        images = [_image(scene) for scene in _scenes(split, CAPTIONED)]
        truths = [scene.captions() for scene in _scenes(split, CAPTIONED)]
        said = um.caption(images, MAX_TOKENS)
        new = [Captioned(split, t[0], s, s in t) for t, s in zip(truths, said, strict=True)]
        cards = [
            Card([image], _verdict(row.caption, row.truth, row.right))
            for image, row in zip(images, new, strict=True)
        ]
        sections.append(SheetSection("Captions", cards, note))
        rows += new
    return rows, sections


def _ask(um: UniMM) -> tuple[list[Answered], SheetSection]:
    """Ask questions about further scenes, all in one batch."""
    asked: list[tuple[str, Scene, Question]] = []
    for split, count in ASKED.items():
        for scene in _scenes(split, CAPTIONED + count)[CAPTIONED:]:
            asked += [(split, scene, question) for question in scene.questions()[-QUESTIONS:]]
    images = [_image(scene) for _, scene, _ in asked]
    said = um.ask(images, [question.question for _, _, question in asked], MAX_TOKENS)
    rows = [
        Answered(split, scene.captions()[0], q.question, q.answer, answer, answer == q.answer)
        for (split, scene, q), answer in zip(asked, said, strict=True)
    ]
    cards = []
    for first in range(0, len(rows), QUESTIONS):
        lines: list[Line] = []
        for row in rows[first : first + QUESTIONS]:
            lines += [Line(row.question, "muted"), *_verdict(row.answer, row.truth, row.right)]
        cards.append(Card([images[first]], lines))
    return rows, SheetSection("Answers", cards, "the last two on artwork never trained on")


def _scenes(split: str, count: int) -> list[Scene]:
    """Return the first scenes of a split."""
    dataset = EmojiScenes(split, seed=SEED)  # type: ignore[arg-type]
    return [dataset[index] for index in range(count)]


def _image(scene: Scene) -> Image.Image:
    """Render a scene."""
    return Image.fromarray(scene.render())


def _verdict(said: str, truth: str, right: bool) -> list[Line]:
    """What the model said, in green; or in red, with the truth under it."""
    return [Line(said, "good")] if right else [Line(said, "bad"), Line(f"(truth: {truth})", "muted")]

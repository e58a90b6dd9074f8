"""What a run on one's own data shows on the way: items answered and drawn, beside what the data has.

They are held-out items where a recipe holds some out, else items that are trained on, which is said. A question is
asked in the very tokens that training has; a prompt is drawn as `UniMM.draw` draws it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from unimm.data.sources import Message, Record
from unimm.errors import UserError, UserNote
from unimm.files import append
from unimm.images import save_image
from unimm.models.layout import IGNORED
from unimm.pipeline import UniMM
from unimm.processing.views import TargetSize
from unimm.sampling.text import generate_text
from unimm.sheet import Card, Line, SheetSection, draw_sheet
from unimm.training.held_out import Items, Place, spread
from unimm.training.previews import draw

PREVIEW_ANSWERS, PREVIEW_DRAWINGS = 8, 8  # items of a preview
MAX_ANSWER_TOKENS = 64  # tokens of an answer
PREVIEW_COLUMNS = 4  # of a sheet, which is shown small
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")  # where no spaces part words, characters


@dataclass(frozen=True)
class PreviewQuestion:
    """A question of an item, and how it is answered there.

    Attributes:
        key: of the item.
        question: the user's words; empty where only images are shown.
        images: that go with it.
        answers: of the data, in each of its wordings.
        inputs: of the model: ids [1, T] and pixels.
    """

    key: str
    question: str
    images: list[Image.Image]
    answers: list[str]
    inputs: BatchFeature


@dataclass(frozen=True)
class PreviewDrawing:
    """A prompt of an item, the images that go with it, and the image that the data has for it."""

    key: str
    prompt: str
    images: list[Image.Image]
    original: Image.Image


class PreviewItems:
    """The items that previews show.

    Args:
        items: what they are chosen from, evenly.
        held_out: whether they are held out of training.
    """

    def __init__(self, items: Items, held_out: bool) -> None:
        self.items, self.held_out = items, held_out
        asked: list[Place] = []
        drawn: list[Place] = []
        for place in items.places:
            record = items.record(place)
            if record.kind in ("text_to_image", "image_text_to_image"):
                drawn.append(place)
            elif record.kind != "interleaved" and record.messages[0].role != "assistant":
                asked.append(place)
        self.asked = spread_places(asked, PREVIEW_ANSWERS)
        self.drawn = spread_places(drawn, PREVIEW_DRAWINGS)

    def questions(self) -> list[PreviewQuestion]:
        """The first question of each item that asks; those whose images are features are left out."""
        return [self._question(place) for place in self.asked if not self._featured(place)]

    def _featured(self, place: Place) -> bool:
        return any(image.featured for image in self.items.record(place).images())

    def _question(self, place: Place) -> PreviewQuestion:
        record = self.items.record(place)
        first = Record(record.key, _first_turn(record.messages))
        sample = self.items.makers[place[0]].builder.build(first, record.key)
        prompt = sample["ids"][: int(np.argmax(sample["labels"] != IGNORED))]
        inputs = {"input_ids": torch.from_numpy(prompt)[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs |= sample["images"].inputs()
        answers = [_words(_first_turn(record.version(n).messages)[-1:]) for n in range(record.versions)]
        images = [image.image() for image in first.images(draw=False)]
        words = _words([message for message in first.messages if message.role == "user"])
        return PreviewQuestion(record.key, words, images, answers, BatchFeature(inputs))

    def prompts(self, um: UniMM, target_size: TargetSize | None) -> list[PreviewDrawing]:
        """The prompts of the items that are drawn; those that have no room, as with images, are left out."""
        found = []
        for place in self.drawn:
            record = self.items.record(place)
            turn = _first_turn(record.messages)
            original = next((part for part in turn[-1].parts if not isinstance(part, str)), None)
            if original is None or original.featured:
                continue
            words = _words([message for message in turn if message.role == "user"])
            with suppress(UserError):
                images = [image.image() for image in record.images(draw=False)]
                um.processor.drawing_inputs(words, images)
                if original.encoded:
                    codes = torch.from_numpy(original.codes())[None].to(um.model.device)
                    image = um.decode_codes(codes)[0]
                else:
                    assert target_size is not None
                    image = um.processor.to_images(target_size.pixels(original.image())[None])[0]
                found.append(PreviewDrawing(record.key, words, images, image))
        return found


def spread_places(places: Sequence[Place], count: int) -> list[Place]:
    """At most so many places, evenly spread over all."""
    return [places[number] for number in spread(range(len(places)), min(count, len(places)))]


def _first_turn(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages up to the first answer."""
    last = next(number for number, message in enumerate(messages) if message.role == "assistant")
    return tuple(messages[: last + 1])


def _words(messages: Sequence[Message]) -> str:
    return " ".join(part.strip() for message in messages for part in message.parts if isinstance(part, str))


def preview_items(
    um: UniMM, shown: PreviewItems, target_size: TargetSize | None, folder: Path, step: int
) -> None:
    """Answer and draw items.

    Args:
        um: the model, in eval mode, and its processor.
        shown: the items.
        target_size: the size of drawings; None where the model does not draw.
        folder: where a sheet is written, and a line of `held-out.jsonl` (or `trained-on.jsonl`).
        step: which they are named after.
    """
    asked = shown.questions()
    answers = [
        generate_text(um.model, um.processor, one.inputs, max_new_tokens=MAX_ANSWER_TOKENS)[0]
        for one in asked
    ]
    prompts = shown.prompts(um, target_size)
    drawings: list[Image.Image] = []
    if prompts:
        assert target_size is not None
        with warnings.catch_warnings():
            if any(one.images for one in prompts):  # that few models draw from them
                warnings.simplefilter("ignore", UserNote)
            drawings = draw(um, [one.prompt for one in prompts], target_size, [one.images for one in prompts])
    if not asked and not prompts:
        return
    name = "held-out" if shown.held_out else "trained-on"
    line: dict[str, Any] = {"step": step}
    if asked:
        pairs = list(zip(answers, asked, strict=True))
        line["exact_match"] = float(np.mean([exact_match(said, one.answers) for said, one in pairs]))
        line["word_f1"] = float(np.mean([word_f1(said, one.answers) for said, one in pairs]))
        line["answers"] = [
            {"key": one.key, "question": one.question, "answer": said, "reference": one.answers[0]}
            for said, one in pairs
        ]
    if prompts:
        line["prompts"] = [{"key": one.key, "prompt": one.prompt} for one in prompts]
    folder.mkdir(parents=True, exist_ok=True)
    save_image(_sheet(shown, step, asked, answers, prompts, drawings), folder / f"{name}-{step:06d}.png")
    append(folder / f"{name}.jsonl", json.dumps(line, ensure_ascii=False) + "\n")


def _sheet(
    shown: PreviewItems,
    step: int,
    asked: Sequence[PreviewQuestion],
    answers: Sequence[str],
    prompts: Sequence[PreviewDrawing],
    drawings: Sequence[Image.Image],
) -> Image.Image:
    """Answers beside those of the data, drawings beside the originals."""
    sections = []
    if prompts:
        cards = [
            Card([*one.images, one.original, drawing], [Line(one.prompt)])
            for one, drawing in zip(prompts, drawings, strict=True)
        ]
        sections.append(SheetSection("Drawn", cards, "left: the original; right: the drawing"))
    if asked:
        cards = [_answer_card(one, said) for one, said in zip(asked, answers, strict=True)]
        sections.append(SheetSection("Answered", cards, "below each answer: that of the data"))
    title = "Held-out items" if shown.held_out else "Items that are trained on"
    return draw_sheet(title, f"step {step}", sections, PREVIEW_COLUMNS)


def _answer_card(asked: PreviewQuestion, said: str) -> Card:
    question = [Line(asked.question, "muted")] if asked.question else []
    style = "good" if exact_match(said, asked.answers) else "text"
    return Card(
        asked.images[:PREVIEW_COLUMNS],
        [*question, Line(said or "(nothing)", style), Line(f"data: {asked.answers[0]}", "muted")],
    )


# --- how like the data an answer is ----------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation; of Chinese and Japanese each character."""
    return _WORD.findall(text.lower())


def exact_match(said: str, answers: Sequence[str]) -> bool:
    """Whether an answer has the words of one of those of the data."""
    return any(words_of(said) == words_of(answer) for answer in answers)


def word_f1(said: str, answers: Sequence[str]) -> float:
    """The share of words in common, as in SQuAD (arXiv 1606.05250): the best F1 over the answers of the data."""
    return max(_f1(words_of(said), words_of(answer)) for answer in answers)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))

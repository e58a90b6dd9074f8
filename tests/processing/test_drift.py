"""One conversation on every way that there is is one row: asking, drawing, records, pairs and the questions of scorers.

Janus and Emu3 without a chat template, so that the family's own turns are written.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.data.samples import SampleBuilder
from unimm.pipeline import UniMM
from unimm.preferences.candidates import DrawingPrompt, DrawingQuestion
from unimm.preferences.data import read_preferences
from unimm.preferences.samples import PairSamples
from unimm.preferences.scorers import Candidate, question_rows
from unimm.processing.messages import DRAWN, SHOWN, Message, Record
from unimm.processing.processor import grids_of
from unimm.processing.rows import Row, branch

FAMILIES = {"janus": janus_checkpoints.janus, "emu3": emu3_checkpoints.emu3}
QUESTION, ANSWER = "what is this?", "a red apple"


@pytest.fixture(scope="module", params=FAMILIES)
def um(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder)
    (folder / "chat_template.jinja").unlink()
    return unimm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def record(um: UniMM, *messages: Message, grids: list[tuple[int, int]] | None = None) -> Row:
    builder = SampleBuilder(um.processor, None, lambda pixels: pixels)
    return builder.row(Record("k", messages), grids or [], [])


def test_a_question_and_its_answer(um: UniMM, image: Path, tmp_path: Path) -> None:
    processor, grids = um.processor, grids_of(um.processor.look([image]))
    asked, answered = Message("user", (SHOWN, QUESTION)), Message("assistant", (ANSWER,))
    row = record(um, asked, answered, grids=grids)
    prompt = processor([QUESTION], [[image]])["input_ids"][0].tolist()
    assert row.ids[: len(prompt)] == prompt == processor.question_ids(QUESTION, grids)

    path = tmp_path / "pairs.jsonl"
    said = {"prompt": QUESTION, "images": [str(image)], "chosen": ANSWER, "rejected": "a blue one"}
    path.write_text(json.dumps(said) + "\n")
    pair = PairSamples(read_preferences([path]), processor, um.model)[0]
    assert pair["prompt"] == prompt and pair["chosen"]["row"] == row

    codes = torch.zeros(1, 1, dtype=torch.long)
    questions = [
        DrawingQuestion(question=QUESTION, answer=ANSWER),
        DrawingQuestion(question="why?", answer="it is"),
    ]
    candidate = Candidate(DrawingPrompt(prompt="a", questions=questions), 0, codes, Image.open(image))
    inputs, _ = question_rows(processor, [candidate])
    branches = branch(
        [row, record(um, Message("user", (SHOWN, "why?")), Message("assistant", ("it is",)), grids=grids)]
    )
    assert inputs["input_ids"][0].tolist() == branches.ids
    assert inputs["labels"][0].tolist()[1:] == branches.labels[1:]
    first = [*branches.ids[: branches.prefix], *branches.ids[branches.prefix :][: branches.lengths[0]]]
    assert first == row.ids


def test_the_prompt_that_guidance_subtracts_is_the_one_that_is_trained(um: UniMM) -> None:
    processor = um.processor
    grid = (3, 5) if processor.layout.sized else processor.layout.grid
    count = grid[0] * grid[1]
    codes = torch.arange(count).view(grid) % 7
    prompt = processor.drawing_ids("a red apple", grid)
    subtracted = processor.unconditional_ids(prompt, grid)
    assert subtracted != prompt

    exchange = (Message("user", ("a red apple",)), Message("assistant", (DRAWN,)))
    builder = SampleBuilder(processor, processor.target_size(), lambda pixels: pixels)
    kept, dropped = (
        builder.build(Record("k", exchange), "here", lambda: [codes], drop_prompt=drop)["ids"].tolist()
        for drop in (False, True)
    )
    drawn = processor.layout.drawing(codes)[0]
    assert kept == [*prompt, *drawn] and dropped == [*subtracted, *drawn]


def test_a_prompt_with_images_is_asked_for_as_it_is_trained(um: UniMM, image: Path) -> None:
    processor = um.processor
    grid = (3, 5) if processor.layout.sized else processor.layout.grid
    grids = grids_of(processor.look([image]))
    codes = torch.zeros(grid, dtype=torch.long)
    prompt = processor.drawing_ids("make it red", grid, grids)
    edit = [Message("user", (SHOWN, "make it red")), Message("assistant", (DRAWN,))]
    row = processor.conversation.write(edit, [*grids, codes])
    assert row.ids == [*prompt, *processor.layout.drawing(codes)[0]]


def test_a_system_message_ends_as_its_family_ends_its_own(um: UniMM) -> None:
    said = [Message("system", ("be brief",)), Message("user", ("it",)), Message("assistant", (ANSWER,))]
    text = um.processor.tokenizer.decode(record(um, *said).ids)
    between = " USER: " if um.processor.layout.sized else "\n\n<|User|>: "
    assert f"be brief{between}it" in text

"""Drawing from words and images: where the images stand, what guidance blanks, and the same in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from tests.families.emu3_checkpoints import emu3
from tests.families.janus_checkpoints import janus
from unimm.errors import UserError, UserNote
from unimm.models.inputs import Images
from unimm.pipeline import UniMM

PROMPTS = ["a red apple", "what", "a blue background on it", "it is"]
SEEDS = [3, 1, 4, 1]


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(31, 17), (20, 64), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    janus(folder / "janus")
    emu3(folder / "emu3")
    return folder


def draw(um: UniMM, prompts: str | list[str], images: Any, **options: Any) -> torch.Tensor:
    """Codes of drawings from images, which comes with a note."""
    with pytest.warns(UserNote, match="learn to draw from words alone"):
        codes: torch.Tensor = um.draw(prompts, images=images, return_codes=True, **options)[1]
    return codes


@pytest.mark.parametrize("scale", [5.0, 1.0])
@pytest.mark.parametrize("source", [None, "janus", "emu3"])
def test_a_batch_draws_what_each_draws_alone(folder: Path, source: str | None, scale: float) -> None:
    um = unimm.load(source and folder / source, device="cpu")
    one, two, three = images(3)
    shown = [None, one, [two, three], None]
    options: dict[str, Any] = {"guidance_scale": scale}
    if source == "emu3":
        options["size"] = (20, 12)
    codes = draw(um, PROMPTS, shown, seed=SEEDS, **options)
    for i, (prompt, entry) in enumerate(zip(PROMPTS, shown, strict=True)):
        call = {"seed": [SEEDS[i]], **options}
        alone = draw(um, prompt, [entry], **call) if entry else um.draw(prompt, return_codes=True, **call)[1]
        assert torch.equal(alone[0], codes[i])
    words = um.draw(PROMPTS, seed=SEEDS, return_codes=True, **options)[1]
    same = (words == codes).flatten(1).all(1).tolist()
    assert same == [True, False, False, True]  # the images are seen, and by their own rows only


def test_several_drawings_of_each_prompt(tiny_model: UniMM) -> None:
    one, two = images(2)
    codes = draw(tiny_model, PROMPTS[:2], [one, two], n=2, seed=[1, 2, 1, 2])
    for i, image in enumerate((one, two)):
        alone = draw(tiny_model, PROMPTS[i], image, n=2, seed=[1, 2])
        assert torch.equal(alone, codes[2 * i : 2 * i + 2])


def test_a_image_stands_where_a_question_has_it(folder: Path, tiny_model: UniMM) -> None:
    for um in (tiny_model, unimm.load(folder / "janus"), unimm.load(folder / "emu3")):
        processor = um.processor
        ids = processor.drawing_inputs("a red apple", images(2), (3, 5))["input_ids"][0].tolist()
        asked = processor(["a red apple"], [images(2)])["input_ids"][0].tolist()
        drawn = processor.drawing_ids("a red apple", (3, 5))
        begin, end = processor.layout.begin, processor.layout.end
        span = ids[ids.index(begin) : len(ids) - ids[::-1].index(end)]
        assert span == asked[asked.index(begin) : len(asked) - asked[::-1].index(end)]
        turn = processor.turns
        before = (
            [[processor.bos]]
            if turn.bare_drawings
            else [[processor.bos], *processor.conversation.special(turn.user)]
        )
        assert ids[: ids.index(begin)] == processor.ids(*before)
        assert ids[-4:] == drawn[-4:]


@torch.no_grad()
def test_guidance_blanks_words_and_features(tiny_model: UniMM) -> None:
    """Greedy codes are those of one forward without cache over both rows, built by hand."""
    model, processor = tiny_model.model, tiny_model.processor
    codes = draw(tiny_model, "a red apple", images(1), guidance_scale=3.0, temperature=0)
    inputs = processor.drawing_inputs("a red apple", images(1))
    prompt = inputs["input_ids"][0].tolist()
    assert prompt.count(processor.layout.feature) == 4
    blank = [processor.bos, *[processor.pad] * (len(prompt) - 2), processor.layout.begin]
    rows = torch.tensor([row + processor.layout.drawing_steps() for row in (prompt, blank)])
    stream = model.embed(rows, Images(inputs["pixel_values"], codes=codes.repeat(2, 1, 1))).stream
    conditional, unconditional = model.code_logits(model.decode(stream).last_hidden_state[:, -17:-1])
    assert torch.equal((unconditional + 3 * (conditional - unconditional)).argmax(-1), codes.flatten())


@torch.no_grad()
def test_emu3_steers_away_from_its_negative_prompt_alone(folder: Path) -> None:
    um = unimm.load(folder / "emu3", device="cpu")
    model, processor, grid = um.model, um.processor, (3, 5)
    options = {"guidance_scale": 3.0, "temperature": 0, "size": (20, 12)}
    codes = draw(um, "a red apple", images(1), **options)
    inputs = processor.drawing_inputs("a red apple", images(1), grid)
    negative = torch.tensor([processor.unconditional_ids([], grid)])
    drawn = model.layout.tokens(codes[0])[None]
    streams = [
        model.embed(inputs.pop("input_ids"), Images.from_inputs(inputs)).stream,
        model.embed(negative).stream,
    ]
    logits = []
    for stream in streams:
        hidden = model.decode(torch.cat([stream, model.embed(drawn).stream], 1)).last_hidden_state
        rows = model.code_logits(hidden[0, -len(drawn[0]) - 1 : -1]).view(3, 6, -1)
        logits.append(rows[:, :5])  # after each line its end is forced
    conditional, unconditional = logits
    assert torch.equal((unconditional + 3 * (conditional - unconditional)).argmax(-1), codes[0])


def test_what_cannot_be(tiny_model: UniMM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^images: 1 entries for 2 prompts; give one for each, or None$"):
        tiny_model.draw(PROMPTS[:2], images=images(1))
    with pytest.raises(
        UserError, match=r"^prompt: \d+ tokens with its images, .* for 112; give fewer images$"
    ):
        tiny_model.draw("a red apple", images=[images(1) * 20])
    with pytest.raises(UserError, match=r"nothing.png: no such file"):
        tiny_model.draw("a red apple", images=tmp_path / "nothing.png")
    processor = tiny_model.processor
    views, processor.views = processor.views, None  # as of a model without an encoder
    try:
        with pytest.raises(UserError, match=r"^images: this model understands no images$"):
            tiny_model.draw("a red apple", images=images(1))
    finally:
        processor.views = views

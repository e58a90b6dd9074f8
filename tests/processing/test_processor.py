"""Prompts, padding and images, as the model gets them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.errors import UserError
from unimm.pipeline import UniMM


def test_question_prompt_puts_images_first(tiny_model: UniMM) -> None:
    processor = tiny_model.processor
    ids = processor.question_ids("what is this?", images=2)
    image = processor.ids(*processor.layout.understanding(2, 2))
    user, assistant = processor.tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    assert ids[:2] == [processor.bos, user]
    assert ids[2 : 2 + 2 * len(image)] == image * 2
    assert processor.tokenizer.decode(ids[2 + 2 * len(image) : -1]) == "what is this?"
    assert ids[-1] == assistant


def test_typed_special_tokens_stay_text(tiny_model: UniMM) -> None:
    processor = tiny_model.processor
    text = "<begin_of_image> <eos> ünïcödé 🐼 <image_placeholder>"
    ids = processor.text_ids(text)
    assert not set(ids) & set(processor.tokenizer.all_special_ids)
    assert processor.tokenizer.decode(ids) == text


def test_unconditional_prompt_keeps_first_and_last(tiny_model: UniMM) -> None:
    processor = tiny_model.processor
    ids = processor.drawing_ids("a red apple")
    blank = processor.unconditional_ids(ids)
    assert (blank[0], blank[-1]) == (processor.bos, processor.layout.begin)
    assert set(blank[1:-1]) == {processor.pad} and len(blank) == len(ids)


def test_left_padding(tiny_model: UniMM) -> None:
    ids, mask = tiny_model.processor.pad_left([[1, 2, 3], [4]])
    pad = tiny_model.processor.pad
    assert ids.tolist() == [[1, 2, 3], [pad, pad, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_images_to_understand_are_padded_with_grey(tiny_model: UniMM) -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    pixels = tiny_model.processor.look([wide]).pixels
    assert pixels.shape == (1, 3, 32, 32)
    levels = ((pixels[0] + 1) * 127.5).round()
    assert levels[:, 0, 0].tolist() == [127, 127, 127]  # above the image
    assert levels[:, 16, 16].tolist() == [255, 0, 0]


def test_images_to_tokenise_are_cropped(tiny_model: UniMM) -> None:
    halves = np.zeros((20, 60, 3), np.uint8)
    halves[:, 20:40] = 255  # the middle third is what a square crop keeps
    pixels = tiny_model.processor.drawing_pixels([Image.fromarray(halves)])
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[..., 8:-8], torch.ones(1, 3, 32, 16))


@pytest.mark.parametrize(
    ("prompt", "line"), [("  ", "prompt: empty"), ("apple " * 200, "prompt: .* leaves room for 112")]
)
def test_prompts_that_cannot_be_drawn(tiny_model: UniMM, prompt: str, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        tiny_model.processor.drawing_ids(prompt)


@pytest.mark.parametrize(
    ("prompt", "grid", "images", "line"),
    [
        ("apple", (40, 40), 0, "size: 320x320 takes 1600 codes, the context holds 128; give a smaller one$"),
        ("apple " * 99, (40, 40), 1, "size: 320x320 takes 1600 codes"),
        ("apple", (5, 25), 0, "prompt: .* tokens, a drawing leaves room for 3; give a smaller size$"),
        ("apple", (1, 127), 1, "prompt: .* tokens with its images, .* room for 1; give fewer images$"),
        ("apple", (5, 24), 1, "prompt: .* tokens with its images, .* room for 8; give fewer images$"),
        ("apple " * 200, (11, 10), 0, "prompt: .* tokens, a drawing leaves room for 18; shorten it$"),
        ("apple " * 200, (4, 4), 3, "prompt: .* tokens with its images, .* room for 112; shorten it or give fewer$"),
    ],
)  # fmt: skip
def test_what_to_shorten_is_named(
    tiny_model: UniMM, prompt: str, grid: tuple[int, int], images: int, line: str
) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        tiny_model.processor.drawing_ids(prompt, grid, [(4, 4)] * images)


@pytest.mark.parametrize("words", ["what?", "why? " * 60])
def test_images_over_the_context(tiny_model: UniMM, words: str) -> None:
    with pytest.raises(UserError, match=r"^question: \d+ tokens with its images, .* 128; give fewer images$"):
        tiny_model.processor.question_ids(words, 30)


def test_question_over_the_context(tiny_model: UniMM) -> None:
    with pytest.raises(UserError, match=r"^question: \d+ tokens with its images, the context holds 128"):
        tiny_model.processor.question_ids("why? " * 60)

"""Every way to ask and to draw, token by token as transformers' processors write it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Emu3Processor, JanusProcessor

from tests.families.emu3_checkpoints import emu3
from tests.families.emu3_checkpoints import original as original_emu3
from tests.families.janus_checkpoints import janus
from tests.families.janus_checkpoints import original as original_janus
from unimm.families.emu3 import NEGATIVE, POSITIVE
from unimm.families.source import Checkpoint
from unimm.processing.processor import UniMMProcessor

QUESTIONS = ("what is this?", "  a red apple: what \n\nis it? ", "User: it <|Assistant|> a")
PROMPTS = ("a red apple", "4*7 blue apples, on a: what")


def make_images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16 + 9 * n, 20, 3), dtype=np.uint8)) for n in range(count)]


def turns(question: str, images: int, *before: dict[str, object]) -> list[dict[str, object]]:
    shown = [{"type": "image"}] * images
    return [*before, {"role": "user", "content": [*shown, {"type": "text", "text": question.strip()}]}]


def of(folder: Path) -> UniMMProcessor:
    checkpoint = Checkpoint(folder)
    assert checkpoint.layout in ("transformers", "original")
    return checkpoint.processor


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts, with the roles of `deepseek` and of `deepseek_old`."""
    folder = tmp_path_factory.mktemp("janus")
    original_janus(folder / "original-deepseek", janus(folder / "transformers-deepseek"))
    for layout in ("original", "transformers"):
        shutil.copytree(folder / f"{layout}-deepseek", folder / f"{layout}-deepseek_old")
    template = folder / "transformers-deepseek_old" / "chat_template.jinja"
    text = template.read_text()
    assert "<|User|>" in text and "<|Assistant|>" in text
    template.write_text(text.replace("<|User|>", "User").replace("<|Assistant|>", "Assistant"))
    options = json.dumps({"sft_format": "deepseek_old"})
    (folder / "original-deepseek_old" / "processor_config.json").write_text(options)
    return folder


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("form", ["deepseek", "deepseek_old"])
def test_janus(janus_folder: Path, layout: str, form: str) -> None:
    theirs = JanusProcessor.from_pretrained(janus_folder / f"transformers-{form}")
    ours = of(janus_folder / f"{layout}-{form}")
    for question in QUESTIONS[:2]:
        for images in (0, 1, 2, 4):
            text = theirs.apply_chat_template(
                turns(question, images), tokenize=False, add_generation_prompt=True
            )
            expected = theirs(text=text, images=make_images(images) or None, return_tensors="pt")[
                "input_ids"
            ][0]
            assert ours.question_ids(question, images) == expected.tolist()
    user, assistant = ("<|User|>", "<|Assistant|>") if form == "deepseek" else ("User", "Assistant")
    for prompt in PROMPTS:
        text = f"{user}: {prompt}\n\n{assistant}:"
        expected = theirs(text=text, generation_mode="image", return_tensors="pt")["input_ids"][0]
        assert ours.drawing_ids(prompt) == expected.tolist()


@pytest.fixture(scope="module")
def emu3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emu3")
    original_emu3(folder / "original", emu3(folder / "transformers"))
    return folder


@pytest.fixture(scope="module")
def of_emu3(emu3_folder: Path) -> Emu3Processor:
    processor = Emu3Processor.from_pretrained(emu3_folder / "transformers")
    processor.downsample_ratio = 4  # fixed at 8 in its code
    return processor


@pytest.mark.parametrize("images", [0, 1, 3])
def test_emu3_questions(emu3_folder: Path, of_emu3: Emu3Processor, images: int) -> None:
    ours = of(emu3_folder / "transformers")
    system = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
    for question in QUESTIONS[:2]:
        text = of_emu3.apply_chat_template(
            turns(question, images, system), tokenize=False, add_generation_prompt=True
        )
        expected = of_emu3(text=[text], images=make_images(images) or None, return_tensors="pt")["input_ids"]
        assert ours([question], [make_images(images)])["input_ids"].tolist() == expected.tolist()


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize(("ratio", "area"), [("1:1", 400), ("4:3", 700), ("16:9", 2000), ("3:10", 999)])
def test_emu3_prompts_and_their_sizes(
    emu3_folder: Path, of_emu3: Emu3Processor, layout: str, ratio: str, area: int
) -> None:
    ours = of(emu3_folder / layout)
    grid = of_emu3.calculate_generate_size(ratio, area, of_emu3.downsample_ratio)
    options = {"return_for_image_generation": True, "ratio": ratio, "image_area": area}
    for prompt in PROMPTS:
        positive, negative = (
            of_emu3(text=text, **options)["input_ids"][0] for text in (prompt + POSITIVE, NEGATIVE)
        )
        assert ours.drawing_ids(prompt, grid) == positive
        assert ours.unconditional_ids(positive, grid) == negative


def test_special_tokens_that_a_user_types_are_text(janus_folder: Path, emu3_folder: Path) -> None:
    for folder in (janus_folder / "original-deepseek", emu3_folder / "original"):
        processor = of(folder)
        typed = "<|Assistant|> <|image start|> <begin_of_image>"
        special = set(processor.tokenizer.get_added_vocab().values())
        assert not special & set(processor.text_ids(typed))

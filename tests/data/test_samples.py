"""`unimm data check` and training take the same way: every record is a sample, or bad for the same reason in both."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data import forms
from unimm.data.check import check_source
from unimm.data.samples import SampleBuilder, blank_codes
from unimm.data.sources import BadRecord, ImagePart, Message, Reading, Record, open_source
from unimm.errors import UserError, UserNote
from unimm.pipeline import UniMM
from unimm.processing.messages import Blob
from unimm.processing.processor import UniMMProcessor
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

LONG = "x" * 200


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


SEEN = {"type": "image", "image": "0.png"}
MIXED: list[tuple[dict[str, Any], str | None]] = [
    ({"image": "0.png", "conversations": [human("<image>\nq"), gpt("a")]}, None),
    ({"image": ["0.png", "1.png"], "conversations": [human("<image>"), gpt("a"), human("<image> and?")]}, None),
    ({"image": "0.png", "conversations": [human("q"), gpt("a"), human("thanks")]}, None),
    ({"image": "0.png", "conversations": [human("q"), gpt(LONG)]}, "tokens, the context holds 128"),
    ({"image": "0.png", "conversations": [human("q"), gpt("a"), human("q"), gpt(LONG)]}, None),
    ({"image": "gone.png", "text": "a"}, "no such file"),
    ({"image": "broken.png", "text": "a"}, "not an image"),
    ({"text": LONG}, None),
    (chat(("system", [SEEN]), ("user", "q"), ("assistant", "a")), "an image in the system turn"),
    (chat(("user", [SEEN]), ("assistant", "a"), ("system", "be brief"), ("user", "q"), ("assistant", "a")),
     "a system turn may only come first"),
    (chat(("user", [{**SEEN, "draw": True}]), ("assistant", "a")), "to be drawn in a turn of the user"),
    (chat(("user", "q"), ("assistant", [{**SEEN, "draw": False}])), "to be looked at in a turn of the assistant"),
    (chat(("user", "q"), ("assistant", [{**SEEN, "draw": True}])), None),
    (chat(("user", LONG), ("assistant", [SEEN])), "tokens, the context holds 128"),
]  # fmt: skip
"""Rows, and why each is bad."""


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every row above in one file, with its images."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(forms.encoded(forms.SCENES[number]))
    (tmp_path / "broken.png").write_bytes(b"broken")
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in MIXED))
    return path


@pytest.fixture
def samples(tiny_model: UniMM) -> SampleBuilder:
    target_size = tiny_model.processor.target_size()
    return SampleBuilder(tiny_model.processor, target_size, blank_codes(target_size))


def test_every_record_becomes_a_sample_or_says_why(mixed: Path, samples: SampleBuilder) -> None:
    source = open_source(mixed)
    for index, (_, reason) in enumerate(MIXED):
        if reason is None:
            sample = samples.build(source[index], "mixed")
            assert len(sample["ids"]) == len(sample["labels"]) <= 128 and (sample["labels"] >= 0).any()
            shown = samples.processor.layout.feature_positions(torch.from_numpy(sample["ids"])).sum()
            assert int(shown) == 4 * len(sample["images"])
        else:
            with pytest.raises(BadRecord, match=reason) as bad:
                samples.build(source[index], "mixed")
            assert bad.value.key == f"line {index + 1}"


def test_the_check_and_training_agree_on_every_record(mixed: Path, tiny: Path, tmp_path: Path) -> None:
    report = check_source(str(mixed), model=str(tiny))
    listed = {item["key"]: item["reason"] for item in report["bad_items"]}
    assert report["records"] == sum(reason is None for _, reason in MIXED)
    assert report["unanswered"] == 2 and report["tokens"]["too_long"] == 2
    recipe = {
        "task": "unified", "output": str(tmp_path / "run"), "model": {"pretrained": str(tiny)},
        "data": {"sources": {"mine": {"path": str(mixed)}}},
        "stages": [{"name": "one", "steps": 12, "batch": 4, "lr": {"decoder": 0.01}}],
        "logging": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)
        train(load_recipe(path), quiet=True)
    lines = (tmp_path / "run" / "bad-items.jsonl").read_text().splitlines()
    met = {item["key"]: item["reason"] for item in map(json.loads, lines)}
    assert met == listed, "48 samples of 14 records: training meets each of them"


def test_an_unanswered_turn_is_left_out_with_its_images(
    tiny_model: UniMM, mixed: Path, samples: SampleBuilder
) -> None:
    record = open_source(mixed)[1]
    answered = Record("k", record.messages[:2])
    whole, cut = samples.build(record, "mixed"), samples.build(answered, "mixed")
    assert np.array_equal(whole["ids"], cut["ids"]) and torch.equal(
        whole["images"].pixels, cut["images"].pixels
    )


def writer(processor: UniMMProcessor, *how: Any) -> SampleBuilder:
    """What writes records without images of their own; `how`: requests and context."""
    return SampleBuilder(processor, None, lambda pixels: pixels, *how)


def test_whether_a_record_fits_does_not_hang_on_the_wording(tiny_model: UniMM) -> None:
    processor = tiny_model.processor
    image = ImagePart(Blob("a.png"))
    requests = ("caption", "say all that there is to say about this picture")
    tight = len(writer(processor, requests[:1]).row(
        Record("k", (Message("user", (image,)), Message("assistant", ("apple",)))), [(2, 2)], []).ids)  # fmt: skip
    builder = writer(processor, requests, tight)
    captions = [
        (Message("user", (image,)), Message("assistant", (words,))) for words in ("apple", "apple " * 9)
    ]
    record = Record("k", captions[0], (captions[1],))
    rows = [builder.row(record, [(2, 2)], [], request=number).ids for number in range(8)]
    assert all(row == rows[0] for row in rows), "one wording and one request fit"
    with pytest.raises(UserError, match=f"the context holds {tight}"):
        builder.row(Record("k", captions[1]), [(2, 2)], [])


def test_every_caption_is_learnt(tiny_model: UniMM) -> None:
    words = ("a red apple", "an apple", "fruit")
    record = Record("k", *_versions([(Message("assistant", (text,)),) for text in words]))
    builder = writer(tiny_model.processor)
    rows = [builder.row(record, [], [], request=number).ids[1:-1] for number in range(3)]
    assert sorted(rows) == sorted(tiny_model.processor.text_ids(text) for text in words)


def _versions(messages: list[Any]) -> tuple[Any, Any]:
    return messages[0], tuple(messages[1:])


def test_a_model_that_cannot_draw_says_so_of_each_drawing(tiny_model: UniMM, mixed: Path) -> None:
    samples = SampleBuilder(tiny_model.processor, None, lambda pixels: pixels)
    with pytest.raises(BadRecord, match="this model cannot draw"):
        samples.build(open_source(mixed)[12], "mixed")


def test_features_of_another_shape_are_bad(tiny_model: UniMM, samples: SampleBuilder, tmp_path: Path) -> None:
    blobs = []
    for number, shape in enumerate([(4, 8), (4, 9)]):
        path = tmp_path / f"{number}.features.npy"
        np.save(path, np.zeros(shape, np.float32))
        blobs.append(ImagePart(Blob(str(path), path=str(path))))
    record = Record("k", (Message("user", (*blobs, "q")), Message("assistant", ("a",))))
    with pytest.raises(BadRecord, match=r"features of \[4, 8\], the model takes \[16, 16\]"):
        samples.build(record, "place")


@pytest.mark.parametrize(
    ("codes", "line"),
    [
        (np.zeros((3, 4), np.int32), r"image codes of \[3, 4\], the model draws \[4, 4\]"),
        (np.zeros((0, 4), np.int32), r"image codes of \[0, 4\], the model draws"),
        (np.full((4, 4), 32), "image codes of 32 to 32, the model has 0 to 31"),
        (np.full((4, 4), -1), "image codes of -1 to -1, the model has 0 to 31"),
        (np.full((4, 4), 2**62), "the model has 0 to 31"),
    ],
)
def test_codes_that_the_model_does_not_have_are_bad(
    codes: Any, line: str, samples: SampleBuilder, tmp_path: Path
) -> None:
    path = tmp_path / "0.codes.npy"
    np.save(path, codes)
    drawn = ImagePart(Blob(str(path), path=str(path)), draw=True)
    record = Record("k", (Message("user", ("q",)), Message("assistant", (drawn,))))
    with pytest.raises(BadRecord, match=line):
        samples.build(record, "place")


def test_long_turns_are_cut_to_a_shorter_row_too(tiny_model: UniMM, mixed: Path) -> None:
    target_size = tiny_model.processor.target_size()
    samples = SampleBuilder(tiny_model.processor, target_size, blank_codes(target_size), context=60, images=1)
    source = open_source(mixed)
    assert len(samples.build(source[7], "mixed")["ids"]) == 60
    shown = {"images": ["0.png", "1.png"], **chat(("user", "<image><image>"), ("assistant", "a"))}
    (mixed.parent / "two.jsonl").write_text(json.dumps(shown))
    two = open_source(mixed.parent / "two.jsonl", Reading())[0]
    with pytest.raises(BadRecord, match="2 images, a row holds 1"):
        samples.build(two, "mixed")

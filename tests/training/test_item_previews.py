"""Previews on one's own data: held-out items answered and drawn beside what the data has, not scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import forms
from tests.training.test_records import recipe_file
from tests.training.test_validation import started, twice, validated
from unimm.data.encode import EncodingJob, encode_source
from unimm.data.sources import Reading
from unimm.images import to_uint8
from unimm.pipeline import UniMM
from unimm.training.item_previews import PreviewItems, exact_match, word_f1
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

SHOWING = {"every": 2, "samples_every": 2, "tensorboard": True}


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples" / name).read_text().splitlines()]


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "samples").iterdir()}


def shown(
    folder: Path, tiny: Path, sources: dict[str, Any], **changes: Any
) -> tuple[UnifiedTask, PreviewItems]:
    """What previews of a recipe show."""
    changes.setdefault("logging", {"samples_every": 1, "tensorboard": False})
    task = started(recipe_file(folder, tiny, sources, **changes))
    assert task.shown is not None
    return task, task.shown


def square(pixels: Any, target_size: Any) -> Any:
    """An image as it is trained on."""
    return to_uint8(target_size.pixels(Image.fromarray(pixels))[None])[0]


def test_held_out_items_are_shown_and_no_scenes(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny, logging=SHOWING)
    train(load_recipe(path), quiet=True)
    run = tmp_path / "run"
    assert names(run) == {"held-out-000002.png", "held-out-000004.png", "held-out.jsonl"}
    written = lines(run, "held-out.jsonl")
    task = started(path)
    assert task.records is not None
    held = {task.records.sources["captions"][index].key for index in task.records.held["captions"]}
    assert [line["step"] for line in written] == [2, 4]
    for line in written:
        assert {one["key"] for one in line["answers"]} == {one["key"] for one in line["prompts"]} == held
        for one in line["answers"]:
            assert (
                one["reference"] == (tmp_path / "data" / one["key"]).with_suffix(".txt").read_text().strip()
            )
        assert 0 <= line["exact_match"] <= 1 and 0 <= line["word_f1"] <= 1


def test_a_resumed_run_has_each_preview_once(tiny: Path, tmp_path: Path) -> None:
    path = validated(tmp_path, tiny, logging=SHOWING | {"samples_every": 1}, checkpoint={"every": 2})
    train(load_recipe(path, ["stages[0].steps=3", f"output={tmp_path}/cut"]), quiet=True)
    (tmp_path / "cut/checkpoints/step-00000003/state.json").unlink()
    with pytest.warns(UserWarning, match="resuming from step-00000002"):
        train(load_recipe(path, [f"output={tmp_path}/cut"]), quiet=True)
    assert [line["step"] for line in lines(tmp_path / "cut", "held-out.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("scenes", [False, True])
def test_where_nothing_is_held_out_the_items_are_said_to_be_trained_on(
    tiny: Path, tmp_path: Path, scenes: bool
) -> None:
    sources = twice(forms.image_folder(tmp_path / "data", 4))
    mixture = dict.fromkeys(sources, 1) | ({"emojiscenes/understanding": 1} if scenes else {})
    path = recipe_file(tmp_path, tiny, sources, logging=SHOWING, stage={"mixture": mixture, "steps": 2})
    train(load_recipe(path, [] if scenes else ["prompts=[a bell]"]), quiet=True)
    own, drawn = {"trained-on-000002.png", "trained-on.jsonl"}, {"000002.png"}
    assert names(tmp_path / "run") == own | drawn | ({"captions.jsonl"} if scenes else set())


def test_tensorboard_has_sheets_numbers_and_answers(tiny: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(load_recipe(validated(tmp_path, tiny, logging=SHOWING)), quiet=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"images": 0, "tensors": 0})
    tags = events.Reload().Tags()
    assert tags["images"] == ["samples/held-out"]
    assert [event.step for event in events.Images("samples/held-out")] == [2, 4]
    assert {"samples/held-out/word_f1", "validation/text_loss"} <= set(tags["scalars"])
    text = events.Tensors("samples/held-out/answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert lines(tmp_path / "run", "held-out.jsonl")[-1]["answers"][0]["reference"] in text


def test_questions_are_asked_as_training_has_them(tiny: Path, tmp_path: Path) -> None:
    """Several turns and images, a system's turn, words alone: the first answer is left to the model."""
    talks = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is this?"},
                      {"role": "assistant", "content": "a bell"}]},
        {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "say b"}, {"role": "assistant", "content": "b"}]},
        {"text": "nobody asks this"},
    ]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talks))
    sources = {
        "talks": {"path": str(tmp_path / "talks.jsonl")},
        "seen": {"path": str(forms.llava(tmp_path / "llava", 4))},
    }
    _, items = shown(tmp_path / "r", tiny, sources)
    asked = {one.key: one for one in items.questions()}
    assert len(asked) == 6 and not any("nobody" in answer for one in asked.values() for answer in one.answers)
    for place in items.asked:
        record, sample = items.items.record(place), items.items.sample(place)
        one = asked[record.key]
        prompt = one.inputs["input_ids"][0].tolist()
        assert prompt == sample["ids"][: len(prompt)].tolist()
        assert (sample["labels"][: len(prompt)] == -100).all() and sample["labels"][len(prompt)] != -100
        assert len(one.images) == len(one.inputs.get("pixel_values", ())) == len(record.images())
    assert asked["scene-0"].inputs["pixel_values"].shape[0] == 2
    assert asked["line 2"].answers == ["a"] and asked["line 1"].question == "what is this?"


def test_drawings_stand_beside_the_images_of_the_data(tiny: Path, tmp_path: Path, tiny_model: UniMM) -> None:
    """Of images, of images as codes, and of changes to an image."""
    folder = forms.image_folder(tmp_path / "data", 3)
    encode_source(EncodingJob(str(folder), tmp_path / "tars", str(tiny), Reading("text_to_image")))
    change = {"original_image": "000.png", "edit_prompt": "make it night", "edited_image": "001.png"}
    (folder / "changes.jsonl").write_text(json.dumps(change) + "\n")
    sources = {
        "images": {"path": str(forms.image_folder(tmp_path / "plain", 3)), "pairs": "text_to_image"},
        "coded": {"path": str(tmp_path / "tars")},
        "changes": {"path": str(folder / "changes.jsonl")},
    }
    task, items = shown(tmp_path / "r", tiny, sources)
    found = items.prompts(tiny_model, task.target_size)
    by_key: dict[str, list[Any]] = {}
    for one in found:
        by_key.setdefault(one.key, []).append(one)
    assert len(found) == 7
    coded, plain = by_key["000.png"]
    assert plain.prompt == coded.prompt == forms.caption(forms.SCENES[0])
    assert np.array_equal(plain.original, square(forms.SCENES[0].render(), task.target_size))
    codes = tiny_model.image_tokenizer.encode(task.target_size.pixels(plain.original)[None])
    again = tiny_model.processor.to_images(tiny_model.image_tokenizer.decode(codes))[0]
    assert np.abs(np.asarray(again, int) - np.asarray(coded.original, int)).mean() < 20
    [changed] = by_key["line 1"]
    assert (changed.prompt, len(changed.images)) == ("make it night", 1)
    with torch.no_grad():
        task.preview(tiny_model.model, tmp_path / "samples", 7)
    with Image.open(tmp_path / "samples/trained-on-000007.png") as sheet:
        assert sheet.width > sheet.height / 2


def test_features_have_no_image_to_show(tiny: Path, tmp_path: Path, tiny_model: UniMM) -> None:
    encode_source(
        EncodingJob(str(forms.llava(tmp_path / "llava", 3)), tmp_path / "tars", str(tiny), features="float32")
    )
    task, items = shown(tmp_path / "r", tiny, {"mine": {"path": str(tmp_path / "tars")}})
    assert items.asked and items.questions() == [] and items.prompts(tiny_model, task.target_size) == []
    task.preview(tiny_model.model, tmp_path / "samples", 1)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("A bell.", ["a bell"], True, 1.0),
        ("a red bell", ["a bell", "two bells"], False, 0.8),
        ("", ["a bell"], False, 0.0),
        ("...", ["!"], True, 1.0),
        ("红色的铃", ["红色铃"], False, 6 / 7),
        ("a a a a", ["a b"], False, 1 / 3),
        ("two bells", ["a bell", "Two bells!"], True, 1.0),
    ],
)
def test_answers_are_compared_by_words(said: str, answers: list[str], exact: bool, f1: float) -> None:
    assert exact_match(said, answers) == exact and word_f1(said, answers) == pytest.approx(f1)
